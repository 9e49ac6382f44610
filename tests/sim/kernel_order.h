// Kernels that may begin before the kernel in front has ended (programmatic dependent launch).
// Here they run one after the other, so what one does too early is found by what was written in
// front: a kernel that overlaps the one in front may not touch what that wrote, nor what was
// written by those that it overlapped in turn, before wait_for_previous_kernel(), and may at no
// time read it past the coherent caches (ld.global.nc). What was written stands in
// global_shadow.cpp, by the numbers of clusters.
#pragma once

#include "machine.h"

namespace sim {

void forget_kernel_in_front();
void begin_kernel();
void end_kernel();

bool has_waited(const Thread& thread);
void wait_for_previous_kernel();

}  // namespace sim
