// Attention of a tile of queries over a part of their keys, bfloat16 from sm_80 on, for every head
// dimension; the canvas form and the causal one differ in what a row sees alone, and keys in slots
// and in pages in the address of a row. sm80/bf16_attention.cu and sm80/bf16_paged_attention.cu
// instantiate it.
//
// The query heads that share a key head are rows of one tile: row r of a request is query r / group
// of head r % group. Scores and the output's accumulators stay in registers; keys and values come
// through shared memory a tile at a time, the next keys while the values are used and the values
// while the scores are made. A warp has 16 rows; at head dimension 512 two warps share them, each
// with half of the depth of the scores, which they add up, and half of the output's columns.
#pragma once

#include <cmath>

#include "block_attention/cuda/attention.h"
#include "common/ceil_divide.h"
#include "cuda/limits.h"
#include "device/cp_async.h"
#include "device/launch.h"
#include "device/ldmatrix.h"
#include "device/math.h"
#include "device/mma.h"
#include "device/shared_memory.h"
#include "device/warp.h"

namespace dgemma {
namespace {

using device::bfloat16;

constexpr float kLog2E = 1.44269504088896341f;

template <int kHeadDim>
struct Tile {
  static constexpr int kHalves = kHeadDim == 512 ? 2 : 1;
  static constexpr int kRows = kHeadDim == 512 ? 32 : 64;
  static constexpr int kKeys = kHeadDim >= 256 ? 32 : 64;
  static constexpr int kDepth = kHeadDim / kHalves;  // of a warp: of the scores, and columns
  // 16 bytes beyond a row, so that ldmatrix reads eight rows without bank conflicts.
  static constexpr int kStride = kHeadDim + 8;
  static constexpr int kPieces = kHeadDim / 8;  // of 16 bytes, in a row
};

template <int kHeadDim>
struct Shared {
  using T = Tile<kHeadDim>;
  alignas(16) bfloat16 query[T::kRows][T::kStride];
  alignas(16) bfloat16 key[T::kKeys][T::kStride];  // and, between two tiles, scores to be added
  alignas(16) bfloat16 value[T::kKeys][T::kStride];
  int32_t first[T::kRows], end[T::kRows];  // what each row sees
};

// The coordinates of this block.
struct BlockCoordinates {
  int32_t request, head, row_tile, split;
};

// This block goes over the positions from `first` to before `end`, by tiles of keys.
struct KeyRange {
  int32_t first, end, tiles;
};

// Copies the query rows of the tile; rows past the last become zero.
template <int kHeadDim>
DGEMMA_DEVICE void copy_queries(const Attention& p, const AttentionRequest& request,
                                const BlockCoordinates& at, Shared<kHeadDim>& shared) {
  using T = Tile<kHeadDim>;
  const int32_t group = p.query_heads / p.key_heads;
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < T::kRows * T::kPieces;
       i += kAttentionThreads) {
    const int32_t row = i / T::kPieces, piece = i % T::kPieces;
    const int32_t packed = at.row_tile * T::kRows + row;
    const bool there = packed < request.rows * group;
    const int64_t query = first_row_of(p, at.request) + packed / group;
    const int64_t from = (query * p.query_heads + at.head * group + packed % group) * kHeadDim;
    device::cp_async_16(&shared.query[row][8 * piece], p.query + (there ? from + 8 * piece : 0),
                        there ? 16 : 0);
  }
}

// The first of a key's or value's elements, of key head `at.head`; null for a page that does not
// exist.
template <bool kPaged>
DGEMMA_DEVICE const bfloat16* find_key(const Attention& p, const KeyStorage& storage,
                                       const AttentionRequest& request, const BlockCoordinates& at,
                                       int32_t position) {
  if constexpr (kPaged) {
    const int64_t element = element_in_page(p, storage, at.request, position);
    return element >= 0 ? storage.stored + element + at.head * storage.head_stride : nullptr;
  }
  const int64_t head = at.head * storage.head_stride;
  if (position < request.prefix)
    return storage.stored + element_in_slot(p, storage, request, position) + head;
  const int64_t row =
      static_cast<int64_t>(at.request) * p.block_length + (position - request.prefix);
  return storage.block + row * storage.row_stride + head;
}

// Copies a tile of keys or of values; positions past the end become zero, and are not read.
template <int kHeadDim, bool kPaged>
DGEMMA_DEVICE void copy_keys(const Attention& p, const AttentionRequest& request,
                             const BlockCoordinates& at, const KeyStorage& storage, int32_t first,
                             int32_t end,
                             bfloat16 (&to)[Tile<kHeadDim>::kKeys][Tile<kHeadDim>::kStride]) {
  using T = Tile<kHeadDim>;
#pragma unroll
  for (int32_t i = 0; i < T::kKeys * T::kPieces / kAttentionThreads; ++i) {
    const int32_t index = static_cast<int32_t>(threadIdx.x) + i * kAttentionThreads;
    const int32_t row = index / T::kPieces, piece = index % T::kPieces;
    const int32_t position = first + row;
    const bfloat16* const from =
        position < end ? find_key<kPaged>(p, storage, request, at, position) : nullptr;
    // A copy of no bytes has an address too.
    device::cp_async_16(&to[row][8 * piece], from != nullptr ? from + 8 * piece : p.query,
                        from != nullptr ? 16 : 0);
  }
}

// One warp of the block.
template <int kHeadDim>
class Warp {
  using T = Tile<kHeadDim>;

 public:
  DGEMMA_DEVICE explicit Warp(Shared<kHeadDim>& shared) : shared_(shared) {
    const int32_t warp = static_cast<int32_t>(device::warp_index());
    lane_ = static_cast<int32_t>(device::lane_index());
    row_ = 16 * (warp / T::kHalves);
    half_ = warp % T::kHalves;
  }

  // The rows whose scores this thread has: lane / 4, and eight below it.
  DGEMMA_DEVICE int32_t row(int which) const { return row_ + lane_ / 4 + 8 * which; }
  // The first of the two columns of eight that it has, counted over the whole head.
  DGEMMA_DEVICE int32_t column(int eight) const {
    return half_ * T::kDepth + 8 * eight + 2 * (lane_ % 4);
  }
  DGEMMA_DEVICE bool writes_sums() const { return half_ == 0 && lane_ % 4 == 0; }

  // scores = query . key over this warp's half of the depth.
  DGEMMA_DEVICE void multiply_keys() {
#pragma unroll
    for (int i = 0; i < T::kKeys / 8; ++i)
      for (int j = 0; j < 4; ++j) scores_[i][j] = 0.0f;
#pragma unroll 4
    for (int32_t k = 0; k < T::kDepth; k += 16) {
      const int32_t depth = half_ * T::kDepth + k;
      uint32_t a[4];
      device::load_tiles(a, &shared_.query[row_ + lane_ % 16][depth + lane_ / 16 * 8]);
#pragma unroll
      for (int32_t key = 0; key < T::kKeys; key += 16) {
        uint32_t b[4];
        device::load_tiles(
            b, &shared_.key[key + lane_ / 16 * 8 + lane_ % 8][depth + lane_ / 8 % 2 * 8]);
        const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
        device::mma_m16n8k16(scores_[key / 8], a, low);
        device::mma_m16n8k16(scores_[key / 8 + 1], a, high);
      }
    }
  }

  // Adds the other half's scores, in the same order in both warps. The block has done with its
  // keys.
  DGEMMA_DEVICE void add_other_half() {
    float* const place = reinterpret_cast<float*>(shared_.key);
    constexpr int32_t kFragment = 32 * T::kKeys / 2;  // floats of a warp
    const int32_t pair = row_ / 16 * 2;
#pragma unroll
    for (int i = 0; i < T::kKeys / 2; ++i)
      place[(pair + half_) * kFragment + 32 * i + lane_] = scores_[i / 4][i % 4];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < T::kKeys / 2; ++i)
      scores_[i / 4][i % 4] =
          place[pair * kFragment + 32 * i + lane_] + place[(pair + 1) * kFragment + 32 * i + lane_];
    __syncthreads();
  }

  // Replaces the scores by exp2(score - the row's maximum so far), and rescales what was summed
  // before to that maximum. `first` is the position of the tile's first key.
  DGEMMA_DEVICE void exponentiate(float scale, int32_t first) {
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      const int32_t from = shared_.first[row(which)], end = shared_.end[row(which)];
      float largest = -INFINITY;
#pragma unroll
      for (int i = 0; i < T::kKeys / 4; ++i) {
        float& score = scores_[i / 2][2 * which + i % 2];
        const int32_t position = first + 8 * (i / 2) + 2 * (lane_ % 4) + i % 2;
        score = position >= from && position < end ? score * scale : -INFINITY;
        largest = fmaxf(largest, score);
      }
      largest = fmaxf(largest, __shfl_xor_sync(device::kAllLanes, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(device::kAllLanes, largest, 2));
      const float before = max_[which], now = fmaxf(before, largest);
      // A row that has seen no key yet keeps a sum of zero.
      const float reference = now > -INFINITY ? now : 0.0f;
      const float factor = device::exp2_approximate(before - reference);
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < T::kKeys / 4; ++i) {
        float& score = scores_[i / 2][2 * which + i % 2];
        score = device::exp2_approximate(score - reference);
        sum += score;
      }
      max_[which] = now;
      sum_[which] = sum_[which] * factor + sum;
#pragma unroll
      for (int i = 0; i < T::kDepth / 8; ++i) {
        output_[i][2 * which] *= factor;
        output_[i][2 * which + 1] *= factor;
      }
    }
  }

  // output += exponentials . values over this warp's columns.
  DGEMMA_DEVICE void multiply_values() {
#pragma unroll
    for (int32_t key = 0; key < T::kKeys; key += 16) {
      const float (&low_scores)[4] = scores_[key / 8], (&high_scores)[4] = scores_[key / 8 + 1];
      const uint32_t a[4] = {device::pack_bfloat16(low_scores[0], low_scores[1]),
                             device::pack_bfloat16(low_scores[2], low_scores[3]),
                             device::pack_bfloat16(high_scores[0], high_scores[1]),
                             device::pack_bfloat16(high_scores[2], high_scores[3])};
#pragma unroll
      for (int32_t c = 0; c < T::kDepth; c += 16) {
        uint32_t b[4];
        device::load_tiles_transposed(
            b, &shared_.value[key + lane_ % 16][half_ * T::kDepth + c + lane_ / 16 * 8]);
        const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
        device::mma_m16n8k16(output_[c / 8], a, low);
        device::mma_m16n8k16(output_[c / 8 + 1], a, high);
      }
    }
  }

  // Sums of the four threads of a row.
  DGEMMA_DEVICE void finish_sums() {
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      sum_[which] += __shfl_xor_sync(device::kAllLanes, sum_[which], 1);
      sum_[which] += __shfl_xor_sync(device::kAllLanes, sum_[which], 2);
    }
  }

  DGEMMA_DEVICE float max(int which) const { return max_[which]; }
  DGEMMA_DEVICE float sum(int which) const { return sum_[which]; }
  DGEMMA_DEVICE const float (&output(int eight) const)[4] { return output_[eight]; }

 private:
  Shared<kHeadDim>& shared_;
  int32_t lane_, row_, half_;
  float scores_[T::kKeys / 8][4];
  float output_[T::kDepth / 8][4] = {};
  float max_[2] = {-INFINITY, -INFINITY};
  float sum_[2] = {};
};

// Finds the keys that every row of the tile sees, and the part of them that this block goes over.
template <int kHeadDim>
DGEMMA_DEVICE KeyRange find_keys(const Attention& p, const AttentionRequest& request,
                                 const BlockCoordinates& at, Shared<kHeadDim>& shared) {
  using T = Tile<kHeadDim>;
  const int32_t group = p.query_heads / p.key_heads;
  const int32_t thread = static_cast<int32_t>(threadIdx.x);
  if (thread < T::kRows) {
    const int32_t packed = at.row_tile * T::kRows + thread;
    VisibleKeys keys = {INT32_MAX, 0};
    if (packed < request.rows * group) keys = visible_keys(p, request, at.request, packed / group);
    shared.first[thread] = keys.first;
    shared.end[thread] = keys.end;
  }
  __syncthreads();
  const int32_t lane = static_cast<int32_t>(device::lane_index());
  const int32_t other = lane + T::kRows - 32;  // the same row, or one of the other 32
  const int32_t first =
      __reduce_min_sync(device::kAllLanes, min(shared.first[lane], shared.first[other]));
  const int32_t end =
      __reduce_max_sync(device::kAllLanes, max(shared.end[lane], shared.end[other]));
  const int32_t tiles = (end - first + T::kKeys - 1) / T::kKeys;
  const int32_t each = ceil_divide(tiles, request.splits);
  const int32_t begin = min(at.split * each, tiles);
  return {first + begin * T::kKeys, end, min(each, tiles - begin)};
}

// Writes the tile's rows: the output itself, or this split's part of it.
template <int kHeadDim>
DGEMMA_DEVICE void store(const Attention& p, const AttentionRequest& request,
                         const BlockCoordinates& at, const Warp<kHeadDim>& warp) {
  using T = Tile<kHeadDim>;
  const int32_t group = p.query_heads / p.key_heads;
  const int64_t tile =
      at.request * p.partial_tiles +
      (static_cast<int64_t>(at.head) * request.row_tiles + at.row_tile) * request.splits + at.split;
#pragma unroll
  for (int which = 0; which < 2; ++which) {
    const int32_t row = warp.row(which), packed = at.row_tile * T::kRows + row;
    if (packed >= request.rows * group) continue;
    if (request.splits > 1) {
      const int64_t to = tile * T::kRows + row;
      if (warp.writes_sums())
        *reinterpret_cast<float2*>(p.sums + 2 * to) = {warp.max(which), warp.sum(which)};
#pragma unroll
      for (int i = 0; i < T::kDepth / 8; ++i)
        *reinterpret_cast<float2*>(p.partial + to * kHeadDim + warp.column(i)) = {
            warp.output(i)[2 * which], warp.output(i)[2 * which + 1]};
      continue;
    }
    const int64_t query = first_row_of(p, at.request) + packed / group;
    bfloat16* const out =
        p.output + (query * p.query_heads + at.head * group + packed % group) * kHeadDim;
    const float factor = 1.0f / warp.sum(which);
#pragma unroll
    for (int i = 0; i < T::kDepth / 8; ++i)
      *reinterpret_cast<uint32_t*>(out + warp.column(i)) = device::pack_bfloat16(
          warp.output(i)[2 * which] * factor, warp.output(i)[2 * which + 1] * factor);
  }
}

template <int kHeadDim, bool kPaged>
__global__ void __launch_bounds__(kAttentionThreads, 1) attention(const Attention p) {
  using T = Tile<kHeadDim>;
  device::wait_for_previous_kernel();
  device::let_next_kernel_begin();
  const BlockCoordinates at = {.request = static_cast<int32_t>(blockIdx.z),
                               .head = static_cast<int32_t>(blockIdx.y) / p.most_splits,
                               .row_tile = static_cast<int32_t>(blockIdx.x),
                               .split = static_cast<int32_t>(blockIdx.y) % p.most_splits};
  const AttentionRequest request = find_request(p, at.request);
  if (at.row_tile >= request.row_tiles || at.split >= request.splits) return;
  Shared<kHeadDim>& shared = device::shared_memory<Shared<kHeadDim>>();
  const KeyRange keys = find_keys(p, request, at, shared);
  const auto start_keys = [&](int32_t tile) {
    copy_keys<kHeadDim, kPaged>(p, request, at, p.keys, keys.first + tile * T::kKeys, keys.end,
                                shared.key);
  };

  Warp<kHeadDim> warp(shared);
  if (keys.tiles > 0) {
    copy_queries(p, request, at, shared);
    start_keys(0);
  }
  device::cp_async_commit();
  for (int32_t tile = 0; tile < keys.tiles; ++tile) {
    const int32_t first = keys.first + tile * T::kKeys;
    device::cp_async_wait<0>();
    // The keys are visible to all, and no warp still uses the previous values.
    __syncthreads();
    copy_keys<kHeadDim, kPaged>(p, request, at, p.values, first, keys.end, shared.value);
    device::cp_async_commit();
    warp.multiply_keys();
    __syncthreads();
    if constexpr (T::kHalves == 2) warp.add_other_half();
    if (tile + 1 < keys.tiles) start_keys(tile + 1);
    device::cp_async_commit();
    warp.exponentiate(p.scale * kLog2E, first);
    device::cp_async_wait<1>();
    __syncthreads();
    warp.multiply_values();
  }
  warp.finish_sums();
  store(p, request, at, warp);
}

template <int kHeadDim, bool kPaged>
const char* launch(const AttentionPlan& plan, const Attention& p, int32_t batch, void* stream) {
  using T = Tile<kHeadDim>;
  static_assert(sizeof(Shared<kHeadDim>) ==
                attention_shared_bytes_80(kHeadDim, T::kRows, T::kKeys));
  static_assert(sizeof(Shared<kHeadDim>) <= kSharedLimit80);
  const device::LaunchShape shape = {
      .grid = dim3(static_cast<unsigned>(plan.row_tiles),
                   static_cast<unsigned>(p.key_heads * plan.splits), static_cast<unsigned>(batch)),
      .threads = kAttentionThreads,
      .shared_bytes = sizeof(Shared<kHeadDim>),
      .overlaps_previous_kernel = true,
      .blocks_at_once = static_cast<uint32_t>(plan.blocks_at_once)};
  return device::launch(shape, stream, attention<kHeadDim, kPaged>, p);
}

template <bool kPaged>
const char* launch_for_head_dim(const AttentionPlan& plan, const Attention& p, int32_t batch,
                                void* stream) {
  switch (p.head_dim) {
    case 16:
      return launch<16, kPaged>(plan, p, batch, stream);
    case 32:
      return launch<32, kPaged>(plan, p, batch, stream);
    case 64:
      return launch<64, kPaged>(plan, p, batch, stream);
    case 128:
      return launch<128, kPaged>(plan, p, batch, stream);
    case 256:
      return launch<256, kPaged>(plan, p, batch, stream);
    default:
      return launch<512, kPaged>(plan, p, batch, stream);
  }
}

}  // namespace
}  // namespace dgemma
