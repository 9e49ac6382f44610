// What the experts' kernels over quantized weights share beside their pipeline (sm80/quantized_*,
// sm80/int8_* and sm89/fp8_*): the rows of weights and tokens that work tiles take, the kernel
// around its epilogue, and the epilogue of down. Token is the element type of a token row.
#pragma once

#include "device/launch.h"
#include "grouped_gemm/cuda/plan_fp8.h"
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

// Blocks that registers must leave room for on a multiprocessor.
constexpr int32_t least_blocks(Encoding encoding, int32_t token_tile) {
  if (encoding == Encoding::kInt8) return int8_least_blocks(token_tile);
  return encoding == Encoding::kFp8Activations ? kFp8LeastBlocks89
                                               : quantized_least_blocks(token_tile);
}

// A kernel but for its epilogue: store(integral constant, work_tile, own, sum) gets the products of
// each of this block's work tiles, of so many groups of 8 tokens.
template <Encoding kEncoding, int kTokens, typename Rows, typename Store>
DGEMMA_DEVICE void multiply_work_tiles(const MoeTileScheduler& scheduler, const Rows& rows,
                                       const Store& store) {
  device::wait_for_previous_kernel();
  device::let_next_kernel_begin();
  Pipeline<kEncoding, kTokens, MoeTileScheduler, Rows> pipeline(
      device::shared_memory<Ring<kEncoding, kTokens>>(), scheduler, rows);
  pipeline.for_each_work_tile([&](auto columns, const MoeWorkTile& work_tile) {
    constexpr int kColumns = decltype(columns)::value;
    const OwnRows own = find_own_rows<kEncoding>(rows, work_tile);
    Sum<kColumns, SumElement<kEncoding>> sum = {};
    pipeline.template multiply<kColumns>(own, 0, scheduler.k_steps, sum);
    store(columns, work_tile, own, sum);
  });
}

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
    const int32_t token = own_token(i / 2, i % 2);
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
