// The rows of weights and tokens that the experts' work tiles take, and the epilogue of down:
// sm80/quantized_*, sm80/int8_* and sm89/fp8_* share these beside their pipeline. Token is the
// element type of a token row.
#pragma once

#include "grouped_gemm/sm80/quantized_pipeline.h"

namespace dgemma::moe_quantized {

constexpr int32_t kResults = kQuantizedWeightRows / 2;  // of h, per weight tile

// A weight tile is 64 gate rows and the 64 up rows that belong to them, eight of the one and eight
// of the other in turn, so that both products of a result are in one thread.
template <typename Token>
struct GateUpRows {
  QuantizedMatrix matrix;  // [experts, 2 * expert_size, hidden_size]
  const Token* tokens;     // [tokens, hidden_size]
  int32_t expert_size, top_k;
  const int32_t* pair;

  DGEMMA_DEVICE int32_t first_weight_row(const MoeWorkTile& work_tile) const {
    return 2 * work_tile.expert * expert_size;
  }
  DGEMMA_DEVICE int32_t weight_row(const MoeWorkTile& work_tile, int32_t row) const {
    const int32_t result = work_tile.weight_tile * kResults + row / 16 * 8 + row % 8;
    const int32_t up = row % 16 / 8;
    return result < expert_size ? up * expert_size + result : -1;
  }
  DGEMMA_DEVICE int64_t first_token_row(const MoeWorkTile&) const { return 0; }
  DGEMMA_DEVICE int32_t token_row(const MoeWorkTile& work_tile, int32_t row) const {
    return pair[work_tile.first + row] / top_k;
  }
};

template <typename Token>
struct DownRows {
  QuantizedMatrix matrix;  // [experts, hidden_size, expert_size]
  const Token* tokens;     // [pairs, expert_size], in sorted order: the activations
  int32_t hidden_size;

  DGEMMA_DEVICE int32_t first_weight_row(const MoeWorkTile& work_tile) const {
    return work_tile.expert * hidden_size;
  }
  DGEMMA_DEVICE int32_t weight_row(const MoeWorkTile& work_tile, int32_t row) const {
    const int32_t at = work_tile.weight_tile * kQuantizedWeightRows + row;
    return at < hidden_size ? at : -1;
  }
  DGEMMA_DEVICE int64_t first_token_row(const MoeWorkTile& work_tile) const {
    return work_tile.first;
  }
  DGEMMA_DEVICE int32_t token_row(const MoeWorkTile&, int32_t row) const { return row; }
};

// products [pairs, hidden_size], in the order of the slots: where a thread's two tokens of every
// eight go. finish_of(pair, position in sorted order) gives what makes a product of a sum and its
// row's factor. Eight lanes write 32 bytes of a row, a sector of the L2.
template <int kColumns, typename Element, typename FinishOf>
DGEMMA_DEVICE void store_products(const MoeTables& tables, const MoeWorkTile& work_tile,
                                  const OwnRows& own, const Sum<kColumns, Element>& sum,
                                  int32_t hidden_size, float* products, const FinishOf& finish_of) {
  const int32_t first = own_row(0, 0);  // all lanes ask together, before they part
#pragma unroll
  for (int i = 0; i < 2 * kColumns; ++i) {
    const int32_t token = 8 * (i / 2) + 2 * static_cast<int32_t>(device::lane_index() % 4) + i % 2;
    if (token >= work_tile.rows) continue;
    const int32_t pair = tables.pair[work_tile.first + token];
    const auto finish = finish_of(pair, work_tile.first + token);
    float* out = products + static_cast<int64_t>(pair) * hidden_size +
                 work_tile.weight_tile * kQuantizedWeightRows;
#pragma unroll
    for (int tile = 0; tile < kRowTiles; ++tile)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int32_t row = first + 16 * tile + 8 * half;
        if (work_tile.weight_tile * kQuantizedWeightRows + row < hidden_size)
          out[row] = finish(sum[tile][i / 2][2 * half + i % 2], own.factor[tile][half]);
      }
  }
}

}  // namespace dgemma::moe_quantized
