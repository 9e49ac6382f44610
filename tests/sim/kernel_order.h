// Kernels that may begin before the kernel in front has ended (programmatic dependent launch).
// Here they run one after the other, so what one does too early is found by what was written in
// front: a kernel that overlaps the one in front may not touch what that wrote, nor what was
// written by those that it overlapped in turn, before wait_for_previous_kernel(), and may at no
// time read it past the coherent caches (ld.global.nc).
#pragma once

#include <cstddef>
#include <cstdint>

#include "machine.h"

namespace sim {

void forget_kernel_in_front();
void begin_kernel();
void end_kernel();

// Null, or what is wrong with this access to global memory; writes are remembered for the next
// kernel.
const char* global_problem(const Thread& thread, const void* address, size_t bytes, bool write);
// The same for the wrappers.
void touch_global(const void* address, size_t bytes, bool write, const Source& source);
// What an asynchronous store writes when it comes.
void remember_global_write(const void* address, size_t bytes);
void check_noncoherent(const void* address, size_t bytes, const Source& source);

// An ordinary store that others look for.
void store_flag(uint32_t* flag, uint32_t value, const Source& source);

void wait_for_previous_kernel();

}  // namespace sim
