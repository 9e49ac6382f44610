// wgmma: a warpgroup adds a 64x16 by 16xN product of bfloat16 to fp32 accumulators, asynchronously
// (sm_90a).
//
// All 128 threads issue the same instruction. A comes from shared memory or from registers, B from
// shared memory, both described by 64-bit descriptors (matrix_descriptor.h). Accumulators belong to
// the unit from wgmma until the wait that covers it, and so does the shared memory that it reads:
//
//   wgmma_fence(d);                     // once per group: registers written before are now seen
//   wgmma<32>(d, a, b); ...             // d = a b + d
//   wgmma_commit();                     // closes the group
//   wgmma_wait<0>(d);                   // d may be read, the tiles overwritten
//
// Lane l of the group's warp w holds, of row 16 w + l / 4 and column 8 j + 2 (l % 4):
//
//   d[4 j]     (row, column)        d[4 j + 1]  (row, column + 1)
//   d[4 j + 2] (row + 8, column)    d[4 j + 3]  (row + 8, column + 1)
//
// and A in registers as mma.h's `a`, its 16 rows being those of the warp.
// PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions: wgmma.mma_async".
#pragma once

#include "device/language.h"
#include "device/matrix_descriptor.h"
#include "device/wgmma_shapes.h"

namespace dgemma::device {

// An empty instruction through which the values of these registers pass: the compiler can then move
// no access to them across the wait or the fence, which themselves name no register.
template <int kCount>
DGEMMA_DEVICE void hold_registers(float (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}
template <int kCount>
DGEMMA_DEVICE void hold_registers(uint32_t (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(registers[i])::"memory");
}
template <typename Register, int kTiles, int kCount>
DGEMMA_DEVICE void hold_registers(Register (&registers)[kTiles][kCount]) {
#pragma unroll
  for (int i = 0; i < kTiles; ++i) hold_registers(registers[i]);
}

// wgmma.fence: before the first wgmma of every group, naming the accumulators that the group adds
// to and A where it is in registers, at most two: arrays, or arrays of arrays.
template <typename... Accumulators>
DGEMMA_DEVICE void wgmma_fence(Accumulators&... accumulators) {
  static_assert(sizeof...(Accumulators) <= 2);
  (hold_registers(accumulators), ...);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

DGEMMA_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most the newest `kPending` groups are under way. Its arguments name the
// accumulators that may be used after it, and the registers of A that may be changed after it, at
// most two.
template <int kPending, typename... Accumulators>
DGEMMA_DEVICE void wgmma_wait(Accumulators&... accumulators) {
  static_assert(sizeof...(Accumulators) <= 2);
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
  (hold_registers(accumulators), ...);
}

// d = a b + d, or a b where `accumulate` is false. kN is a multiple of 8 up to 256.
template <int kN, Major kMajorA = Major::k, Major kMajorB = Major::k>
DGEMMA_DEVICE void wgmma(float (&d)[kN / 2], MatrixDescriptor a, MatrixDescriptor b,
                         bool accumulate = true) {
  WgmmaShape<kN>::template shared<static_cast<int>(kMajorA), static_cast<int>(kMajorB)>(
      d, a.bits, b.bits, accumulate);
}

// d = a b + d of e4m3: 64x32 by 32xN, both k-major in shared memory, 32 k being 32 bytes. The sums
// in d keep about 14 bits (DeepSeek-V3 technical report, 3.3.2): add them up elsewhere every 128 k.
template <int kN>
DGEMMA_DEVICE void wgmma_e4m3(float (&d)[kN / 2], MatrixDescriptor a, MatrixDescriptor b,
                              bool accumulate = true) {
  WgmmaShape<kN>::shared_e4m3(d, a.bits, b.bits, accumulate);
}

// The same with A in registers.
template <int kN, Major kMajorB = Major::k>
DGEMMA_DEVICE void wgmma(float (&d)[kN / 2], const uint32_t (&a)[4], MatrixDescriptor b,
                         bool accumulate = true) {
  WgmmaShape<kN>::template registers<static_cast<int>(kMajorB)>(d, a, b.bits, accumulate);
}

}  // namespace dgemma::device
