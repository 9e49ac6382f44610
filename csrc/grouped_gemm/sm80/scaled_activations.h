// The epilogue of gate and up where every token has a scale, its bytes having been rounded under
// it: sm80/int8_gate_up.cu and sm89/fp8_gate_up.cu.
#pragma once

#include "grouped_gemm/cuda/gelu.h"
#include "grouped_gemm/cuda/pack_rows.h"
#include "grouped_gemm/sm80/quantized_rows.h"

namespace dgemma::moe_quantized {

// h [pairs, expert_size] in sorted order. scales: [tokens]. A sum is multiplied by its token's
// scale, then by its row's factor. Four lanes write 16 bytes of a row.
template <int kColumns, typename Element, typename Token>
DGEMMA_DEVICE void store_scaled_activations(const Sum<kColumns, Element>& sum, const OwnRows& own,
                                            const MoeWorkTile& work_tile,
                                            const GateUpRows<Token>& rows, const float* scales,
                                            bfloat16* activations) {
#pragma unroll
  for (int group = 0; group < kColumns; ++group) {
    // A thread multiplies two tokens of every eight, and stores rows of one of them.
    float scale[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int32_t token = 8 * group + 2 * static_cast<int32_t>(device::lane_index() % 4) + i;
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

}  // namespace dgemma::moe_quantized
