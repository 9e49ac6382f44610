// Products of tiles by mma.sync, for the kernels that run on every GPU from 8.0 on: 128 rows by 128
// columns by a block of eight warps, four of them one above the other and two side by side, each
// with 32 rows and 64 columns.
//
// A stage of shared memory holds 64 values of depth of both operands, in tiles of 64 values a row:
// 128 bytes, the period of the widest swizzle. The left operand lies row by row; the right one
// either column by column (the depth contiguous) or depth by depth (the columns contiguous).
#pragma once

#include "device/bfloat16.h"
#include "device/cp_async.h"
#include "device/ldmatrix.h"
#include "device/mma.h"
#include "device/swizzle.h"
#include "device/warp.h"

namespace dgemma::sm80 {

using device::bfloat16;

constexpr int32_t kThreads = 256;
constexpr int32_t kRows = 128;
constexpr int32_t kColumns = 128;
constexpr int32_t kDepth = 64;
constexpr int32_t kPieces = kDepth * 2 / 16;  // 16-byte pieces of a tile's row
// Three stages are 98,304 bytes of kSharedLimit80.
constexpr int32_t kStages = 3;

struct Stage {
  alignas(1024) bfloat16 left[kRows][kDepth];
  // Column by column: 128 rows. Depth by depth: 64 rows of the first 64 columns, then of the
  // others.
  alignas(1024) bfloat16 right[kColumns][kDepth];
};

struct Ring {
  Stage stage[kStages];
};

// The address of a piece of a row in a tile.
DGEMMA_DEVICE char* piece_of(const void* tile, int32_t row, int32_t piece) {
  const uint32_t offset = static_cast<uint32_t>(row * kPieces + piece) * 16;
  return static_cast<char*>(const_cast<void*>(tile)) +
         device::swizzled(offset, device::Swizzle::bytes_128);
}

// Starts the copy of a tile of 128 rows, or of two of 64, by the whole block: `source(row, piece)`
// gives the address of 16 bytes, or null for zeros, where cp.async names `valid_address` and reads
// nothing of it.
template <typename Source>
DGEMMA_DEVICE void start_copy(void* tile, const void* valid_address, Source source) {
#pragma unroll
  for (int32_t i = 0; i < kRows * kPieces / kThreads; ++i) {
    const int32_t index = static_cast<int32_t>(threadIdx.x) + i * kThreads;
    const int32_t row = index / kPieces, piece = index % kPieces;
    const bfloat16* from = source(row, piece);
    device::cp_async_16(piece_of(tile, row, piece), from != nullptr ? from : valid_address,
                        from != nullptr ? 16 : 0);
  }
}

// A warp's sums: [16 rows][8 columns] in mma's order.
using Sum = float[2][8][4];

// The first of a warp's rows and columns in the block's tile.
DGEMMA_DEVICE int32_t warp_row() { return 32 * static_cast<int32_t>(device::warp_index() / 2); }
DGEMMA_DEVICE int32_t warp_column() { return 64 * static_cast<int32_t>(device::warp_index() % 2); }

// Adds a stage's product. kColumnsContiguous says how the right operand lies.
template <bool kColumnsContiguous>
DGEMMA_DEVICE void multiply(const Stage& stage, Sum& sum) {
  const int32_t lane = static_cast<int32_t>(device::lane_index());
#pragma unroll
  for (int32_t k = 0; k < kPieces; k += 2) {
    uint32_t a[2][4];
#pragma unroll
    for (int32_t tile = 0; tile < 2; ++tile)
      device::load_tiles(a[tile],
                         piece_of(stage.left, warp_row() + 16 * tile + lane % 16, k + lane / 16));
#pragma unroll
    for (int32_t group = 0; group < 4; ++group) {
      // The four tiles are both halves of k for eight columns, then for the next eight.
      uint32_t b[4];
      if constexpr (kColumnsContiguous)
        device::load_tiles_transposed(
            b, piece_of(stage.right, warp_column() + 8 * k + lane % 16, 2 * group + lane / 16));
      else
        device::load_tiles(
            b, piece_of(stage.right, warp_column() + 16 * group + lane / 16 * 8 + lane % 8,
                        k + lane / 8 % 2));
      const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
#pragma unroll
      for (int32_t tile = 0; tile < 2; ++tile) {
        device::mma_m16n8k16(sum[tile][2 * group], a[tile], low);
        device::mma_m16n8k16(sum[tile][2 * group + 1], a[tile], high);
      }
    }
  }
}

// The product over `steps` stages; start(stage, step) starts the copies of one. Afterwards the ring
// is free for other use.
template <bool kColumnsContiguous, typename Start>
DGEMMA_DEVICE void multiply_all(Ring& ring, int32_t steps, Sum& sum, Start start) {
#pragma unroll
  for (int32_t step = 0; step < kStages - 1; ++step) {
    if (step < steps) start(ring.stage[step], step);
    device::cp_async_commit();
  }
  for (int32_t step = 0; step < steps; ++step) {
    device::cp_async_wait<kStages - 2>();
    // This step's copies are visible to all, and no warp still reads the stage that is filled next.
    __syncthreads();
    const int32_t next = step + kStages - 1;
    if (next < steps) start(ring.stage[next % kStages], next);
    device::cp_async_commit();
    multiply<kColumnsContiguous>(ring.stage[step % kStages], sum);
  }
  device::cp_async_wait<0>();
  __syncthreads();
}

// Calls store(row, column, two values side by side) for every pair that this thread has.
template <typename Store>
DGEMMA_DEVICE void for_each_pair(const Sum& sum, Store store) {
  const int32_t row = warp_row() + static_cast<int32_t>(device::lane_index() / 4);
  const int32_t column = warp_column() + 2 * static_cast<int32_t>(device::lane_index() % 4);
#pragma unroll
  for (int32_t tile = 0; tile < 2; ++tile)
#pragma unroll
    for (int32_t eight = 0; eight < 8; ++eight) {
      const float (&d)[4] = sum[tile][eight];
      store(row + 16 * tile, column + 8 * eight, d[0], d[1]);
      store(row + 16 * tile + 8, column + 8 * eight, d[2], d[3]);
    }
}

}  // namespace dgemma::sm80
