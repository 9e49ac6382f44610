// The pipeline of the sm80 kernels: a ring of stages in shared memory, filled by cp.async and
// multiplied by mma.sync, by the same four warps.
//
// Weights are mma's A (16 rows), tokens its B (8 columns): a work tile is 64 weight rows by up to
// kTokens tokens, so an expert's weights are read once however few its tokens are. A stage is 64
// deep. Blocks are persistent: block b takes the work tiles b, b + gridDim.x, ..., and the copies
// run ahead from one work tile into the next, so that the ring never drains.
//
// A kernel says what its work tiles are (Scheduler: count, find, first_step, steps) and which rows
// they take of two matrices of one width (Rows: weights, tokens, width, weight_row(work_tile, row)
// or -1 where there is none, token_row(work_tile, row)).
#pragma once

#include <type_traits>

#include "device/cp_async.h"
#include "device/ldmatrix.h"
#include "device/mma.h"
#include "device/shared_memory.h"
#include "device/swizzle.h"
#include "device/warp.h"
#include "grouped_gemm/cuda/moe.h"
#include "grouped_gemm/cuda/moe_scheduler.h"

namespace dgemma::moe_sm80 {

using device::bfloat16;

// 16-byte pieces of a row in a stage, and the rows that the block's threads copy at once.
constexpr int32_t kPieces = kMoeDepth * static_cast<int32_t>(sizeof(bfloat16)) / 16;
constexpr int32_t kRowsAtOnce = kMoeThreads80 / kPieces;
// Warps stand two by two: a row of them has 32 weight rows, a column every other 16 tokens.
constexpr int32_t kRowTiles = kMoeWeightRows80 / 16 / 2;
template <int kTokens>
constexpr int kGroups = kTokens / 16 / 2;
template <int kN, int kTokens>
constexpr int at_most = kN < kGroups<kTokens> ? kN : kGroups<kTokens>;

template <int kTokens>
struct Stage {
  alignas(1024) bfloat16 weights[kMoeWeightRows80][kMoeDepth];  // rows of 128 bytes, swizzled
  alignas(1024) bfloat16 tokens[kTokens][kMoeDepth];            // likewise
};
template <int kTokens>
struct Ring {
  static constexpr int32_t kStages = moe_stages_80(kTokens);
  Stage<kTokens> stage[kStages];
};
static_assert(sizeof(Ring<128>) <= kSharedLimit80);

// The address of a piece of a row in a tile.
DGEMMA_DEVICE char* piece_of(const void* tile, int32_t row, int32_t piece) {
  const uint32_t offset = static_cast<uint32_t>(row * kPieces + piece) * 16;
  return static_cast<char*>(const_cast<void*>(tile)) +
         device::swizzled(offset, device::Swizzle::bytes_128);
}

// A thread's share of the copies: one piece of every 16th row, stage after stage, work tile after
// work tile.
template <int kTokens, typename Scheduler, typename Rows>
struct Loader {
  using Unit = decltype(Scheduler().find(kTokens, 0));

  Ring<kTokens>& ring;
  const Scheduler& scheduler;
  const Rows& rows;
  const int32_t work_tiles;
  int32_t index;           // of the work tile
  int32_t step, end_step;  // of the work tile
  int32_t stage = 0;
  int32_t weight_row[kMoeWeightRows80 / kRowsAtOnce];  // -1: none
  int32_t token_row[kTokens / kRowsAtOnce];

  DGEMMA_DEVICE Loader(Ring<kTokens>& ring, const Scheduler& scheduler, const Rows& rows)
      : ring(ring),
        scheduler(scheduler),
        rows(rows),
        work_tiles(scheduler.count()),
        index(static_cast<int32_t>(blockIdx.x)) {
    begin_work_tile();
  }

  DGEMMA_DEVICE void begin_work_tile() {
    if (index >= work_tiles) return;
    const Unit work_tile = scheduler.find(kTokens, index);
    const int32_t row = static_cast<int32_t>(threadIdx.x) / kPieces;
    step = scheduler.first_step(work_tile);
    end_step = step + scheduler.steps(work_tile);
#pragma unroll
    for (int i = 0; i < kMoeWeightRows80 / kRowsAtOnce; ++i)
      weight_row[i] = rows.weight_row(work_tile, row + i * kRowsAtOnce);
#pragma unroll
    for (int i = 0; i < kTokens / kRowsAtOnce; ++i) {
      const int32_t at = row + i * kRowsAtOnce;
      token_row[i] = at < work_tile.rows ? rows.token_row(work_tile, at) : -1;
    }
  }

  // Starts the copies of the next stage. What lies past the last column or weight row becomes zero.
  // Rows past the work tile's tokens are left as they are: a product's columns do not mix, and
  // those are not stored. When no work is left the group is empty, so that there are as many groups
  // as stages.
  DGEMMA_DEVICE void start() {
    if (index < work_tiles) {
      const int32_t row = static_cast<int32_t>(threadIdx.x) / kPieces;
      const int32_t piece = static_cast<int32_t>(threadIdx.x) % kPieces;
      const int32_t column = step * kMoeDepth + piece * 8;
      const bool inside = column < rows.width;
      auto& to = ring.stage[stage];
#pragma unroll
      for (int i = 0; i < kMoeWeightRows80 / kRowsAtOnce; ++i) {
        const bool there = inside && weight_row[i] >= 0;
        const int64_t from = static_cast<int64_t>(weight_row[i]) * rows.width + column;
        device::cp_async_16(piece_of(to.weights, row + i * kRowsAtOnce, piece),
                            rows.weights + (there ? from : 0), there ? 16 : 0);
      }
#pragma unroll
      for (int i = 0; i < kTokens / kRowsAtOnce; ++i) {
        if (token_row[i] < 0) continue;
        const int64_t from = static_cast<int64_t>(token_row[i]) * rows.width + column;
        device::cp_async_16(piece_of(to.tokens, row + i * kRowsAtOnce, piece),
                            rows.tokens + (inside ? from : 0), inside ? 16 : 0);
      }
      stage = stage + 1 < Ring<kTokens>::kStages ? stage + 1 : 0;
      if (++step == end_step) {
        index += static_cast<int32_t>(gridDim.x);
        begin_work_tile();
      }
    }
    device::cp_async_commit();
  }
};

// The products of a warp: [row tile][group of 16 tokens][8 tokens of it][mma's accumulators].
template <int kColumns>
using Sum = float[kRowTiles][kColumns][2][4];

DGEMMA_DEVICE int32_t warp_row() { return static_cast<int32_t>(device::warp_index() / 2); }
DGEMMA_DEVICE int32_t warp_column() { return static_cast<int32_t>(device::warp_index() % 2); }
// The first of a work tile's weight rows in a row tile, and of its tokens in 8 of a group.
DGEMMA_DEVICE int32_t first_row(int tile) { return 32 * warp_row() + 16 * tile; }
DGEMMA_DEVICE int32_t first_token(int group, int half) {
  return 16 * (warp_column() + 2 * group) + 8 * half;
}

template <int kColumns, int kTokens>
DGEMMA_DEVICE void multiply_stage(const Stage<kTokens>& stage, Sum<kColumns>& sum) {
  const int32_t lane = static_cast<int32_t>(device::lane_index());
#pragma unroll
  for (int k = 0; k < kPieces; k += 2) {
    uint32_t a[kRowTiles][4];
#pragma unroll
    for (int tile = 0; tile < kRowTiles; ++tile)
      device::load_tiles(a[tile],
                         piece_of(stage.weights, first_row(tile) + lane % 16, k + lane / 16));
#pragma unroll
    for (int group = 0; group < kColumns; ++group) {
      // The four tiles are both halves of k for the first eight tokens, then for the next eight.
      uint32_t b[4];
      device::load_tiles(
          b, piece_of(stage.tokens, first_token(group, lane / 16) + lane % 8, k + lane / 8 % 2));
      const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
#pragma unroll
      for (int tile = 0; tile < kRowTiles; ++tile) {
        device::mma_m16n8k16(sum[tile][group][0], a[tile], low);
        device::mma_m16n8k16(sum[tile][group][1], a[tile], high);
      }
    }
  }
}

template <int kTokens, typename Scheduler, typename Rows>
struct Pipeline {
  static constexpr int32_t kStages = Ring<kTokens>::kStages;

  Loader<kTokens, Scheduler, Rows> loader;
  int32_t stage = 0;

  DGEMMA_DEVICE Pipeline(Ring<kTokens>& ring, const Scheduler& scheduler, const Rows& rows)
      : loader(ring, scheduler, rows) {
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) loader.start();
  }

  // Adds the products of the next `steps` stages.
  template <int kColumns>
  DGEMMA_DEVICE void multiply(int32_t steps, Sum<kColumns>& sum) {
    for (int32_t i = 0; i < steps; ++i) {
      device::cp_async_wait<kStages - 2>();
      // This step's copies are visible to all, and no warp still reads the stage that is filled
      // next.
      __syncthreads();
      loader.start();
      multiply_stage<kColumns>(loader.ring.stage[stage], sum);
      stage = stage + 1 < kStages ? stage + 1 : 0;
    }
  }

  // Calls consume(integral constant, work_tile) for every work tile of this block: how many groups
  // of 16 tokens each warp multiplies, enough for the work tile's rows.
  template <typename Consume>
  DGEMMA_DEVICE void for_each_work_tile(Consume consume) {
    for (int32_t index = static_cast<int32_t>(blockIdx.x); index < loader.work_tiles;
         index += static_cast<int32_t>(gridDim.x)) {
      const auto work_tile = loader.scheduler.find(kTokens, index);
      const int32_t columns = (work_tile.rows + 31) / 32;
      if (columns <= 1)
        consume(std::integral_constant<int, 1>(), work_tile);
      else if (kGroups<kTokens> >= 2 && columns == 2)
        consume(std::integral_constant<int, at_most<2, kTokens>>(), work_tile);
      else if (kGroups<kTokens> >= 4 && columns == 3)
        consume(std::integral_constant<int, at_most<3, kTokens>>(), work_tile);
      else
        consume(std::integral_constant<int, kGroups<kTokens>>(), work_tile);
    }
  }
};

}  // namespace dgemma::moe_sm80
