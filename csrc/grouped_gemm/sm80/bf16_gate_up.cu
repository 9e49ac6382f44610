// h = gelu_tanh(gate x) * (up x) for every pair, bfloat16 from sm_80 on: see sm80/bf16_pipeline.h.
//
// A weight tile is 32 gate rows and the 32 up rows that belong to them, eight of the one and eight
// of the other in turn, so that both products of a result are in one thread.
#include "grouped_gemm/cuda/gelu.h"
#include "grouped_gemm/cuda/pack_rows.h"
#include "grouped_gemm/sm80/bf16_pipeline.h"
#include "grouped_gemm/sm80/moe_launch.h"

namespace dgemma {
namespace {

using namespace moe_sm80;

constexpr int32_t kResults = kMoeWeightRows80 / 2;  // of h, per weight tile

struct Rows {
  const bfloat16* weights;  // [experts, 2 * expert_size, hidden_size]
  const bfloat16* tokens;   // [tokens, hidden_size]
  int32_t width;            // hidden_size
  int32_t expert_size, top_k;
  const int32_t* pair;

  DGEMMA_DEVICE int32_t weight_row(const MoeWorkTile& work_tile, int32_t row) const {
    const int32_t result = work_tile.weight_tile * kResults + row / 16 * 8 + row % 8;
    const int32_t up = row % 16 / 8;
    return result < expert_size ? (2 * work_tile.expert + up) * expert_size + result : -1;
  }
  DGEMMA_DEVICE int32_t token_row(const MoeWorkTile& work_tile, int32_t row) const {
    return pair[work_tile.first + row] / top_k;
  }
};

// Four lanes write 16 bytes of a row.
template <int kColumns>
DGEMMA_DEVICE void store(const Sum<kColumns>& sum, const MoeWorkTile& work_tile,
                         int32_t expert_size, bfloat16* activations) {
#pragma unroll
  for (int tile = 0; tile < kRowTiles; ++tile) {
    const int32_t column = work_tile.weight_tile * kResults + first_row(tile) / 2 + packed_row();
#pragma unroll
    for (int i = 0; i < 2 * kColumns; ++i) {
      const float (&d)[4] = sum[tile][i / 2][i % 2];
      const uint32_t h = pack_rows(gelu_tanh(d[0]) * d[2], gelu_tanh(d[1]) * d[3]);
      const int32_t token = first_token(i / 2, i % 2) + packed_token();
      if (token < work_tile.rows && column < expert_size)
        *reinterpret_cast<uint32_t*>(
            activations + static_cast<int64_t>(work_tile.first + token) * expert_size + column) = h;
    }
  }
}

template <int kTokens>
__global__ void __launch_bounds__(kMoeThreads80, moe_least_blocks_80(kTokens))
    gate_up(const MoeTileScheduler scheduler, const Rows rows, bfloat16* activations) {
  device::wait_for_previous_kernel();
  device::let_next_kernel_begin();
  Pipeline<kTokens, MoeTileScheduler, Rows> pipeline(device::shared_memory<Ring<kTokens>>(),
                                                     scheduler, rows);
  pipeline.for_each_work_tile([&](auto columns, const MoeWorkTile& work_tile) {
    constexpr int kColumns = decltype(columns)::value;
    Sum<kColumns> sum = {};
    pipeline.template multiply<kColumns>(scheduler.k_steps, sum);
    store<kColumns>(sum, work_tile, rows.expert_size, activations);
  });
}

template <int kTokens>
const char* launch(const MoeCudaPlan& plan, const MoeCudaPass& pass, void* stream) {
  const MoeTileScheduler scheduler = scheduler_of(pass.tables, plan.gate_up);
  const Rows rows = {.weights = pass.gate_up,
                     .tokens = pass.input,
                     .width = pass.hidden_size,
                     .expert_size = pass.expert_size,
                     .top_k = pass.top_k,
                     .pair = pass.tables.pair};
  const device::LaunchShape shape =
      launch_shape_of(plan.gate_up, kMoeThreads80, sizeof(Ring<kTokens>));
  return device::launch(shape, stream, gate_up<kTokens>, scheduler, rows, pass.activations);
}

}  // namespace

const char* launch_gate_up_sm80_bf16(const MoeCudaPlan& plan, const MoeCudaPass& pass,
                                     void* stream) {
  if (plan.token_tile == 32) return launch<32>(plan, pass, stream);
  if (plan.token_tile == 64) return launch<64>(plan, pass, stream);
  return launch<128>(plan, pass, stream);
}

}  // namespace dgemma
