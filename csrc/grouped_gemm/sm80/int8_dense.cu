// input . weight^T, weights and rows of input in int8 by mma.sync: see sm80/quantized_pipeline.h
// and plan_dense.h. Sums of integers are exact, so a work tile that has all segments of its tile
// sums them as one.
#include "device/launch.h"
#include "grouped_gemm/cuda/dense_store.h"
#include "grouped_gemm/sm80/dense_rows.h"
#include "grouped_gemm/sm80/quantized_pipeline.h"

namespace dgemma {
namespace {

using namespace moe_quantized;

constexpr Encoding kEncoding = Encoding::kInt8;
using Rows = DenseRows<uint8_t>;  // of int8

struct Sums {
  const float* scales;  // [rows]
  int32_t* partial;     // [segments, rows, out_features] when apart
};

template <int kColumns>
DGEMMA_DEVICE void store_segments(const DenseCall& p, int32_t* partial,
                                  const DenseWorkTile& work_tile,
                                  const Sum<kColumns, int32_t>& sum) {
#pragma unroll
  for (int tile = 0; tile < kRowTiles; ++tile)
#pragma unroll
    for (int group = 0; group < kColumns; ++group)
      store_segment(p, work_tile, partial, sum[tile][group],
                    work_tile.weight_tile * kQuantizedWeightRows + first_row(tile), 8 * group);
}

// Times the scale of the row of input, then the weight row's factor.
template <int kColumns>
DGEMMA_DEVICE void store_scaled(const DenseCall& p, const float* scales, const OwnRows& own,
                                const DenseWorkTile& work_tile, const Sum<kColumns, int32_t>& sum) {
#pragma unroll
  for (int group = 0; group < kColumns; ++group) {
    float scale[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int32_t token = 8 * group + 2 * static_cast<int32_t>(device::lane_index() % 4) + i;
      scale[i] = token < work_tile.rows ? scales[work_tile.first + token] : 0.0f;
    }
#pragma unroll
    for (int tile = 0; tile < kRowTiles; ++tile) {
      float scaled[4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        scaled[i] =
            static_cast<float>(sum[tile][group][i]) * scale[i % 2] * own.factor[tile][i / 2];
      store_rounded(p, work_tile, scaled,
                    work_tile.weight_tile * kQuantizedWeightRows + first_row(tile), 8 * group);
    }
  }
}

template <int kTokens>
__global__ void __launch_bounds__(kQuantizedThreads, int8_least_blocks(kTokens))
    dense(const DenseCall p, const Rows rows, const Sums sums) {
  device::wait_for_previous_kernel();
  device::let_next_kernel_begin();
  Pipeline<kEncoding, kTokens, DenseTileScheduler, Rows> pipeline(
      device::shared_memory<Ring<kEncoding, kTokens>>(), p.scheduler, rows);
  pipeline.for_each_work_tile([&](auto columns, const DenseWorkTile& work_tile) {
    constexpr int kColumns = decltype(columns)::value;
    const OwnRows own = find_own_rows<kEncoding>(rows, work_tile);
    Sum<kColumns, int32_t> sum = {};
    pipeline.template multiply<kColumns>(own, 0, p.scheduler.steps(work_tile), sum);
    if (p.scheduler.apart)
      store_segments<kColumns>(p, sums.partial, work_tile, sum);
    else
      store_scaled<kColumns>(p, sums.scales, own, work_tile, sum);
  });
}

template <int kTokens>
const char* launch(const DensePlan& plan, const DenseQuantizedCall& call, void* stream) {
  const Rows rows = {
      .matrix = call.weight, .tokens = call.input.codes, .out_features = call.dense.out_features};
  const Sums sums = {.scales = call.input.scales, .partial = call.partial};
  const device::LaunchShape shape = {.grid = dim3(static_cast<unsigned>(plan.blocks)),
                                     .threads = kQuantizedThreads,
                                     .shared_bytes = sizeof(Ring<kEncoding, kTokens>),
                                     .overlaps_previous_kernel = true,
                                     .blocks_at_once = static_cast<uint32_t>(plan.blocks_at_once)};
  return device::launch(shape, stream, dense<kTokens>, call.dense, rows, sums);
}

}  // namespace

const char* launch_dense_sm80_int8(const DensePlan& plan, const DenseQuantizedCall& call,
                                   void* stream) {
  return plan.token_tile == 32 ? launch<32>(plan, call, stream) : launch<64>(plan, call, stream);
}

}  // namespace dgemma
