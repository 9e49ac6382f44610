// The pipeline of the sm90 kernels: a ring of stages in shared memory, filled by one warpgroup and
// multiplied by two.
//
// Weights are wgmma's A, tokens its B: a work tile is 128 weight rows by up to kTokens pairs, so an
// expert with few tokens wastes nothing of the tensor core's M, and its weights are read once. A
// stage is 64 deep. It is full when TMA's bytes and every gathering thread's copies have landed,
// and empty again when both consumer warpgroups have waited for their products. Blocks are
// persistent: the ring runs on from one work tile to the next.
#pragma once

#include <type_traits>

#include "cuda/sm90_pipeline.h"
#include "device/barrier.h"
#include "device/cp_async.h"
#include "device/fence.h"
#include "device/mbarrier.h"
#include "device/swizzle.h"
#include "device/tma.h"
#include "device/warp.h"
#include "device/wgmma.h"
#include "grouped_gemm/cuda/moe.h"
#include "grouped_gemm/cuda/moe_scheduler.h"

namespace dgemma::moe_sm90 {

using device::bfloat16;
using device::Swizzle;

// Warps 0-7 are the consumers, warp 8 loads weights, warps 9-11 gather token rows.
using sm90::kConsumerWarps;
using sm90::Registers;
static_assert(Registers::kThreads == kMoeThreads);
constexpr uint32_t kGatheringThreads = 96;
constexpr uint32_t kPiecesPerRow = kMoeDepth * sizeof(bfloat16) / 16;
// Rows that the gathering threads bring at a time, of which each brings kRowsAtOnce.
constexpr uint32_t kRowStep = kGatheringThreads / kPiecesPerRow, kRowsAtOnce = 4;

// Barrier 0 is __syncthreads.
enum NamedBarrier : uint32_t { kGathering = 1, kWarpgroup0 = 2, kWarpgroup1 = 3 };

DGEMMA_DEVICE void sync_warpgroup() {
  device::named_barrier_sync(kWarpgroup0 + device::warpgroup_index(), 128);
}

// Calls visit(work_tile, whether its rows are others than those of the one before) for every work
// tile of this block.
template <int kTokens, typename Scheduler, typename Visit>
DGEMMA_DEVICE void for_each_work_tile(const Scheduler& scheduler, Visit visit) {
  scheduler.for_each(kTokens, static_cast<int32_t>(blockIdx.x), static_cast<int32_t>(gridDim.x),
                     visit);
}

DGEMMA_DEVICE int32_t bytes_of(int32_t columns) {
  return columns * static_cast<int32_t>(sizeof(bfloat16));
}

template <int kTokens>
struct Ring {
  static constexpr uint32_t kStages = moe_stages(kTokens);
  using State = sm90::PipelineState<kStages>;
  struct Stage {
    alignas(1024) bfloat16 weights[kMoeWeightRows][kMoeDepth];  // rows of 128 bytes, swizzled
    alignas(1024) bfloat16 tokens[kTokens][kMoeDepth];          // likewise
  };
  static_assert(sizeof(Stage) == moe_stage_bytes(kTokens));

  Stage stage[kStages];
  sm90::Pipeline<kStages> pipeline;
  int32_t source_row[kTokens];  // of the work tile that is being gathered
};

// One thread calls this; __syncthreads follows.
template <int kTokens>
DGEMMA_DEVICE void initialise(Ring<kTokens>& ring) {
  ring.pipeline.initialise(1 + kGatheringThreads, kConsumerWarps);
  device::fence_mbarrier_init();
}

// One thread calls this before wait_for_previous_kernel(), when it is not yet known which experts
// have tokens: the L2 gets the first of the weights that this block takes if all have one tile of
// them. prefetch(work_tile, step) asks for a step's.
template <typename Prefetch>
DGEMMA_DEVICE void prefetch_weights(const MoeTileScheduler& scheduler, int32_t steps,
                                    Prefetch prefetch) {
  scheduler.for_each_likely(steps, static_cast<int32_t>(blockIdx.x),
                            static_cast<int32_t>(gridDim.x), prefetch);
}

// One thread calls this. load(destination, barrier, work_tile, step) starts the copy of a whole
// weight tile.
template <int kTokens, typename Scheduler, typename Load>
DGEMMA_DEVICE void load_weights(Ring<kTokens>& ring, const Scheduler& scheduler, Load load) {
  typename Ring<kTokens>::State at;
  for_each_work_tile<kTokens>(scheduler, [&](const auto& work_tile, bool) {
    const int32_t first = scheduler.first_step(work_tile), end = first + scheduler.steps(work_tile);
    for (int32_t step = first; step < end; ++step, at.advance()) {
      auto& weights = ring.stage[at.stage].weights;
      device::Mbarrier* const full = ring.pipeline.producer_acquire(at);
      device::mbarrier_arrive_expect_bytes(full, sizeof weights);
      load(weights, full, work_tile, step);
    }
  });
}

// Three warps call this. It brings the rows row_of(position) of a matrix with rows of `row_bytes`,
// for the work tile's sorted positions. Rows of the tile past the work tile's are left as they are:
// a product's columns do not mix, and those are not stored. Columns past the last are zero, as the
// weights' are.
template <int kTokens, typename Scheduler, typename RowOf>
DGEMMA_DEVICE void gather_rows(Ring<kTokens>& ring, const Scheduler& scheduler, const void* matrix,
                               int32_t row_bytes, RowOf row_of) {
  const uint32_t thread = threadIdx.x - (kMoeThreads - kGatheringThreads);
  const uint32_t piece = thread % kPiecesPerRow;
  typename Ring<kTokens>::State at;
  for_each_work_tile<kTokens>(scheduler, [&](const auto& work_tile, bool new_rows) {
    const uint32_t rows = static_cast<uint32_t>(work_tile.rows);
    if (new_rows) {
      device::named_barrier_sync(kGathering, kGatheringThreads);  // those before are no longer read
      for (uint32_t row = thread; row < rows; row += kGatheringThreads)
        ring.source_row[row] = row_of(work_tile.first + static_cast<int32_t>(row));
      device::named_barrier_sync(kGathering, kGatheringThreads);
    }

    const int32_t first = scheduler.first_step(work_tile), end = first + scheduler.steps(work_tile);
    for (int32_t step = first; step < end; ++step, at.advance()) {
      const int32_t byte =
          (step * static_cast<int32_t>(kPiecesPerRow) + static_cast<int32_t>(piece)) * 16;
      const bool inside = byte < row_bytes;
      const char* from = static_cast<const char*>(matrix) + (inside ? byte : 0);
      char* tile = reinterpret_cast<char*>(ring.stage[at.stage].tokens);
      device::Mbarrier* const full = ring.pipeline.producer_acquire(at);
      // Four rows at a time: their numbers out of shared memory first, then four copies.
      for (uint32_t row = thread / kPiecesPerRow; row < rows; row += kRowsAtOnce * kRowStep) {
        int32_t source[kRowsAtOnce];
#pragma unroll
        for (uint32_t i = 0; i < kRowsAtOnce; ++i)
          source[i] = ring.source_row[min(row + i * kRowStep, rows - 1)];
#pragma unroll
        for (uint32_t i = 0; i < kRowsAtOnce; ++i) {
          if (row + i * kRowStep >= rows) break;
          const uint32_t place = device::swizzled(
              ((row + i * kRowStep) * kPiecesPerRow + piece) * 16, Swizzle::bytes_128);
          device::cp_async_16(tile + place, from + static_cast<int64_t>(source[i]) * row_bytes,
                              inside ? 16 : 0);
        }
      }
      device::cp_async_mbarrier_arrive(full);
    }
  });
  device::cp_async_commit();  // a thread may not end while its copies are under way
  device::cp_async_wait<0>();
}

// A warpgroup's 64 rows of a work tile, times its first kN pairs: sum holds the product (see
// device/wgmma.h for what a thread has of it).
template <int kN, int kTokens>
DGEMMA_DEVICE void multiply(Ring<kTokens>& ring, typename Ring<kTokens>::State& at, int32_t k_steps,
                            float (&sum)[kN / 2]) {
  const uint32_t first_row = 64 * device::warpgroup_index();
  typename Ring<kTokens>::State previous = at;
  for (int32_t step = 0; step < k_steps; ++step) {
    const auto& stage = ring.stage[at.stage];
    ring.pipeline.consumer_wait(at);
    device::fence_proxy_async();  // cp.async wrote the tokens, wgmma reads them
    const auto a = device::k_major_descriptor(stage.weights[first_row], Swizzle::bytes_128);
    const auto b = device::k_major_descriptor(stage.tokens, Swizzle::bytes_128);
    device::wgmma_fence(sum);
#pragma unroll
    for (uint32_t k = 0; k < kMoeDepth; k += 16)  // wgmma's K is 16
      device::wgmma<kN>(sum, device::advanced(a, k * sizeof(bfloat16)),
                        device::advanced(b, k * sizeof(bfloat16)));
    device::wgmma_commit();
    // The products of the step before are done; this step's run on.
    if (step > 0) {
      device::wgmma_wait<1>();
      ring.pipeline.consumer_release(previous);
    }
    previous = at;
    at.advance();
  }
  device::wgmma_wait<0>(sum);
  ring.pipeline.consumer_release(previous);
}

// Calls consume(integral constant N, work_tile, new_rows) as for_each_work_tile does, N being the
// work tile's rows rounded up to a quarter of the token tile: an instruction's N is part of the
// code.
template <int kTokens, typename Scheduler, typename Consume>
DGEMMA_DEVICE void consume_work_tiles(const Scheduler& scheduler, Consume consume) {
  for_each_work_tile<kTokens>(scheduler, [&](const auto& work_tile, bool new_rows) {
    if (work_tile.rows <= kTokens / 4)
      consume(std::integral_constant<int, kTokens / 4>(), work_tile, new_rows);
    else if (work_tile.rows <= kTokens / 2)
      consume(std::integral_constant<int, kTokens / 2>(), work_tile, new_rows);
    else if (work_tile.rows <= kTokens * 3 / 4)
      consume(std::integral_constant<int, kTokens * 3 / 4>(), work_tile, new_rows);
    else
      consume(std::integral_constant<int, kTokens>(), work_tile, new_rows);
  });
}

}  // namespace dgemma::moe_sm90
