// input . weight^T, bfloat16 on sm_90: see sm90/bf16_pipeline.h and plan_dense.h.
#include "device/launch.h"
#include "device/shared_memory.h"
#include "grouped_gemm/cuda/dense_store.h"
#include "grouped_gemm/sm90/bf16_pipeline.h"

namespace dgemma {
namespace {

using namespace moe_sm90;

template <int kN>
DGEMMA_DEVICE void store(const DenseCall& p, const DenseWorkTile& work_tile,
                         const float (&total)[kN / 2]) {
  const int32_t feature =
      work_tile.weight_tile * kMoeWeightRows + static_cast<int32_t>(device::warp_index()) * 16;
#pragma unroll
  for (int j = 0; j < kN / 8; ++j) store_dense(p, work_tile, total + 4 * j, feature, 8 * j);
}

template <int kTokens>
__global__ void __launch_bounds__(kMoeThreads, 1)
    dense(const __grid_constant__ device::TensorMap weights, const DenseCall p) {
  auto& ring = device::shared_memory<Ring<kTokens>>();
  if (threadIdx.x == 0) {
    device::prefetch_tensor_map(&weights);
    initialise(ring);
  }
  __syncthreads();
  device::let_next_kernel_begin();

  const uint32_t warp = device::warp_index();
  if (warp >= kConsumerWarps) {
    Registers::give_back();
    if (warp == kConsumerWarps) {
      if (device::elect_one()) {
        const auto policy =
            p.scheduler.token_tiles == 1 ? device::evict_first() : device::evict_normal();
        load_weights(
            ring, p.scheduler,
            [&](void* to, device::Mbarrier* full, const DenseWorkTile& work_tile, int32_t step) {
              device::tma_load(to, &weights, full, policy, step * kMoeDepth,
                               work_tile.weight_tile * kMoeWeightRows);
            });
      }
    } else {
      gather_rows(ring, p.scheduler, p.input, bytes_of(p.in_features),
                  [](int32_t row) { return row; });
    }
  } else {
    Registers::take();
    typename Ring<kTokens>::State at;
    consume_work_tiles<kTokens>(
        p.scheduler, [&](auto columns, const DenseWorkTile& work_tile, bool) {
          constexpr int kN = decltype(columns)::value;
          float total[kN / 2];
#pragma unroll
          for (int j = 0; j < kN / 2; ++j) total[j] = kNegativeZero;
#pragma unroll 1
          for (int32_t i = 0; i < work_tile.segments; ++i) {
            float sum[kN / 2] = {};
            multiply<kN>(ring, at, p.scheduler.steps(work_tile.segment + i), sum);
#pragma unroll
            for (int j = 0; j < kN / 2; ++j) total[j] += sum[j];
          }
          store<kN>(p, work_tile, total);
        });
  }
}

// (column, row). Rows past the last are zero.
device::TensorLayout make_layout(const DenseCall& call) {
  const uint64_t row = static_cast<uint64_t>(call.in_features) * sizeof(bfloat16);
  return {
      .type = device::ElementType::bfloat16,
      .rank = 2,
      .base = call.weight,
      .size = {static_cast<uint64_t>(call.in_features), static_cast<uint64_t>(call.out_features)},
      .stride = {0, row},
      .box = {kMoeDepth, kMoeWeightRows},
      .swizzle = Swizzle::bytes_128};
}

template <int kTokens>
const char* launch(const DensePlan& plan, const DenseCall& call, void* stream) {
  static_assert(sizeof(Ring<kTokens>) <= kSharedLimit90);
  device::TensorMap weights;
  if (const char* error = device::encode_tensor_map(&weights, make_layout(call))) return error;
  // This kernel does not begin before the previous one ends, which may write what it reads.
  const device::LaunchShape shape = {.grid = dim3(static_cast<unsigned>(plan.blocks)),
                                     .threads = kMoeThreads,
                                     .shared_bytes = sizeof(Ring<kTokens>)};
  return device::launch(shape, stream, dense<kTokens>, weights, call);
}

}  // namespace

const char* launch_dense_sm90_bf16(const DensePlan& plan, const DenseCall& call, void* stream) {
  return plan.token_tile == 64 ? launch<64>(plan, call, stream) : launch<128>(plan, call, stream);
}

}  // namespace dgemma
