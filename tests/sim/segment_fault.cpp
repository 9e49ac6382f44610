#include "segment_fault.h"

#include <setjmp.h>
#include <signal.h>
#include <ucontext.h>

#include <cstdio>

#include "shadow.h"

namespace sim {

#if defined(__SANITIZE_ADDRESS__)

// AddressSanitizer reports it.
void run_guarded(void (*run)()) { run(); }

#else

namespace {

// A touch of memory that is not there, by a fiber, ends the launch like any other error.
sigjmp_buf out_of_range;
const void* fault_instruction = nullptr;
void on_segment_fault(int, siginfo_t* information, void* context) {
  // Which stops for good where the machine itself is wrong.
  if (machine == nullptr || (machine->current == nullptr && !machine->delivering)) {
    signal(SIGSEGV, SIG_DFL);
    return;
  }
  const auto* address = static_cast<const uint8_t*>(information->si_addr);
  char text[200];
  std::snprintf(text, sizeof text, "touched address %p, where there is nothing",
                static_cast<const void*>(address));
  if (machine->current != nullptr) {
    const Thread& thread = self();
    const long offset = address - thread.block->shared;
    if (address >= thread.fiber.stack.bottom - 4096 && address < thread.fiber.stack.bottom)
      std::snprintf(text, sizeof text, "its stack is full");
    else if (offset >= -4096 && offset < static_cast<long>(thread.block->shared_bytes) + 8192)
      std::snprintf(text, sizeof text,
                    "touched shared memory at offset %ld; the block has %u bytes", offset,
                    thread.block->shared_bytes);
  }
  machine->error = text;
  fault_instruction =
      reinterpret_cast<void*>(static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP]);
  siglongjmp(out_of_range, 1);
}

// Where the thread is that touched what is not there: a line of the kernel, or, where it is in the
// test bed, the line of the kernel's last load or store.
std::string place_of_fault() {
  if (machine->current == nullptr) return "a copy, " + place_of(machine->delivered);
  const Thread& thread = self();
  const std::string place = place_text(
      place_number(static_cast<const void*>(static_cast<const uint8_t*>(fault_instruction) + 1)));
  const bool in_kernel = place.find(".cu:") != std::string::npos || thread.last_access == nullptr;
  return name_of(thread) + ", " +
         (in_kernel ? place : place_text(place_number(thread.last_access)));
}

class SegmentFaultHandler {
 public:
  SegmentFaultHandler() {
    stack_t alternate{};
    alternate.ss_sp = memory_;
    alternate.ss_size = sizeof memory_;
    sigaltstack(&alternate, &old_stack_);
    struct sigaction action{};
    action.sa_sigaction = on_segment_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, &old_action_);
  }
  ~SegmentFaultHandler() {
    sigaction(SIGSEGV, &old_action_, nullptr);
    sigaltstack(&old_stack_, nullptr);
  }

 private:
  static inline uint8_t memory_[64 * 1024];
  stack_t old_stack_;
  struct sigaction old_action_;
};

}  // namespace

void run_guarded(void (*run)()) {
  const SegmentFaultHandler handler;
  if (sigsetjmp(out_of_range, 1) == 0)
    run();
  else
    machine->error = place_of_fault() + ": " + machine->error;
}

#endif

}  // namespace sim
