// input . weight^T, weights and rows of input in int8 by mma.sync: see sm80/quantized_pipeline.h
// and plan_dense.h. Sums of integers are exact, so a work tile that has all segments of its tile
// sums them as one.
#include "grouped_gemm/sm80/dense_rows.h"

namespace dgemma {
namespace {

using namespace moe_quantized;

constexpr Encoding kEncoding = Encoding::kInt8;
using Rows = DenseRows<uint8_t>;  // of int8

struct Sums {
  const float* scales;  // [rows]
  int32_t* partial;     // [segments, rows, out_features] when apart
};

// Times the scale of the row of input, then the weight row's factor.
template <int kColumns>
DGEMMA_DEVICE void store_scaled(const DenseCall& p, const float* scales, const OwnRows& own,
                                const DenseWorkTile& work_tile, const Sum<kColumns, int32_t>& sum) {
#pragma unroll
  for (int group = 0; group < kColumns; ++group) {
    float scale[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int32_t token = own_token(group, i);
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
  multiply_work_tiles<kEncoding, kTokens>(
      p.scheduler, rows, [&](auto columns, auto& pipeline, const DenseWorkTile& work_tile) {
        constexpr int kColumns = decltype(columns)::value;
        const OwnRows own = find_own_rows<kEncoding>(rows, work_tile);
        Sum<kColumns, int32_t> sum = {};
        pipeline.template multiply<kColumns>(own, 0, p.scheduler.steps(work_tile), sum);
        if (p.scheduler.apart)
          for_each_product<kColumns>(work_tile, sum,
                                     [&](const int32_t (&d)[4], int32_t feature, int32_t token) {
                                       store_segment(p, work_tile, sums.partial, d, feature, token);
                                     });
        else
          store_scaled<kColumns>(p, sums.scales, own, work_tile, sum);
      });
}

}  // namespace

const char* launch_dense_sm80_int8(const DensePlan& plan, const DenseQuantizedCall& call,
                                   void* stream) {
  const Rows rows = {
      .matrix = call.weight, .tokens = call.input.codes, .out_features = call.dense.out_features};
  const Sums sums = {.scales = call.input.scales, .partial = call.partial};
  return launch_tile<kEncoding, 32, 64>(plan.token_tile, [&]<Encoding, int kTokens>() {
    return device::launch(launch_shape_of<kEncoding, kTokens>(plan, true), stream, dense<kTokens>,
                          call.dense, rows, sums);
  });
}

}  // namespace dgemma
