// input . weight^T over quantized weights: see sm80/quantized_pipeline.h and plan_dense.h.
#include "device/launch.h"
#include "grouped_gemm/cuda/dense_store.h"
#include "grouped_gemm/sm80/dense_rows.h"
#include "grouped_gemm/sm80/quantized_pipeline.h"

namespace dgemma {
namespace {

using namespace moe_quantized;

using Rows = DenseRows<bfloat16>;

template <int kColumns>
DGEMMA_DEVICE void store(const DenseCall& p, const DenseWorkTile& work_tile,
                         const Sum<kColumns>& total) {
#pragma unroll
  for (int tile = 0; tile < kRowTiles; ++tile)
#pragma unroll
    for (int group = 0; group < kColumns; ++group)
      store_dense(p, work_tile, total[tile][group],
                  work_tile.weight_tile * kQuantizedWeightRows + first_row(tile), 8 * group);
}

template <int kColumns>
DGEMMA_DEVICE void fill(Sum<kColumns>& sum, float value) {
#pragma unroll
  for (int i = 0; i < kRowTiles * kColumns * 4; ++i)
    sum[i / 4 / kColumns][i / 4 % kColumns][i % 4] = value;
}
// The row scale is applied to each segment by itself: its product is the same number whether it is
// stored or added here.
template <int kColumns>
DGEMMA_DEVICE void add(Sum<kColumns>& total, const Sum<kColumns>& sum, const OwnRows& own) {
#pragma unroll
  for (int tile = 0; tile < kRowTiles; ++tile)
#pragma unroll
    for (int i = 0; i < 4 * kColumns; ++i)
      total[tile][i / 4][i % 4] =
          __fadd_rn(total[tile][i / 4][i % 4],
                    __fmul_rn(own.factor[tile][i % 4 / 2], sum[tile][i / 4][i % 4]));
}

template <Encoding kEncoding, int kTokens>
__global__ void __launch_bounds__(kQuantizedThreads, quantized_least_blocks(kTokens, true))
    dense(const DenseCall p, const Rows rows) {
  device::let_next_kernel_begin();
  Pipeline<kEncoding, kTokens, DenseTileScheduler, Rows> pipeline(
      device::shared_memory<Ring<kEncoding, kTokens>>(), p.scheduler, rows);
  pipeline.for_each_work_tile([&](auto columns, const DenseWorkTile& work_tile) {
    constexpr int kColumns = decltype(columns)::value;
    const OwnRows own = find_own_rows<kEncoding>(rows, work_tile);
    Sum<kColumns> total;
    fill<kColumns>(total, kNegativeZero);
#pragma unroll 1
    for (int32_t segment = work_tile.segment; segment < work_tile.segment + work_tile.segments;
         ++segment) {
      Sum<kColumns> sum = {};
      pipeline.template multiply<kColumns>(own, p.scheduler.begin(segment),
                                           p.scheduler.steps(segment), sum);
      // They are found again: to keep the row scales would take more registers than there are.
      add<kColumns>(total, sum, find_own_rows<kEncoding>(rows, work_tile));
    }
    store<kColumns>(p, work_tile, total);
  });
}

template <Encoding kEncoding, int kTokens>
const char* launch(const DensePlan& plan, const DenseQuantizedCall& call, void* stream) {
  const Rows rows = {
      .matrix = call.weight, .tokens = call.dense.input, .out_features = call.dense.out_features};
  // This kernel does not begin before the previous one ends, which may write what it reads.
  const device::LaunchShape shape = {.grid = dim3(static_cast<unsigned>(plan.blocks)),
                                     .threads = kQuantizedThreads,
                                     .shared_bytes = sizeof(Ring<kEncoding, kTokens>),
                                     .blocks_at_once = static_cast<uint32_t>(plan.blocks_at_once)};
  return device::launch(shape, stream, dense<kEncoding, kTokens>, call.dense, rows);
}

}  // namespace

const char* launch_dense_sm80_quantized(const DensePlan& plan, const DenseQuantizedCall& call,
                                        void* stream) {
  return launch_encoding_sm80(call.encoding, plan.token_tile,
                              [&]<Encoding kEncoding, int kTokens>() {
                                return launch<kEncoding, kTokens>(plan, call, stream);
                              });
}

}  // namespace dgemma
