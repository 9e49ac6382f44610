// h = gelu_tanh(gate x) * (up x) for every pair, weights and tokens in bytes of one kind (W8A8) by
// mma.sync: see sm80/quantized_pipeline.h. h is rounded to bfloat16; quantize_rows*.cu makes bytes
// of its rows. sm80/int8_gate_up.cu and sm89/fp8_gate_up.cu instantiate it.
#pragma once

#include "grouped_gemm/cuda/gelu.h"
#include "grouped_gemm/cuda/pack_rows.h"
#include "grouped_gemm/sm80/moe_launch.h"
#include "grouped_gemm/sm80/quantized_rows.h"

namespace dgemma {
namespace {

using namespace moe_quantized;

using Rows = GateUpRows<uint8_t>;  // of int8 or e4m3

// h [pairs, expert_size] in sorted order. scales: [tokens]. A sum is multiplied by its token's
// scale, then by its row's factor. Four lanes write 16 bytes of a row.
template <int kColumns, typename Element>
DGEMMA_DEVICE void store_activations(const Sum<kColumns, Element>& sum, const OwnRows& own,
                                     const MoeWorkTile& work_tile, const Rows& rows,
                                     const float* scales, bfloat16* activations) {
#pragma unroll
  for (int group = 0; group < kColumns; ++group) {
    // A thread multiplies two tokens of every eight, and stores rows of one of them.
    float scale[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int32_t token = own_token(group, i);
      scale[i] = token < work_tile.rows ? scales[rows.token_row(work_tile, token)] : 0.0f;
    }
    const int32_t token = 8 * group + packed_token();
#pragma unroll
    for (int tile = 0; tile < kRowTiles; ++tile) {
      const int32_t column = work_tile.weight_tile * kResults + first_row(tile) / 2 + packed_row();
      const Element(&d)[4] = sum[tile][group];
      float h[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float gate = static_cast<float>(d[i]) * scale[i] * own.factor[tile][0];
        const float up = static_cast<float>(d[i + 2]) * scale[i] * own.factor[tile][1];
        h[i] = gelu_tanh(gate) * up;
      }
      const uint32_t both = pack_rows(h[0], h[1]);
      if (token < work_tile.rows && column < rows.expert_size)
        *reinterpret_cast<uint32_t*>(
            activations + static_cast<int64_t>(work_tile.first + token) * rows.expert_size +
            column) = both;
    }
  }
}

template <Encoding kEncoding, int kTokens>
__global__ void __launch_bounds__(kQuantizedThreads, least_blocks(kEncoding, kTokens))
    gate_up(const MoeTileScheduler scheduler, const Rows rows, const float* scales,
            bfloat16* activations) {
  multiply_work_tiles<kEncoding, kTokens>(
      scheduler, rows,
      [&](auto columns, const MoeWorkTile& work_tile, const OwnRows& own, const auto& sum) {
        constexpr int kColumns = decltype(columns)::value;
        store_activations<kColumns>(sum, own, work_tile, rows, scales, activations);
      });
}

template <Encoding kEncoding>
const char* launch_gate_up(const MoeCudaPlan& plan, const MoeQuantizedPass& pass, void* stream) {
  const MoeCudaPass& ffn = pass.ffn;
  const Rows rows = {pass.gate_up, pass.input.codes, ffn.expert_size, ffn.top_k, ffn.tables.pair};
  return launch_tile<kEncoding, 32, 64>(plan.token_tile, [&]<Encoding, int kTokens>() {
    const device::LaunchShape shape =
        launch_shape_of(plan.gate_up, kQuantizedThreads, sizeof(Ring<kEncoding, kTokens>));
    return device::launch(shape, stream, gate_up<kEncoding, kTokens>,
                          scheduler_of(ffn.tables, plan.gate_up), rows, pass.input.scales,
                          ffn.activations);
  });
}

}  // namespace
}  // namespace dgemma
