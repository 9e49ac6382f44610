// input . weight^T, bfloat16 from sm_80 on: see sm80/bf16_pipeline.h and plan_dense.h.
#include "device/launch.h"
#include "grouped_gemm/cuda/dense_store.h"
#include "grouped_gemm/sm80/bf16_pipeline.h"

namespace dgemma {
namespace {

using namespace moe_sm80;

struct Rows {
  const bfloat16* weights;  // [out_features, in_features]
  const bfloat16* tokens;   // [rows, in_features]: the input
  int32_t width;            // in_features
  int32_t out_features;

  DGEMMA_DEVICE int32_t weight_row(const DenseWorkTile& work_tile, int32_t row) const {
    const int32_t feature = work_tile.weight_tile * kMoeWeightRows80 + row;
    return feature < out_features ? feature : -1;
  }
  DGEMMA_DEVICE int32_t token_row(const DenseWorkTile& work_tile, int32_t row) const {
    return work_tile.first + row;
  }
};

template <int kColumns>
DGEMMA_DEVICE void store(const DenseCall& p, const DenseWorkTile& work_tile,
                         const Sum<kColumns>& total) {
#pragma unroll
  for (int tile = 0; tile < kRowTiles; ++tile)
#pragma unroll
    for (int i = 0; i < 2 * kColumns; ++i)
      store_dense(p, work_tile, total[tile][i / 2][i % 2],
                  work_tile.weight_tile * kMoeWeightRows80 + first_row(tile),
                  first_token(i / 2, i % 2));
}

template <int kColumns>
DGEMMA_DEVICE void fill(Sum<kColumns>& sum, float value) {
#pragma unroll
  for (int i = 0; i < kRowTiles * kColumns * 8; ++i)
    sum[i / 8 / kColumns][i / 8 % kColumns][i / 4 % 2][i % 4] = value;
}
template <int kColumns>
DGEMMA_DEVICE void add(Sum<kColumns>& total, const Sum<kColumns>& sum) {
#pragma unroll
  for (int tile = 0; tile < kRowTiles; ++tile)
#pragma unroll
    for (int group = 0; group < kColumns; ++group)
#pragma unroll
      for (int i = 0; i < 8; ++i)
        total[tile][group][i / 4][i % 4] += sum[tile][group][i / 4][i % 4];
}

template <int kTokens>
__global__ void __launch_bounds__(kMoeThreads80, moe_least_blocks_80(kTokens))
    dense(const DenseCall p, const Rows rows) {
  device::let_next_kernel_begin();
  Pipeline<kTokens, DenseTileScheduler, Rows> pipeline(device::shared_memory<Ring<kTokens>>(),
                                                       p.scheduler, rows);
  pipeline.for_each_work_tile([&](auto columns, const DenseWorkTile& work_tile) {
    constexpr int kColumns = decltype(columns)::value;
    Sum<kColumns> total;
    fill<kColumns>(total, kNegativeZero);
#pragma unroll 1
    for (int32_t i = 0; i < work_tile.segments; ++i) {
      Sum<kColumns> sum = {};
      pipeline.template multiply<kColumns>(p.scheduler.steps(work_tile.segment + i), sum);
      add<kColumns>(total, sum);
    }
    store<kColumns>(p, work_tile, total);
  });
}

template <int kTokens>
const char* launch(const DensePlan& plan, const DenseCall& call, void* stream) {
  const Rows rows = {.weights = call.weight,
                     .tokens = call.input,
                     .width = call.in_features,
                     .out_features = call.out_features};
  // This kernel does not begin before the previous one ends, which may write what it reads.
  const device::LaunchShape shape = {.grid = dim3(static_cast<unsigned>(plan.blocks)),
                                     .threads = kMoeThreads80,
                                     .shared_bytes = sizeof(Ring<kTokens>),
                                     .blocks_at_once = static_cast<uint32_t>(plan.blocks_at_once)};
  return device::launch(shape, stream, dense<kTokens>, call, rows);
}

}  // namespace

const char* launch_dense_sm80_bf16(const DensePlan& plan, const DenseCall& call, void* stream) {
  if (plan.token_tile == 32) return launch<32>(plan, call, stream);
  if (plan.token_tile == 64) return launch<64>(plan, call, stream);
  return launch<128>(plan, call, stream);
}

}  // namespace dgemma
