// weight * (down h) for every pair, bfloat16 to fp32 from sm_80 on: see sm80/bf16_pipeline.h.
//
// A pair's product goes to the row of its slot, from where combine.cu sums them in that order.
#include "grouped_gemm/sm80/bf16_pipeline.h"
#include "grouped_gemm/sm80/moe_launch.h"

namespace dgemma {
namespace {

using namespace moe_sm80;

struct Rows {
  const bfloat16* weights;  // [experts, hidden_size, expert_size]
  const bfloat16* tokens;   // [pairs, expert_size], in sorted order: the activations
  int32_t width;            // expert_size
  int32_t hidden_size;

  DGEMMA_DEVICE int32_t weight_row(const MoeWorkTile& work_tile, int32_t row) const {
    const int32_t at = work_tile.weight_tile * kMoeWeightRows80 + row;
    return at < hidden_size ? work_tile.expert * hidden_size + at : -1;
  }
  DGEMMA_DEVICE int32_t token_row(const MoeWorkTile& work_tile, int32_t row) const {
    return work_tile.first + row;
  }
};

struct Down {
  const float* expert_weights;  // [pairs], in the order of the slots
  float* products;              // [pairs, hidden_size], in the order of the slots
  int32_t hidden_size;
};

// The place of a column of the product, and the weight that it is multiplied by.
struct Target {
  int32_t pair;  // -1: no pair
  float weight;
};

// A thread's two tokens of every eight. Before the products, so that these loads take no time of
// their own.
template <int kColumns>
DGEMMA_DEVICE void load_targets(const Down& p, const MoeTables& tables,
                                const MoeWorkTile& work_tile, Target (&target)[kColumns][2][2]) {
#pragma unroll
  for (int i = 0; i < 4 * kColumns; ++i) {
    const int group = i / 4, half = i / 2 % 2;
    const int32_t token =
        first_token(group, half) + 2 * static_cast<int32_t>(device::lane_index() % 4) + i % 2;
    Target& to = target[group][half][i % 2];
    to.pair = token < work_tile.rows ? tables.pair[work_tile.first + token] : -1;
    to.weight = to.pair >= 0 ? p.expert_weights[to.pair] : 0.0f;
  }
}

// Eight lanes write 32 bytes of a row, a sector of the L2.
template <int kColumns>
DGEMMA_DEVICE void store(const Down& p, const MoeWorkTile& work_tile, const Sum<kColumns>& sum,
                         const Target (&target)[kColumns][2][2]) {
#pragma unroll
  for (int tile = 0; tile < kRowTiles; ++tile) {
    const int32_t row = work_tile.weight_tile * kMoeWeightRows80 + first_row(tile) +
                        static_cast<int32_t>(device::lane_index() / 4);
#pragma unroll
    for (int i = 0; i < 4 * kColumns; ++i) {
      const int group = i / 4, half = i / 2 % 2;
      const Target to = target[group][half][i % 2];
      if (to.pair < 0) continue;
      float* out = p.products + static_cast<int64_t>(to.pair) * p.hidden_size + row;
      const float (&d)[4] = sum[tile][group][half];
      if (row < p.hidden_size) out[0] = to.weight * d[i % 2];
      if (row + 8 < p.hidden_size) out[8] = to.weight * d[i % 2 + 2];
    }
  }
}

template <int kTokens>
__global__ void __launch_bounds__(kMoeThreads80, moe_least_blocks_80(kTokens))
    down(const MoeTileScheduler scheduler, const Rows rows, const Down p) {
  device::wait_for_previous_kernel();
  device::let_next_kernel_begin();
  Pipeline<kTokens, MoeTileScheduler, Rows> pipeline(device::shared_memory<Ring<kTokens>>(),
                                                     scheduler, rows);
  pipeline.for_each_work_tile([&](auto columns, const MoeWorkTile& work_tile) {
    constexpr int kColumns = decltype(columns)::value;
    Target target[kColumns][2][2];
    load_targets<kColumns>(p, scheduler.tables, work_tile, target);
    Sum<kColumns> sum = {};
    pipeline.template multiply<kColumns>(scheduler.k_steps, sum);
    store<kColumns>(p, work_tile, sum, target);
  });
}

template <int kTokens>
const char* launch(const MoeCudaPlan& plan, const MoeCudaPass& pass, void* stream) {
  const MoeTileScheduler scheduler = scheduler_of(pass.tables, plan.down);
  const Rows rows = {.weights = pass.down,
                     .tokens = pass.activations,
                     .width = pass.expert_size,
                     .hidden_size = pass.hidden_size};
  const Down p = {.expert_weights = pass.expert_weights,
                  .products = pass.products,
                  .hidden_size = pass.hidden_size};
  const device::LaunchShape shape =
      launch_shape_of(plan.down, kMoeThreads80, sizeof(Ring<kTokens>));
  return device::launch(shape, stream, down<kTokens>, scheduler, rows, p);
}

}  // namespace

const char* launch_down_sm80_bf16(const MoeCudaPlan& plan, const MoeCudaPass& pass, void* stream) {
  if (plan.token_tile == 32) return launch<32>(plan, pass, stream);
  if (plan.token_tile == 64) return launch<64>(plan, pass, stream);
  return launch<128>(plan, pass, stream);
}

}  // namespace dgemma
