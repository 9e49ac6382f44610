// Global memory: loads and stores with a say in caching, and the pair that hands data from block to
// block.
//
// PTX ISA, "Data Movement and Conversion Instructions: ld, st, prefetch" and "Memory
// Consistency Model".
#pragma once

#include "device/language.h"

namespace dgemma::device {

// 16 bytes that this SM reads once: past L1. Also of what the kernel in front wrote, after
// wait_for_previous_kernel(); a load of ld.global.nc would not be ordered behind that, since the
// memory model leaves such loads out.
DGEMMA_DEVICE uint4 load_once(const void* global) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(global)
               : "memory");
  return v;
}

// 16 bytes, past L1: for results that another SM reads next.
DGEMMA_DEVICE void store_once(void* global, uint4 v) {
  asm volatile("st.global.L1::no_allocate.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(global), "r"(v.x),
               "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

// A flag between blocks: what was written before the store is seen after a load that returns the
// stored value. A loop that waits for a flag uses this load and nothing else.
DGEMMA_DEVICE uint32_t load_acquire(const uint32_t* flag) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  return value;
}
DGEMMA_DEVICE void store_release(uint32_t* flag, uint32_t value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}

// Adds and gives the old value; orders memory both ways, as a counter that the last block to finish
// reads must.
DGEMMA_DEVICE uint32_t add_acquire_release(uint32_t* counter, uint32_t value) {
  uint32_t old;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;"
               : "=r"(old)
               : "l"(counter), "r"(value)
               : "memory");
  return old;
}

DGEMMA_DEVICE void prefetch_to_l2(const void* global) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
}

}  // namespace dgemma::device
