#include "fiber.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(__x86_64__)
#error "the switch below is written for x86-64"
#endif

namespace sim {

// System V ABI: rbx, rbp and r12 to r15 belong to the caller. The return address on the new stack
// does the rest.
extern "C" void sim_switch_stack(void** save_here, void* go_on_there);
asm(R"(
.text
.globl sim_switch_stack
.hidden sim_switch_stack
.type sim_switch_stack, @function
sim_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size sim_switch_stack, . - sim_switch_stack
)");

namespace {
// Pages are only taken when touched. Accumulators of 128 floats in unoptimized code with sanitizers
// fit several times.
constexpr size_t kStackBytes = 256 * 1024;
constexpr size_t kPageBytes = 4096;
// All lie side by side, so that it is quickly said whether an address belongs to one.
constexpr size_t kMostStacks = 32768;
uint8_t* stacks_begin = nullptr;
size_t stacks_made = 0;
}  // namespace

Stack StackPool::take() {
  if (!free_.empty()) {
    const Stack stack = free_.back();
    free_.pop_back();
    return stack;
  }
  if (stacks_begin == nullptr) {
    void* region = mmap(nullptr, kMostStacks * (kPageBytes + kStackBytes), PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (region != MAP_FAILED) stacks_begin = static_cast<uint8_t*>(region);
  }
  if (stacks_begin == nullptr || stacks_made == kMostStacks) {
    std::perror("sim: no memory for a fiber's stack");
    std::abort();
  }
  uint8_t* memory = stacks_begin + stacks_made++ * (kPageBytes + kStackBytes);
  mprotect(memory, kPageBytes, PROT_NONE);
  // The stacks begin at different places within a page: at the same place, their hottest lines
  // would share one set of the cache. 320 bytes go round a page in 64 steps.
  const size_t shift = made_++ * 320 % kPageBytes;
  return {memory + kPageBytes, kStackBytes - shift};
}

bool is_in_a_stack(const void* address) {
  const auto offset = static_cast<size_t>(static_cast<const uint8_t*>(address) - stacks_begin);
  return offset < stacks_made * (kPageBytes + kStackBytes);
}

void prepare(Fiber& fiber, void (*entry)()) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(fiber.stack.bottom, fiber.stack.bytes);
#endif
  // The stack pointer at a function's first instruction is 8 below a multiple of 16: its return
  // address lies there.
  void** top = reinterpret_cast<void**>(fiber.stack.bottom + fiber.stack.bytes);
  *--top = nullptr;  // the return address of `entry`, which does not return
  *--top = reinterpret_cast<void*>(entry);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  fiber.stack_pointer = top;
  fiber.sanitizer_stack = nullptr;
}

void switch_fiber(Fiber& from, Fiber& to, [[maybe_unused]] bool leaving_for_good) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(leaving_for_good ? nullptr : &from.sanitizer_stack,
                                 to.stack.bottom, to.stack.bytes);
#endif
  sim_switch_stack(&from.stack_pointer, to.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.sanitizer_stack, nullptr, nullptr);
#endif
}

void entered([[maybe_unused]] Fiber& from) {
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &from.stack.bytes);
  from.stack.bottom = static_cast<uint8_t*>(const_cast<void*>(bottom));
#endif
}

}  // namespace sim
