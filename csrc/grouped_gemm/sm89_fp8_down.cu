// weight * (down h) for every pair, weights and activations in e4m3 by mma.sync (8.9 and 12.0): see
// sm80_quantized_pipeline.h.
//
// A pair's product goes to the row of its slot, from where combine.cu sums them in that order.
#include "device/launch.h"
#include "grouped_gemm/cuda_fp8.h"
#include "grouped_gemm/sm80_quantized_pipeline.h"

namespace dgemma {
namespace {

using namespace moe_quantized;

constexpr Encoding kEncoding = Encoding::kFp8Activations;

struct Rows {
  QuantizedMatrix matrix;  // [experts, hidden_size, expert_size]
  const uint8_t* tokens;   // e4m3 [pairs, expert_size], in sorted order: the activations
  int32_t hidden_size;

  DGEMMA_DEVICE int32_t first_weight_row(const MoeUnit& unit) const {
    return unit.expert * hidden_size;
  }
  DGEMMA_DEVICE int32_t weight_row(const MoeUnit& unit, int32_t row) const {
    const int32_t at = unit.weight_tile * kQuantizedWeightRows + row;
    return at < hidden_size ? at : -1;
  }
  DGEMMA_DEVICE int64_t first_token_row(const MoeUnit& unit) const { return unit.first; }
  DGEMMA_DEVICE int32_t token_row(const MoeUnit&, int32_t row) const { return row; }
};

struct Down {
  const float* activation_scales;  // [pairs], in sorted order
  const float* expert_weights;     // [pairs], in the order of the slots
  float* products;                 // [pairs, hidden_size], in the order of the slots
  int32_t hidden_size;
};

// Where a thread's two tokens of every eight go, and what they are multiplied by. Eight lanes write
// 32 bytes of a row, a sector of the L2.
template <int kColumns>
DGEMMA_DEVICE void store(const Down& p, const MoeTables& tables, const MoeUnit& unit,
                         const OwnRows& own, const Sum<kColumns>& sum) {
#pragma unroll
  for (int i = 0; i < 2 * kColumns; ++i) {
    const int32_t token = 8 * (i / 2) + 2 * static_cast<int32_t>(device::lane_index() % 4) + i % 2;
    if (token >= unit.rows) continue;
    const int32_t pair = tables.pair[unit.first + token];
    const float weight = p.expert_weights[pair] * p.activation_scales[unit.first + token];
    float* out = p.products + static_cast<int64_t>(pair) * p.hidden_size +
                 unit.weight_tile * kQuantizedWeightRows;
#pragma unroll
    for (int tile = 0; tile < kRowTiles; ++tile)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int32_t row = own_row(tile, half);
        if (unit.weight_tile * kQuantizedWeightRows + row < p.hidden_size)
          out[row] = weight * (own.factor[tile][half] * sum[tile][i / 2][2 * half + i % 2]);
      }
  }
}

template <int kTokens>
__global__ void __launch_bounds__(kQuantizedThreads, kFp8LeastBlocks89)
    down(const MoeWork work, const Rows rows, const Down p) {
  device::wait_for_previous_kernel();
  device::let_next_kernel_begin();
  Pipeline<kEncoding, kTokens, MoeWork, Rows> pipeline(
      device::shared_memory<Ring<kEncoding, kTokens>>(), work, rows);
  pipeline.for_each_unit([&](auto columns, const MoeUnit& unit) {
    constexpr int kColumns = decltype(columns)::value;
    const OwnRows own = find_own_rows<kEncoding>(rows, unit);
    Sum<kColumns> sum = {};
    pipeline.template multiply<kColumns>(own, 0, work.k_steps, sum);
    store<kColumns>(p, work.tables, unit, own, sum);
  });
}

template <int kTokens>
const char* launch(const MoeCudaPlan& plan, const MoeFp8Pass& pass, void* stream) {
  const MoeCudaPass& ffn = pass.ffn;
  const MoeWork work = {ffn.tables, plan.down.weight_tiles, plan.down.k_steps};
  const Rows rows = {pass.down, pass.activations, ffn.hidden_size};
  const Down p = {pass.activation_scales, ffn.expert_weights, ffn.products, ffn.hidden_size};
  const device::LaunchShape shape = {.grid = dim3(static_cast<unsigned>(plan.down.blocks)),
                                     .threads = kQuantizedThreads,
                                     .shared_bytes = sizeof(Ring<kEncoding, kTokens>),
                                     .overlaps_previous_kernel = plan.overlap};
  return device::launch(shape, stream, down<kTokens>, work, rows, p);
}

}  // namespace

const char* launch_down_sm89_fp8(const MoeFp8Plan& plan, const MoeFp8Pass& pass, void* stream) {
  return plan.ffn.token_tile == 32 ? launch<32>(plan.ffn, pass, stream)
                                   : launch<64>(plan.ffn, pass, stream);
}

}  // namespace dgemma
