// Fibers: threads of execution that one OS thread switches between by hand, each with a stack of
// its own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace sim {

struct Stack {
  uint8_t* bottom = nullptr;  // just above a page that may not be touched
  size_t bytes = 0;
};

struct Fiber {
  void* stack_pointer = nullptr;
  Stack stack;
  void* sanitizer_stack = nullptr;  // AddressSanitizer's own record of the fiber
};

// Makes `fiber` begin at `entry`, which must not return, when it is first switched to.
void prepare(Fiber& fiber, void (*entry)());

// Goes on in `to`, until something switches back to `from`. `leaving_for_good` where `from` has
// ended.
void switch_fiber(Fiber& from, Fiber& to, bool leaving_for_good = false);

// A fiber calls this first: it tells where the stack is that it was switched from.
void entered(Fiber& from);

// Whether an address lies in some fiber's stack.
bool is_in_a_stack(const void* address);

// Stacks are reused: making one is a system call.
class StackPool {
 public:
  Stack take();
  void give_back(Stack stack) { free_.push_back(stack); }

 private:
  std::vector<Stack> free_;
  size_t made_ = 0;
};

}  // namespace sim
