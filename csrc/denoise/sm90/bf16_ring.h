// The pipeline of the two products of the vocabulary on sm_90: a ring of stages in shared memory,
// filled by TMA for two blocks at a time and multiplied by two warpgroups.
//
// The embedding is wgmma's A, 128 of its rows or columns to a tile and 64 to a warpgroup; the
// canvas's rows are its B, so that all of them meet a tile of the embedding that is read once, and
// a short canvas costs less. The two blocks of a cluster have tiles side by side and the same
// canvas rows: each loads its own tile and a half of the rows, which TMA writes to both. Without
// that the rows, larger than the tile, would be most of what comes out of the L2.
//
// A stage is 64 deep. It is full when all its bytes have landed, of the other block's copy too, and
// empty when the consumer warps of both blocks have done with it, since either block's copy writes
// to both.
#pragma once

#include "cuda/sm90_pipeline.h"
#include "device/bfloat16.h"
#include "device/cluster.h"
#include "device/fence.h"
#include "device/mbarrier.h"
#include "device/swizzle.h"
#include "device/tma.h"
#include "device/warp.h"
#include "device/wgmma.h"

namespace dgemma::vocabulary_sm90 {

using device::bfloat16;
using device::Major;
using device::Swizzle;

constexpr uint32_t kClusterBlocks = 2;
constexpr uint16_t kBothBlocks = 0b11;
constexpr int32_t kTileRows = 128;      // of the embedding's tile: two warpgroups
constexpr int32_t kWarpgroupRows = 64;  // wgmma's M
constexpr int32_t kStageDepth = 64;     // 128 bytes, a line of the widest swizzle
using sm90::kConsumerWarps;

constexpr uint32_t stage_bytes(int32_t rows) {
  return static_cast<uint32_t>((kTileRows + rows) * kStageDepth) * sizeof(bfloat16);
}
// Counts the stages that there is room for beside `other` bytes and 256 of barriers, all rounded up
// to the alignment of 1 KB.
constexpr uint32_t stages_beside(uint32_t other, int32_t rows) {
  return (kSharedLimit90 - 256 - other) / stage_bytes(rows);
}

// The stages for kRows canvas rows; `extra` is what else a kernel keeps.
template <int kRows, typename Extra>
struct Ring {
  static constexpr uint32_t kStages = stages_beside(sizeof(Extra), kRows);
  using State = sm90::PipelineState<kStages>;
  struct Stage {
    // One tile for each warpgroup. k-major: a line is 64 of depth, one for each row; m-major: a
    // line is the 64 rows, one for each of depth. Swizzled, as the rows are.
    alignas(1024) bfloat16 embedding[2][kWarpgroupRows][kStageDepth];
    alignas(1024) bfloat16 rows[kRows][kStageDepth];
  };
  static_assert(sizeof(Stage) == stage_bytes(kRows));

  Stage stage[kStages];
  sm90::Pipeline<kStages> pipeline;
  Extra extra;
};

// One thread calls this; a fence_mbarrier_init and a cluster_sync follow.
template <typename Ring>
DGEMMA_DEVICE void initialise(Ring& ring) {
  ring.pipeline.initialise(1, kClusterBlocks * kConsumerWarps);
}

// One thread calls this. It fills the next stage: load(stage, full barrier) starts the copies of
// this block's embedding tile; the rows come from (depth, row, request) of their map.
template <int kRows, typename Extra, typename Load>
DGEMMA_DEVICE void fill(Ring<kRows, Extra>& ring, typename Ring<kRows, Extra>::State& at,
                        const device::TensorMap* rows, int32_t depth, int32_t row, int32_t request,
                        device::CachePolicy row_policy, Load load) {
  constexpr int32_t kHalf = kRows / static_cast<int32_t>(kClusterBlocks);
  auto& stage = ring.stage[at.stage];
  device::Mbarrier* const full = ring.pipeline.producer_acquire(at);
  device::mbarrier_arrive_expect_bytes(full, sizeof stage);
  load(stage, full);
  const int32_t first = static_cast<int32_t>(device::cluster_block_rank()) * kHalf;
  device::tma_load_multicast(stage.rows[first], rows, full, row_policy, kBothBlocks, depth,
                             row + first, request);
  at.advance();
}

// The product of `steps` stages, at least one: of the warpgroup's 64 embedding rows and the canvas
// rows (see device/wgmma.h for what a thread has of it). `sum` need not be set: where it was, ptxas
// put the zeros between the instructions of the first group, and a wait behind each of them.
template <Major kMajor, int kRows, typename Extra>
DGEMMA_DEVICE void multiply(Ring<kRows, Extra>& ring, typename Ring<kRows, Extra>::State& at,
                            int32_t steps, float (&sum)[kRows / 2]) {
  // 16 of depth, wgmma's K: within a line, or as many lines.
  constexpr uint32_t kAlongLine = 16 * sizeof(bfloat16);
  constexpr uint32_t kNext = kMajor == Major::k ? kAlongLine : 16 * kStageDepth * sizeof(bfloat16);
  typename Ring<kRows, Extra>::State previous = at;
  for (int32_t step = 0; step < steps; ++step) {
    const auto& stage = ring.stage[at.stage];
    ring.pipeline.consumer_wait(at);
    // One period of the swizzle holds eight lines, in both orders; a warpgroup's rows are one line
    // where they run along it, so that the leading offset is not used.
    const auto a =
        device::k_major_descriptor(stage.embedding[device::warpgroup_index()], Swizzle::bytes_128);
    const auto b = device::k_major_descriptor(stage.rows, Swizzle::bytes_128);
    device::wgmma_fence(sum);
#pragma unroll
    for (uint32_t k = 0; k < kStageDepth / 16; ++k)
      device::wgmma<kRows, kMajor>(sum, device::advanced(a, k * kNext),
                                   device::advanced(b, k * kAlongLine), step > 0 || k > 0);
    device::wgmma_commit();
    // The products of the step before are done; this step's run on.
    if (step > 0) {
      device::wgmma_wait<1>();
      ring.pipeline.template consumer_release_in_cluster<kClusterBlocks>(previous);
    }
    previous = at;
    at.advance();
  }
  device::wgmma_wait<0>(sum);
  ring.pipeline.template consumer_release_in_cluster<kClusterBlocks>(previous);
}

}  // namespace dgemma::vocabulary_sm90
