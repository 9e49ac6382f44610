// Ordinary loads and stores of the kernels. g++ -fsanitize=thread puts a call in front of each; the
// functions that it calls stand here in place of ThreadSanitizer's own.
#include "plain_access.h"

#include <cstddef>
#include <cstring>

#include "global_shadow.h"
#include "operations.h"
#include "shadow.h"

namespace sim {

bool watching = false;

void stop(Thread& thread, const std::string& place, const std::string& problem) {
  machine->error = name_of(thread) + ", " + place + ": " + problem;
  thread.state = State::exited;
  switch_fiber(thread.fiber, machine->scheduler, true);
}

namespace {

// A store that comes in no order with another: its value is known when the thread goes on. Where it
// leaves what is there, both store the same, which is no fault. In front of the copy of a struct
// comes the call for the store, then the one for the load.
struct Suspect {
  const void* address = nullptr;
  size_t bytes = 0;
  uint32_t place = 0;
  uint8_t before[16];
  std::string problem;
  bool may_load = true;
};
Suspect suspect;

// Whether it has stored something else. It is none any more.
bool suspect_stored() {
  const bool differs = std::memcmp(suspect.before, suspect.address, suspect.bytes) != 0;
  suspect.address = nullptr;
  return differs;
}

void touch_shared(Thread& thread, Block& block, size_t offset, size_t bytes, uint8_t manner,
                  const void* instruction) {
  if (offset + bytes > block.shared_bytes) return;  // the page behind it tells
  const uint32_t place = place_number(instruction);
  thread.touched = true;
  const std::string problem =
      touch(block, static_cast<uint32_t>(offset), static_cast<uint32_t>(bytes), manner,
            actor(thread), place, "this thread");
  if (!problem.empty()) stop(thread, place_text(place), problem);
  if (&block != thread.block) visit(block, slot_of(thread), thread.epoch, place, manner & kWrite);
}

inline void plain(const void* pointer, size_t bytes, uint8_t manner, const void* instruction) {
  if (!watching || machine == nullptr || machine->current == nullptr || !checking) return;
  Thread& thread = *machine->current;
  thread.last_access = instruction;
  if (suspect.address != nullptr) {
    const bool may_be_its_load = !(manner & kWrite) && suspect.may_load;
    suspect.may_load = false;
    if (!may_be_its_load && suspect_stored())
      stop(thread, place_text(suspect.place), suspect.problem);
  }
  const auto* address = static_cast<const uint8_t*>(pointer);
  Block& own = *thread.block;
  const auto offset = static_cast<size_t>(address - own.shared);
  if (offset < own.shared_bytes) {
    touch_shared(thread, own, offset, bytes, manner, instruction);
    return;
  }
  if (is_in_a_stack(address)) return;
  for (Block& block : own.cluster->blocks) {
    const auto there = static_cast<size_t>(address - block.shared);
    if (there < block.shared_bytes) {
      touch_shared(thread, block, there, bytes, manner, instruction);
      return;
    }
  }
  const uint32_t place = place_number(instruction);
  GlobalProblem problem = touch_global(address, bytes, manner, place, "this thread");
  if (problem.text.empty()) return;
  if (!problem.of_two_writes || bytes > sizeof suspect.before)
    stop(thread, place_text(place), problem.text);
  suspect = {address, bytes, place, {}, std::move(problem.text), true};
  std::memcpy(suspect.before, address, bytes);
}

}  // namespace

void check_last_store(const Thread& thread) {
  if (suspect.address == nullptr || !suspect_stored() || !machine->error.empty()) return;
  machine->error = name_of(thread) + ", " + place_text(suspect.place) + ": " + suspect.problem;
}

void forget_last_store() { suspect.address = nullptr; }

void touch_atomic(const void* address, uint32_t bytes, const Source& source) {
  if (machine->random.below(4) == 0)
    yield([](const Thread&) -> std::string { return "is about to do an atomic operation"; },
          source);
  if (!checking) return;
  Thread& thread = self();
  for (Block& block : thread.block->cluster->blocks) {
    const auto offset = static_cast<size_t>(static_cast<const uint8_t*>(address) - block.shared);
    if (offset >= block.shared_bytes) continue;
    thread.touched = true;
    touch_or_fail(block, static_cast<uint32_t>(offset), bytes, kWrite | kAtomic, actor(thread),
                  source, "an atomic operation");
    return;
  }
  touch_global(address, bytes, kWrite | kAtomic, source, "an atomic operation");
}

}  // namespace sim

// NOLINTBEGIN: the names are the compiler's.
extern "C" {
#define SIM_ACCESS(bytes)                                            \
  void __tsan_read##bytes(void* at) {                                \
    sim::plain(at, bytes, sim::kRead, __builtin_return_address(0));  \
  }                                                                  \
  void __tsan_write##bytes(void* at) {                               \
    sim::plain(at, bytes, sim::kWrite, __builtin_return_address(0)); \
  }
SIM_ACCESS(1)
SIM_ACCESS(2)
SIM_ACCESS(4)
SIM_ACCESS(8)
SIM_ACCESS(16)
#undef SIM_ACCESS
#define SIM_UNALIGNED(bytes)                                         \
  void __tsan_unaligned_read##bytes(void* at) {                      \
    sim::plain(at, bytes, sim::kRead, __builtin_return_address(0));  \
  }                                                                  \
  void __tsan_unaligned_write##bytes(void* at) {                     \
    sim::plain(at, bytes, sim::kWrite, __builtin_return_address(0)); \
  }
SIM_UNALIGNED(2)
SIM_UNALIGNED(4)
SIM_UNALIGNED(8)
SIM_UNALIGNED(16)
#undef SIM_UNALIGNED
void __tsan_read_range(void* at, size_t bytes) {
  sim::plain(at, bytes, sim::kRead, __builtin_return_address(0));
}
void __tsan_write_range(void* at, size_t bytes) {
  sim::plain(at, bytes, sim::kWrite, __builtin_return_address(0));
}
void __tsan_vptr_update(void*, void*) {}
void __tsan_vptr_read(void*) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
// Once-only initialisation of a function's static variable, the one atomic access of such code.
uint8_t __tsan_atomic8_load(const volatile uint8_t* at, int) { return *at; }
}
// NOLINTEND
