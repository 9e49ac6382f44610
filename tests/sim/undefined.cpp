// What C++ leaves undefined and a GPU does not forgive, or computes otherwise: misaligned loads and
// stores, integers that overflow, indices past an array's end (of shared memory too, where another
// array begins), shifts too far, division by zero. g++ -fsanitize=undefined puts a call where one
// happens; the functions that it calls stand here in place of UBSan's own. A kernel is stopped and
// reported like any misuse; what the host's part of a kernel file does wrong ends the program.
#include <cstdio>
#include <cstdlib>

#include "plain_access.h"
#include "shadow.h"

namespace sim {

namespace {

// What g++ hands over, in the layout of its libsanitizer/ubsan/ubsan_value.h.
struct CodePlace {
  const char* file;
  uint32_t line, column;
};
struct TypeName {
  uint16_t kind, info;
  char name[1];  // with quotes
};
// Of a load, a store or a reference; `power` is that of the alignment, as two to it.
struct Mismatch {
  CodePlace place;
  const TypeName* type;
  uint8_t power, kind;
};
// Of arithmetic, of an index (the array's type, the index's) and of a shift (that of either side).
struct Operation {
  CodePlace place;
  const TypeName *type, *other;
};

[[gnu::cold, gnu::noinline]] void report(const CodePlace& place, const std::string& problem) {
  if (!checking) return;
  std::string where = place.file;
  where.erase(0, where.find_last_of('/') + 1);
  where += ":" + std::to_string(place.line);
  if (machine == nullptr || machine->current == nullptr) {
    std::fprintf(stderr, "sim: %s: %s\n", where.c_str(), problem.c_str());
    std::abort();
  }
  stop(self(), where, problem);
}

void overflow(const Operation& operation, const char* what) {
  report(operation.place, std::string(what) + " overflows its type, " + operation.type->name);
}

}  // namespace

}  // namespace sim

// NOLINTBEGIN: the names are the compiler's.
extern "C" {
void __ubsan_handle_type_mismatch_v1(const sim::Mismatch* what, uintptr_t address) {
  char text[200];
  std::snprintf(text, sizeof text, "0x%zx is not a multiple of %u, as %s wants", size_t{address},
                1u << what->power, what->type->name);
  sim::report(what->place, text);
}
void __ubsan_handle_add_overflow(const sim::Operation* what, uintptr_t, uintptr_t) {
  sim::overflow(*what, "a sum");
}
void __ubsan_handle_sub_overflow(const sim::Operation* what, uintptr_t, uintptr_t) {
  sim::overflow(*what, "a difference");
}
void __ubsan_handle_mul_overflow(const sim::Operation* what, uintptr_t, uintptr_t) {
  sim::overflow(*what, "a product");
}
void __ubsan_handle_negate_overflow(const sim::Operation* what, uintptr_t) {
  sim::overflow(*what, "a negation");
}
void __ubsan_handle_divrem_overflow(const sim::Operation* what, uintptr_t, uintptr_t) {
  sim::report(what->place, "a division by zero, or one that overflows");
}
void __ubsan_handle_shift_out_of_bounds(const sim::Operation* what, uintptr_t, uintptr_t by) {
  sim::report(what->place, "a shift of " + std::string(what->type->name) + " by " +
                               std::to_string(static_cast<intptr_t>(by)));
}
void __ubsan_handle_out_of_bounds(const sim::Operation* what, uintptr_t index) {
  sim::report(what->place, "index " + std::to_string(static_cast<intptr_t>(index)) +
                               " of an array of type " + what->type->name);
}
}
// NOLINTEND
