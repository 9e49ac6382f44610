// Launches that count on 1, 2 and 3 blocks of a multiprocessor, over a CUDA runtime that only notes
// what it is asked and says that as many fit as the first argument.
#include <cstdio>
#include <cstdlib>

#include "device/launch.h"

extern "C" int questions, blocks_that_fit, carveouts;  // overlap_runtime.cpp

__global__ void kernel() {}

int main(int, char** arguments) {
  blocks_that_fit = std::atoi(arguments[1]);
  for (uint32_t blocks : {1, 2, 3}) {
    const char* error =
        dgemma::device::launch({.threads = 32, .blocks_at_once = blocks}, nullptr, kernel);
    if (error != nullptr) std::printf("[%s] ", error);
  }
  std::printf("%d %d\n", questions, carveouts);
}
