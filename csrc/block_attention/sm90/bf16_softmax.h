// The consumer side of the sm90 kernels: the softmax state that a warpgroup keeps of its 64 rows
// while it goes over the keys, and how results are written. device/wgmma.h says which elements of a
// product a thread has.
#pragma once

#include <cmath>

#include "block_attention/sm90/bf16_keys.h"
#include "device/math.h"
#include "device/wgmma.h"

namespace dgemma::attention_sm90 {

template <int kKeys>
class Softmax {
 public:
  // seen: what the warpgroup's 64 rows see.
  DGEMMA_DEVICE Softmax(const VisibleKeys* seen, float scale) : scale_(scale * kLog2E) {
    const int32_t lane = static_cast<int32_t>(device::lane_index());
    const int32_t row = static_cast<int32_t>(device::warp_index() % 4) * 16 + lane / 4;
    column_ = 2 * (lane % 4);
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      first_[which] = seen[row + 8 * which].first;
      count_[which] = static_cast<uint32_t>(seen[row + 8 * which].end - first_[which]);
    }
  }

  // Replaces the scores by exp2(score - the row's maximum so far). The caller multiplies what was
  // summed before by factor(). `first` is the position of the tile's first key; all_seen: every row
  // sees every key of the tile.
  DGEMMA_DEVICE void exponentiate(int32_t first, bool all_seen) {
    if (all_seen)
      exponentiate<false>(first);
    else
      exponentiate<true>(first);
  }

  // The exponentials as wgmma's A, 16 keys at a time.
  DGEMMA_DEVICE void pack() {
#pragma unroll
    for (int i = 0; i < kKeys / 16; ++i) pack(i, exponentials[i]);
  }
  DGEMMA_DEVICE void pack(int i, uint32_t (&packed)[4]) const {
#pragma unroll
    for (int j = 0; j < 4; ++j)
      packed[j] = device::pack_bfloat16(scores[8 * i + 2 * j], scores[8 * i + 2 * j + 1]);
  }

  // Sums of the four threads of a row.
  DGEMMA_DEVICE void finish() {
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      sum_[which] += __shfl_xor_sync(device::kAllLanes, sum_[which], 1);
      sum_[which] += __shfl_xor_sync(device::kAllLanes, sum_[which], 2);
    }
  }

  DGEMMA_DEVICE float factor(int which) const { return factor_[which]; }
  DGEMMA_DEVICE float max(int which) const { return max_[which]; }
  DGEMMA_DEVICE float sum(int which) const { return sum_[which]; }

  float scores[kKeys / 2];
  uint32_t exponentials[kKeys / 16][4];

 private:
  template <bool kMasked>
  DGEMMA_DEVICE void exponentiate(int32_t first) {
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      const uint32_t begin = static_cast<uint32_t>(first + column_ - first_[which]);
      float largest = -INFINITY;
#pragma unroll
      for (int i = 0; i < kKeys / 4; ++i) {
        float& score = scores[4 * (i / 2) + 2 * which + i % 2];
        score *= scale_;
        if (kMasked && begin + static_cast<uint32_t>(8 * (i / 2) + i % 2) >= count_[which])
          score = -INFINITY;
        largest = fmaxf(largest, score);
      }
      largest = fmaxf(largest, __shfl_xor_sync(device::kAllLanes, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(device::kAllLanes, largest, 2));
      const float now = fmaxf(max_[which], largest);
      // A row that has seen no key yet keeps a sum of zero.
      const float reference = now > -INFINITY ? now : 0.0f;
      factor_[which] = device::exp2_approximate(max_[which] - reference);
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < kKeys / 4; ++i) {
        float& score = scores[4 * (i / 2) + 2 * which + i % 2];
        score = device::exp2_approximate(score - reference);
        sum += score;
      }
      max_[which] = now;
      sum_[which] = sum_[which] * factor_[which] + sum;
    }
  }

  float scale_;
  int32_t column_;
  int32_t first_[2];
  uint32_t count_[2];
  float factor_[2];
  float max_[2] = {-INFINITY, -INFINITY};
  float sum_[2] = {};
};

// Brings what was summed to the rows' new maxima, where a row of the warp has one.
template <int kCount>
DGEMMA_DEVICE void multiply_rows(float (&output)[kCount], float factor0, float factor1) {
  if (!__any_sync(device::kAllLanes, factor0 != 1.0f || factor1 != 1.0f)) return;
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    output[i] *= factor0;
    output[i + 1] *= factor0;
    output[i + 2] *= factor1;
    output[i + 3] *= factor1;
  }
}

// Where a row of the tile goes that has_row() says is there: as a part of a split, or as the
// output.
struct RowPlace {
  int64_t partial;  // the row of Attention::partial, and of Attention::sums
  bfloat16* output;
};

DGEMMA_DEVICE bool has_row(const Attention& p, const AttentionRequest& request,
                           const BlockCoordinates& at, int32_t row) {
  return at.row_tile * p.rows + row < request.rows * (p.query_heads / p.key_heads);
}

DGEMMA_DEVICE RowPlace find_row(const Attention& p, const AttentionRequest& request,
                                const BlockCoordinates& at, int32_t row) {
  const int32_t group = p.query_heads / p.key_heads;
  const int32_t packed = at.row_tile * p.rows + row;
  const int64_t tile =
      at.request * p.partial_tiles +
      (static_cast<int64_t>(at.head) * request.row_tiles + at.row_tile) * request.splits + at.split;
  const int64_t query = first_row_of(p, at.request) + packed / group;
  return {tile * p.rows + row,
          p.output + (query * p.query_heads + at.head * group + packed % group) * p.head_dim};
}

// A row's columns from `column` on, of which this thread has two of every eight: as a part, or
// divided by the row's sum.
template <int kCount>
DGEMMA_DEVICE void store_row(const Attention& p, const AttentionRequest& request,
                             const BlockCoordinates& at, int32_t row, int32_t column,
                             const float (&output)[kCount], int which, float sum) {
  const RowPlace to = find_row(p, request, at, row);
  column += 2 * static_cast<int32_t>(device::lane_index() % 4);
  if (request.splits > 1) {
    float* const part = p.partial + to.partial * p.head_dim + column;
#pragma unroll
    for (int i = 0; i < kCount / 4; ++i)
      *reinterpret_cast<float2*>(part + 8 * i) = {output[4 * i + 2 * which],
                                                  output[4 * i + 2 * which + 1]};
    return;
  }
  const float factor = 1.0f / sum;
#pragma unroll
  for (int i = 0; i < kCount / 4; ++i)
    *reinterpret_cast<uint32_t*>(to.output + column + 8 * i) = device::pack_bfloat16(
        output[4 * i + 2 * which] * factor, output[4 * i + 2 * which + 1] * factor);
}

// One thread of the row writes its maximum and sum beside the part.
DGEMMA_DEVICE void store_sums(const Attention& p, const AttentionRequest& request,
                              const BlockCoordinates& at, int32_t row, float max, float sum) {
  if (request.splits <= 1 || device::lane_index() % 4 != 0) return;
  *reinterpret_cast<float2*>(p.sums + 2 * find_row(p, request, at, row).partial) = {max, sum};
}

}  // namespace dgemma::attention_sm90
