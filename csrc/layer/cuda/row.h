// A row of a hidden state in the registers of a block: eight values, which are 16 bytes, a thread.
#pragma once

#include <cmath>
#include <cstdint>

#include "device/bfloat16.h"
#include "device/shared_memory.h"
#include "device/warp.h"

namespace dgemma {
namespace {

using device::bfloat16;

constexpr int32_t kMostThreads = 1024;

// Sums are made in the two halves in turn: a thread that writes one has passed the barrier of the
// other, which nobody reached before it had read this one's last sum.
struct RowShared {
  float sum[2][kMostThreads / 32];
};
struct RowSums {
  RowShared& shared;
  int32_t turn = 0;
};

// Threads of a block for a row, whole warps of them; those past the row's end hold zeros.
inline uint32_t row_threads(int64_t width) {
  return static_cast<uint32_t>((width / 8 + 31) / 32 * 32);
}

DGEMMA_DEVICE float rounded(float x) { return device::to_float(device::round_to_bfloat16(x)); }

struct Row {
  float value[8];

  DGEMMA_DEVICE static Row load(const bfloat16* row, int32_t width);

  DGEMMA_DEVICE void store(bfloat16* row, int32_t width) const {
    const int32_t first = 8 * static_cast<int32_t>(threadIdx.x);
    if (first >= width) return;
    *reinterpret_cast<uint4*>(row + first) = {
        device::pack_bfloat16(value[0], value[1]), device::pack_bfloat16(value[2], value[3]),
        device::pack_bfloat16(value[4], value[5]), device::pack_bfloat16(value[6], value[7])};
  }
};

// A row as it lies in memory. A kernel loads all that it needs before it uses any of it, so that it
// waits for memory once and not once between every two barriers.
struct PackedRow {
  uint4 bits;

  DGEMMA_DEVICE static PackedRow load(const bfloat16* row, int32_t width) {
    const int32_t first = 8 * static_cast<int32_t>(threadIdx.x);
    if (first >= width) return {};
    return {*reinterpret_cast<const uint4*>(row + first)};
  }

  DGEMMA_DEVICE Row unpacked() const {
    const uint32_t pairs[4] = {bits.x, bits.y, bits.z, bits.w};
    Row result;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      result.value[2 * i] = device::low_to_float(pairs[i]);
      result.value[2 * i + 1] = device::high_to_float(pairs[i]);
    }
    return result;
  }
};

DGEMMA_DEVICE Row Row::load(const bfloat16* row, int32_t width) {
  return PackedRow::load(row, width).unpacked();
}

// The sum over the block, the same tree whatever else runs; all threads call this.
DGEMMA_DEVICE float block_sum(float value, RowSums& sums) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2)
    value += __shfl_xor_sync(device::kAllLanes, value, lanes);
  float* const sum = sums.shared.sum[sums.turn];
  sums.turn ^= 1;
  const uint32_t own_warp = device::warp_index();  // of all lanes together, so not inside the if
  if (device::lane_index() == 0) sum[own_warp] = value;
  __syncthreads();
  float total = 0.0f;
  for (uint32_t warp = 0; warp < blockDim.x / 32; ++warp) total += sum[warp];
  return total;
}

// 1 / sqrt(mean(x^2) + epsilon). All threads call this.
DGEMMA_DEVICE float norm_factor(const Row& x, int32_t width, float epsilon, RowSums& sums) {
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < 8; ++i) squares = fmaf(x.value[i], x.value[i], squares);
  const float mean = block_sum(squares, sums) / static_cast<float>(width);
  return 1.0f / sqrtf(mean + epsilon);
}

// The norm without a weight, rounded once. All threads call this.
DGEMMA_DEVICE Row norm(const Row& x, int32_t width, float epsilon, RowSums& sums) {
  const float factor = norm_factor(x, width, epsilon, sums);
  Row result;
#pragma unroll
  for (int i = 0; i < 8; ++i) result.value[i] = rounded(x.value[i] * factor);
  return result;
}

// x / sqrt(mean(x^2) + epsilon) * weight, rounded once. All threads call this.
DGEMMA_DEVICE Row norm(const Row& x, const PackedRow& weight, int32_t width, float epsilon,
                       RowSums& sums) {
  const float factor = norm_factor(x, width, epsilon, sums);
  const Row scale = weight.unpacked();
  Row result;
#pragma unroll
  for (int i = 0; i < 8; ++i) result.value[i] = rounded(x.value[i] * factor * scale.value[i]);
  return result;
}

DGEMMA_DEVICE Row add(const Row& a, const Row& b) {
  Row result;
#pragma unroll
  for (int i = 0; i < 8; ++i) result.value[i] = rounded(a.value[i] + b.value[i]);
  return result;
}

}  // namespace
}  // namespace dgemma
