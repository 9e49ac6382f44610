// input . weight^T over quantized weights: see sm80/quantized_pipeline.h and plan_dense.h.
#include "grouped_gemm/sm80/dense_rows.h"

namespace dgemma {
namespace {

using namespace moe_quantized;

using Rows = DenseRows<bfloat16>;

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
  multiply_work_tiles<kEncoding, kTokens>(
      p.scheduler, rows, [&](auto columns, auto& pipeline, const DenseWorkTile& work_tile) {
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
        for_each_product<kColumns>(work_tile, total,
                                   [&](const float (&d)[4], int32_t feature, int32_t token) {
                                     store_dense(p, work_tile, d, feature, token);
                                   });
      });
}

}  // namespace

const char* launch_dense_sm80_quantized(const DensePlan& plan, const DenseQuantizedCall& call,
                                        void* stream) {
  const Rows rows = {
      .matrix = call.weight, .tokens = call.dense.input, .out_features = call.dense.out_features};
  return launch_encoding_sm80(
      call.encoding, plan.token_tile, [&]<Encoding kEncoding, int kTokens>() {
        // It does not begin before the previous kernel ends, which may write what it reads.
        return device::launch(launch_shape_of<kEncoding, kTokens>(plan, false), stream,
                              dense<kEncoding, kTokens>, call.dense, rows);
      });
}

}  // namespace dgemma
