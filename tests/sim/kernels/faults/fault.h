// One small kernel per mistake that the test bed must report, by topic. tests/test_sim_faults.py
// names them and what is said.
#pragma once

#include <vector>

#include "device/fence.h"
#include "device/launch.h"
#include "device/mbarrier.h"
#include "device/shared_memory.h"
#include "device/tma.h"
#include "device/warp.h"

namespace faults {

using namespace dgemma::device;

struct Shared {
  alignas(1024) uint8_t tile[4096];
  Mbarrier barrier;
};

struct Arguments {
  uint8_t* global;  // 8,192 bytes, of which a front kernel writes the second half; nothing behind
  TensorMap map;    // 64x64 bfloat16 of it, boxes of 64x8, 128-byte swizzle
  TensorMap plain;  // the same with boxes of 8x8, no swizzle
};

using Kernel = void (*)(Arguments);

struct Fault {
  const char* name;
  Kernel kernel;
  uint32_t threads = 128, blocks = 1, cluster_blocks = 1;
  Kernel middle = nullptr;  // runs between the front kernel and this one
};
#define FAULT(name) {#name, name}

DGEMMA_DEVICE Shared& shared() { return shared_memory<Shared>(); }
DGEMMA_DEVICE bool first() { return threadIdx.x == 0; }

// The barrier of the block, ready for threads and copies.
DGEMMA_DEVICE void begin_barrier(uint32_t arrivals = 1) {
  if (first()) {
    mbarrier_init(&shared().barrier, arrivals);
    fence_mbarrier_init();
  }
  __syncthreads();
}

// Long enough for all others to come where they wait or end.
DGEMMA_DEVICE void sleep_long() {
  for (int i = 0; i < 4000; ++i) __nanosleep(100);
}

std::vector<Fault> collective_faults();
std::vector<Fault> barrier_faults();
std::vector<Fault> cluster_faults();
std::vector<Fault> copy_faults();
std::vector<Fault> matrix_faults();
std::vector<Fault> shared_memory_faults();
std::vector<Fault> global_memory_faults();

}  // namespace faults
