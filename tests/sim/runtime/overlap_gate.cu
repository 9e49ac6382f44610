// Which launches ask for overlap, over a CUDA runtime that only notes what it is asked: the kernel
// below stands for one whose code comes from PTX of the version in the first argument.
#include <cstdio>
#include <cstdlib>

#include "device/launch.h"

extern "C" int ptx_version, questions;  // overlap_runtime.cpp

__global__ void kernel() { dgemma::device::wait_for_previous_kernel(); }

int main(int, char** arguments) {
  ptx_version = std::atoi(arguments[1]);
  for (bool overlaps : {true, false, true})
    dgemma::device::launch({.threads = 32, .overlaps_previous_kernel = overlaps}, nullptr, kernel);
  std::printf("%d\n", questions);
}
