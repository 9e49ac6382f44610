// What the sm90 kernels of down share beside the pipeline: the tables in shared memory, and the
// epilogue.
#pragma once

#include "grouped_gemm/sm90/bf16_pipeline.h"

namespace dgemma::moe_sm90 {

// Where experts begin (cuda/moe_work_tiles.h). A search goes through them in seven steps, each of
// which waits for the one before.
struct TileTables {
  int32_t first[kMoeMostExperts + 1], tiles_before[kMoeMostExperts + 1];
};

// All threads call this after wait_for_previous_kernel(), and __syncthreads() before the scheduler
// that it gives is used.
DGEMMA_DEVICE MoeTileScheduler load_tables(MoeTileScheduler scheduler, TileTables& to) {
  MoeTables& tables = scheduler.tables;
  for (int32_t e = static_cast<int32_t>(threadIdx.x); e <= tables.experts; e += kMoeThreads) {
    to.first[e] = tables.first[e];
    to.tiles_before[e] = tables.tiles_before[e];
  }
  tables.first = to.first;
  tables.tiles_before = to.tiles_before;
  return scheduler;
}

// The place of a column of the product, and the weight that it is multiplied by.
struct Target {
  int32_t pair;
  float weight;
};

// Called for new pairs alone, and before the products are waited for. weight_of(pair, its sorted
// position) gives the weight of a pair.
template <typename WeightOf>
DGEMMA_DEVICE void load_targets(const MoeTables& tables, const MoeWorkTile& work_tile,
                                Target* target, WeightOf weight_of) {
  sync_warpgroup();  // those before have been used
  for (int32_t i = static_cast<int32_t>(threadIdx.x % 128); i < work_tile.rows; i += 128) {
    const int32_t pair = tables.pair[work_tile.first + i];
    target[i] = {pair, weight_of(pair, work_tile.first + i)};
  }
  sync_warpgroup();
}

// Eight lanes write 32 bytes of a row, a sector of the L2; a lane has two tokens of each eight.
template <int kN>
DGEMMA_DEVICE void store_products(const MoeWorkTile& work_tile, const float (&sum)[kN / 2],
                                  const Target* target, int32_t hidden_size, float* products) {
  const int32_t lane = static_cast<int32_t>(device::lane_index());
  const int32_t row = work_tile.weight_tile * kMoeWeightRows +
                      static_cast<int32_t>(device::warp_index()) * 16 + lane / 4;
#pragma unroll
  for (int i = 0; i < kN / 4; ++i) {
    const int32_t token = 8 * (i / 2) + 2 * (lane % 4) + i % 2;
    if (token >= work_tile.rows) continue;
    const Target to = target[token];
    float* out = products + static_cast<int64_t>(to.pair) * hidden_size + row;
    const int d = 4 * (i / 2) + i % 2;
    if (row < hidden_size) out[0] = to.weight * sum[d];
    if (row + 8 < hidden_size) out[8] = to.weight * sum[d + 2];
  }
}

}  // namespace dgemma::moe_sm90
