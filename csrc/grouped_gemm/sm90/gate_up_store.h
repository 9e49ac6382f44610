// The epilogue of gate and up in the sm90 kernels: their products become rows of h.
//
// A weight tile is 64 gate rows and the 64 up rows that belong to them, eight of the one and eight
// of the other in turn, so that both products of a result are in one thread: row l / 4 of a warp's
// 16 is gate's, row l / 4 + 8 up's.
#pragma once

#include "device/ldmatrix.h"
#include "grouped_gemm/cuda/gelu.h"
#include "grouped_gemm/sm90/bf16_pipeline.h"

namespace dgemma::moe_sm90 {

constexpr int32_t kColumns = kMoeWeightRows / 2;      // of h, per weight tile
constexpr uint32_t kWarpgroupColumns = kColumns / 2;  // 32: 64 bytes, four pieces of 16
constexpr uint32_t kPiecesOfResult = kWarpgroupColumns / 8;

// One tile for each warpgroup, swizzled.
template <int kTokens>
struct Results {
  alignas(1024) bfloat16 tile[2][kTokens][kWarpgroupColumns];
};

// The address of a piece of a token's results in the tile.
DGEMMA_DEVICE char* result_piece(bfloat16 (*tile)[kWarpgroupColumns], uint32_t token,
                                 uint32_t piece) {
  const uint32_t offset = (token * kPiecesOfResult + piece) * 16;
  return reinterpret_cast<char*>(tile) + device::swizzled(offset, Swizzle::bytes_64);
}

// Stores a warp's results of kN tokens to its eight columns of the tile, 16 tokens at a time and
// then eight; zeros where the thread's are not `there`.
template <int kN>
DGEMMA_DEVICE void store_tile(const float (&sum)[kN / 2], bfloat16 (*tile)[kWarpgroupColumns],
                              bool there = true) {
  const uint32_t lane = device::lane_index(), warp = device::warp_index() % 4;
  const auto results = [&](int eight) {
    const float* d = sum + 4 * eight;
    const uint32_t h = device::pack_bfloat16(gelu_tanh(d[0]) * d[2], gelu_tanh(d[1]) * d[3]);
    return there ? h : 0;
  };
#pragma unroll
  for (int j = 0; j + 1 < kN / 8; j += 2) {
    const uint32_t h[2] = {results(j), results(j + 1)};
    device::store_tiles_transposed(result_piece(tile, 8 * j + lane % 16, warp), h);
  }
  if constexpr (kN / 8 % 2 == 1) {
    const uint32_t h[1] = {results(kN / 8 - 1)};
    device::store_tiles_transposed(result_piece(tile, kN - 8 + lane % 8, warp), h);
  }
}

// The results go through shared memory, so that four threads write 64 bytes of a row together.
template <int kN>
DGEMMA_DEVICE void store_results(const MoeWorkTile& work_tile, const float (&sum)[kN / 2],
                                 bfloat16 (*tile)[kWarpgroupColumns], int32_t expert_size,
                                 bfloat16* activations) {
  sync_warpgroup();  // the last work tile's results have been read
  store_tile<kN>(sum, tile);
  sync_warpgroup();
  const uint32_t thread = threadIdx.x % 128, piece = thread % kPiecesOfResult;
  const int32_t column =
      work_tile.weight_tile * kColumns +
      static_cast<int32_t>(device::warpgroup_index() * kWarpgroupColumns + piece * 8);
  if (column >= expert_size) return;
  for (uint32_t token = thread / kPiecesOfResult; token < static_cast<uint32_t>(work_tile.rows);
       token += 128 / kPiecesOfResult) {
    bfloat16* row = activations + (work_tile.first + static_cast<int64_t>(token)) * expert_size;
    *reinterpret_cast<uint4*>(row + column) =
        *reinterpret_cast<const uint4*>(result_piece(tile, token, piece));
  }
}

}  // namespace dgemma::moe_sm90
