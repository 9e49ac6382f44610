// Products of e4m3 on sm_90, out of the ring of sm90/bf16_pipeline.h: a stage's bytes are the same,
// 128 columns of one byte instead of 64 of two.
#pragma once

#include "grouped_gemm/cuda/fp8.h"
#include "grouped_gemm/sm90/bf16_pipeline.h"

namespace dgemma::moe_sm90 {

static_assert(kFp8Depth == kMoeDepth * sizeof(bfloat16));

// A warpgroup's 64 rows of a work tile, times its first kN pairs: adds the products to `total`. The
// tensor core sums one stage; over stages the sum runs in fp32.
template <int kN, int kTokens>
DGEMMA_DEVICE void multiply_e4m3(Ring<kTokens>& ring, typename Ring<kTokens>::State& at,
                                 int32_t k_steps, float (&total)[kN / 2]) {
  const uint32_t first_row = 64 * device::warpgroup_index();
  float sum[kN / 2] = {};
  for (int32_t step = 0; step < k_steps; ++step) {
    const auto& stage = ring.stage[at.stage];
    ring.pipeline.consumer_wait(at);
    device::fence_proxy_async();  // cp.async wrote the tokens, wgmma reads them
    const auto a = device::k_major_descriptor(stage.weights[first_row], Swizzle::bytes_128);
    const auto b = device::k_major_descriptor(stage.tokens, Swizzle::bytes_128);
    device::wgmma_fence(sum);
#pragma unroll
    for (uint32_t k = 0; k < kFp8Depth; k += 32)  // of e4m3, wgmma's K is 32
      device::wgmma_e4m3<kN>(sum, device::advanced(a, k), device::advanced(b, k), k > 0);
    device::wgmma_commit();
    device::wgmma_wait<0>(sum);
    ring.pipeline.consumer_release(at);
    at.advance();
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) total[i] += sum[i];
  }
}

// A thread's sums of row lane / 4 of its warp's 16, and of the row 8 further.
template <int kCount>
DGEMMA_DEVICE void multiply_rows(float (&sum)[kCount], float upper, float lower) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) sum[i] *= i / 2 % 2 == 0 ? upper : lower;
}

}  // namespace dgemma::moe_sm90
