// What was done last to each word of global memory, as shadow.h has it for shared memory: races
// between threads of one launch, in one block or in several, and what the kernels in front wrote.
//
// A word remembers the last write of each byte and two reads. Where more threads than that read it
// in no order, the rest is forgotten: a race may go unseen, none is made up.
#pragma once

#include <cstddef>
#include <cstdint>

#include "shadow.h"

namespace sim {

// What is wrong with an access, if anything.
struct GlobalProblem {
  std::string text;
  bool of_two_writes = false;  // ordinary ones in no order: no fault where both store the same
};

// An access of the current thread, as ordinary instructions and atomic ones make it.
GlobalProblem touch_global(const void* address, size_t bytes, uint8_t manner, uint32_t place,
                           const char* what);
// The same for the wrappers, ending the launch.
void touch_global(const void* address, size_t bytes, uint8_t manner, const Source& source,
                  const char* what);
// A copy that the current thread starts, done when others know of this epoch of the slot. One that
// reads is remembered by the first word of each 16 bytes: it moves whole ones.
void copy_global(const void* address, size_t bytes, bool write, uint32_t slot, uint32_t epoch,
                 const Source& source, const char* what);
// What was remembered as in flight there is done, as the current thread knows.
void settle_global(const void* address, size_t bytes);
// A load of ld.global.nc.
void check_noncoherent(const void* address, size_t bytes, const Source& source);

// A launch begins, and is told by the numbers of its clusters from this one on.
void begin_global_shadow(uint32_t first_cluster);
// The kernels that this launch may overlap are those with clusters from this number on.
void overlap_from(uint32_t first_cluster);
// The host has this memory again: whatever kernels did there is no matter of those to come.
void forget_global(const void* address, size_t bytes);

}  // namespace sim
