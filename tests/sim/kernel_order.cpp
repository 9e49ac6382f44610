#include "kernel_order.h"

#include <algorithm>

#include "clocks.h"
#include "flags.h"
#include "global_shadow.h"
#include "host_memory.h"

namespace sim {

namespace {

constexpr uint32_t kNone = ~0u;
// The first cluster of the kernel in front and those that it overlapped in turn.
uint32_t front = kNone;

}  // namespace

// Between calls of the host its memory may be freed and given out anew.
void forget_kernel_in_front() { front = kNone; }

void begin_kernel() {
  const uint32_t first = machine->first_cluster;
  begin_global_shadow(first);
  forget_freed_memory();
  if (machine->shape.overlaps) overlap_from(std::min(front, first));
}

void end_kernel() {
  // That this kernel waited for the one in front promises nothing to the next: griddepcontrol.wait
  // alone makes writes visible, and to the grid that waits.
  if (!machine->shape.overlaps || front == kNone) front = machine->first_cluster;
  forget_flags();
}

bool has_waited(const Thread& thread) {
  return thread.clock->known[kFrontSlot] > thread.block->cluster->first_epoch;
}

void wait_for_previous_kernel() {
  Thread& thread = self();
  learn(thread, kFrontSlot, thread.block->cluster->first_epoch + 1);
}

}  // namespace sim
