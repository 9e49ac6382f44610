#include "flags.h"

#include <unordered_map>

#include "clocks.h"
#include "global_shadow.h"
#include "operations.h"

namespace sim {

namespace {
// What those knew who released it. PTX ISA, Memory Consistency Model, "Release and Acquire
// Patterns": atomic additions go on with what was released before, a store begins anew.
std::unordered_map<const void*, ClusterClocks> released;
}  // namespace

// A load that does not find what it waits for comes again: the others run first.
uint32_t load_flag(const uint32_t* flag, const Source& source) {
  yield([](const Thread&) -> std::string { return "looks at a flag in global memory"; }, source);
  touch_global(flag, sizeof *flag, kRead | kAtomic, source, "load_acquire");
  if (const auto found = released.find(flag); found != released.end())
    acquire(self(), found->second);
  return *flag;
}

void store_flag(uint32_t* flag, uint32_t value, const Source& source) {
  touch_global(flag, sizeof *flag, kWrite | kAtomic, source, "store_release");
  ClusterClocks& word = released[flag];
  word.clear();
  release(self(), word);
  *flag = value;
  ++machine->progress;
}

uint32_t add_to_counter(uint32_t* counter, uint32_t value, const Source& source) {
  return atomically(counter, source, [&](uint32_t old) {
    ClusterClocks& word = released[counter];
    acquire(self(), word);
    release(self(), word);
    return old + value;
  });
}

void forget_flags() { released.clear(); }

}  // namespace sim
