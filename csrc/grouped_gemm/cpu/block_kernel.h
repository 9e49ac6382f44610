// The tasks of quantized weights by blocks: tokens are packed, and a tile is 16 rows times up to
// kMostTileTokens of them, however long the rows. AVX-512 and bfloat16 alone. Compiled once per
// instruction set; see cpu/vector.h for what that forbids.
#pragma once

#include "grouped_gemm/cpu/activate.h"
#include "grouped_gemm/cpu/block_tile.h"
#include "grouped_gemm/cpu/moe.h"
#include "grouped_gemm/cpu/weight_rows.h"

#if defined(__AVX512BW__)
namespace dgemma {
namespace {

// True when a matrix of so many rows and columns is multiplied by blocks, with tokens of type T.
template <typename T>
inline bool takes_blocks(int64_t rows, int64_t columns) {
  return sizeof(T) == sizeof(bfloat16) && rows % kTileRows == 0 && columns % kBlockColumns == 0;
}

// Tokens to a tile, of `tokens` in all: as few tiles as can be, and none much smaller than another.
inline int64_t tokens_per_tile(int64_t tokens) {
  const int64_t tiles = (tokens + kMostTileTokens - 1) / kMostTileTokens;
  return (tokens + tiles - 1) / tiles;
}

// The place of column i of a token's block.
template <dgemma_weight_format kFormat>
constexpr int token_place(int i) {
  const int place = block_place<kFormat>(i);
#if defined(__AVX512BF16__)
  return place;
#else
  return place / 4 * 4 + place % 2 * 2 + place % 4 / 2;  // of two pairs, what is first in each
#endif
}

// to[block][token][place]: a block's values of all tokens together. token(t) is where token t's
// values lie.
template <dgemma_weight_format kFormat, typename Token>
inline void pack_tokens(int64_t tokens, int64_t columns, TokenValue* to, Token token) {
  Words32 order = {};
  for (int i = 0; i < kBlockColumns; ++i) order[token_place<kFormat>(i)] = static_cast<uint16_t>(i);
  for (int64_t t = 0; t < tokens; ++t) {
    const bfloat16* from = token(t);
    for (int64_t column = 0; column < columns; column += kBlockColumns) {
      const Words32 values = permute(order, load_as<Words32>(from + column));
      TokenValue* place = to + column * tokens + t * kBlockColumns;
#if defined(__AVX512BF16__)
      std::memcpy(place, &values, sizeof values);
#else
      bfloat16 ordered[kBlockColumns];
      std::memcpy(ordered, &values, sizeof values);
      store(place, load(ordered));
      store(place + kLanes, load(ordered + kLanes));
#endif
    }
  }
}

// Memory for a task: packed tokens, and a tile's scales.
constexpr int64_t block_scratch_bytes(int64_t columns) {
  return kMostTileTokens * columns * static_cast<int64_t>(sizeof(TokenValue)) +
         packed_scales<DGEMMA_WEIGHTS_NVFP4>(columns / kNvfp4Group) *
             static_cast<int64_t>(sizeof(ScaleWords));
}
#define DGEMMA_BLOCK_SCRATCH(columns) \
  __builtin_alloca_with_align(static_cast<size_t>(block_scratch_bytes(columns)), 512 /* bits */)

// Sixteen rows at a time of a quantized matrix, times packed tokens.
template <dgemma_weight_format kFormat>
class BlockRows {
 public:
  // Row 0 stands for `first_row` of the matrix; `scratch` has block_scratch_bytes.
  BlockRows(const dgemma_quantized& matrix, int64_t first_row, int64_t columns, void* scratch)
      : matrix_(matrix),
        first_row_(first_row),
        columns_(columns),
        scale_bytes_(count_scales<kFormat>(columns, matrix.group) * kScaleBytes<kFormat>),
        tokens_(static_cast<TokenValue*>(scratch)),
        scales_(reinterpret_cast<ScaleWords*>(tokens_ + kMostTileTokens * columns)) {}

  TokenValue* tokens() const { return tokens_; }

  // Prefetches a task's first tile, which no tile before it did.
  void ask(int64_t row) const {
    for (int64_t i = 0; i < kTileRows * row_bytes(); i += kLineBytes)
      __builtin_prefetch(codes(row) + i, 0, 2);
    for (int64_t i = 0; i < kTileRows * scale_bytes_; i += kLineBytes)
      __builtin_prefetch(scales(row) + i, 0, 2);
  }

  // sums[t]: rows row to row + 15 times token t, with their row scales.
  void multiply(int64_t row, int64_t tokens, Floats* sums) const {
    if constexpr (kScaleBytes<kFormat> > 0) {
      pack_scales<kFormat>(scales(row), scale_bytes_, matrix_.scale_dtype, scales_);
      for (int64_t i = 0; i < kTileRows * scale_bytes_; i += kLineBytes)
        __builtin_prefetch(scales(row + kTileRows) + i, 0, 2);
    }
    const BlockDecoder<kFormat> decoder(matrix_, first_row_ + row, columns_, scales_);
    multiply_tile<kFormat>(decoder, tokens_, tokens, columns_ / kBlockColumns,
                           reinterpret_cast<const char*>(codes(row + kTileRows)), sums);
    if (matrix_.factors == nullptr) return;
    float factors[kTileRows];
    load_row_scales(matrix_, first_row_ + row, kTileRows, factors);
    for (int64_t t = 0; t < tokens; ++t) sums[t] *= load(factors);
  }

 private:
  int64_t row_bytes() const { return dgemma::row_bytes(kFormat, columns_); }
  const uint8_t* codes(int64_t row) const {
    return static_cast<const uint8_t*>(matrix_.values) + (first_row_ + row) * row_bytes();
  }
  const uint8_t* scales(int64_t row) const {
    return static_cast<const uint8_t*>(matrix_.scales) + (first_row_ + row) * scale_bytes_;
  }

  const dgemma_quantized matrix_;
  const int64_t first_row_;
  const int64_t columns_;
  const int64_t scale_bytes_;  // of a row
  TokenValue* const tokens_;
  ScaleWords* const scales_;
};

// Calls run(begin, tokens) for the tiles of tokens begin .. end - 1.
template <typename Run>
inline void each_token_tile(int64_t begin, int64_t end, Run run) {
  const int64_t most = tokens_per_tile(end - begin);
  for (; begin < end; begin += most) run(begin, end - begin < most ? end - begin : most);
}

// activations[:, first_row : end_row] of one group.
inline void gate_up_blocks(const MoePass& pass, int64_t group, int64_t first_row, int64_t end_row) {
  const int64_t k = pass.hidden_size, size = pass.expert_size;
  const bfloat16* input = static_cast<const bfloat16*>(pass.input);
  bfloat16* activations = static_cast<bfloat16*>(pass.activations);
  void* const scratch = DGEMMA_BLOCK_SCRATCH(k);
  with_format(pass.quantized_gate_up->format, [&](auto format) {
    typedef BlockRows<decltype(format)::value> Rows;
    const int64_t row_of_gate = pass.plan.expert[group] * 2 * size;
    const Rows gate(*pass.quantized_gate_up, row_of_gate, k, scratch);
    const Rows up(*pass.quantized_gate_up, row_of_gate + size, k, scratch);
    gate.ask(first_row);
    up.ask(first_row);
    const auto tile = [&](int64_t begin, int64_t tokens) {
      pack_tokens<decltype(format)::value>(tokens, k, gate.tokens(), [&](int64_t t) {
        return input + pass.plan.pair[begin + t] / pass.top_k * k;
      });
      for (int64_t row = first_row; row < end_row; row += kTileRows) {
        Floats gates[kMostTileTokens], ups[kMostTileTokens];
        gate.multiply(row, tokens, gates);
        up.multiply(row, tokens, ups);
        for (int64_t t = 0; t < tokens; ++t)
          store(activations + (begin + t) * size + row, activate(gates[t], ups[t]));
      }
    };
    each_token_tile(pass.plan.first[group], pass.plan.first[group + 1], tile);
  });
}

// The loop that down and a dense projection share: result(t) + row .. row + 15 = rows times token
// t, for the tokens 0 to `end_token`.
template <typename Token, typename Result>
inline void multiply_blocks(const dgemma_quantized& matrix, int64_t row_of_matrix, int64_t columns,
                            int64_t first_row, int64_t end_row, int64_t end_token, Token token,
                            Result result) {
  void* const scratch = DGEMMA_BLOCK_SCRATCH(columns);
  with_format(matrix.format, [&](auto format) {
    const BlockRows<decltype(format)::value> rows(matrix, row_of_matrix, columns, scratch);
    rows.ask(first_row);
    each_token_tile(0, end_token, [&](int64_t begin, int64_t tokens) {
      pack_tokens<decltype(format)::value>(tokens, columns, rows.tokens(),
                                           [&](int64_t t) { return token(begin + t); });
      for (int64_t row = first_row; row < end_row; row += kTileRows) {
        Floats sums[kMostTileTokens];
        rows.multiply(row, tokens, sums);
        for (int64_t t = 0; t < tokens; ++t) store(result(begin + t) + row, sums[t]);
      }
    });
  });
}

// products[..., first_row : end_row] of one group's pairs.
inline void down_blocks(const MoePass& pass, int64_t group, int64_t first_row, int64_t end_row) {
  const int64_t k = pass.expert_size, hidden = pass.hidden_size;
  const int64_t begin = pass.plan.first[group];
  const bfloat16* activations = static_cast<const bfloat16*>(pass.activations) + begin * k;
  multiply_blocks(
      *pass.quantized_down, pass.plan.expert[group] * hidden, k, first_row, end_row,
      pass.plan.first[group + 1] - begin, [&](int64_t t) { return activations + t * k; },
      [&](int64_t t) { return pass.products + pass.plan.pair[begin + t] * hidden; });
}

// output[:, first_row : end_row] of a dense projection.
inline void dense_blocks(const dgemma_dense& op, const dgemma_quantized& weight, int64_t first_row,
                         int64_t end_row) {
  const bfloat16* input = static_cast<const bfloat16*>(op.input);
  bfloat16* output = static_cast<bfloat16*>(op.output);
  multiply_blocks(
      weight, 0, op.in_features, first_row, end_row, op.rows,
      [&](int64_t t) { return input + t * op.in_features; },
      [&](int64_t t) { return output + t * op.out_features; });
}

}  // namespace
}  // namespace dgemma
#endif
