// The loops of weights that are multiplied by blocks: tokens are packed, and a tile is 16 rows
// times some of them, however long the rows. AVX-512 and tokens in bfloat16 alone. Compiled once
// per instruction set; see cpu/vector.h for what that forbids.
//
// `Rows` below are sixteen rows at a time of a matrix, in the dtype of the tokens
// (cpu/plain_blocks.h), quantized (cpu/quantized_blocks.h) or in INT8 (cpu/int8_blocks.h):
// kPackedTokens, pack, ask, multiply. What a token is to `pack` is theirs to say.
#pragma once

#include "grouped_gemm/cpu/activate.h"
#include "grouped_gemm/cpu/block_tile.h"
#include "grouped_gemm/cpu/moe.h"

#if defined(__AVX512BW__)
namespace dgemma {
namespace {

// True when a matrix of so many rows and columns is multiplied by blocks, with tokens of type T.
template <typename T>
inline bool takes_blocks(int64_t rows, int64_t columns) {
  return sizeof(T) == sizeof(bfloat16) && rows % kTileRows == 0 && columns % kBlockColumns == 0;
}

// Calls run(begin, tokens) for tiles of the tokens from begin to end: as few of at most `most` as
// can be, and none much smaller than another.
template <typename Run>
inline void each_token_tile(int64_t begin, int64_t end, int64_t most, Run run) {
  const int64_t tiles = (end - begin + most - 1) / most;
  if (tiles == 0) return;
  const int64_t tokens = (end - begin + tiles - 1) / tiles;
  for (; begin < end; begin += tokens) run(begin, end - begin < tokens ? end - begin : tokens);
}

// The place of column i of a token's block.
template <typename Blocks>
constexpr int token_place(int i) {
  const int place = Blocks::place(i);
#if defined(__AVX512BF16__)
  return place;
#else
  return place / 4 * 4 + place % 2 * 2 + place % 4 / 2;  // of two pairs, what is first in each
#endif
}

// to[block][token][place]: a block's values of all tokens together. token(t) is where token t's
// values lie.
template <typename Blocks, typename Token>
inline void pack_tokens(int64_t tokens, int64_t columns, TokenValue* to, Token token) {
  Words32 order = {};
  for (int i = 0; i < kBlockColumns; ++i) order[token_place<Blocks>(i)] = static_cast<uint16_t>(i);
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

// Memory for so many packed tokens.
constexpr int64_t packed_bytes(int64_t tokens, int64_t columns) {
  return tokens * columns * static_cast<int64_t>(sizeof(TokenValue));
}

// Row t of a tensor [.., columns] of bfloat16, as `pack` takes it.
inline auto rows_of(const void* tensor, int64_t columns) {
  const bfloat16* rows = static_cast<const bfloat16*>(tensor);
  return [rows, columns](int64_t t) { return rows + t * columns; };
}

// activations[:, first_row : end_row] of one group; `gate` and `up` have its expert's rows, and one
// memory for tokens; token(t) is token t of the pass. Tokens that are packed together are
// multiplied with all rows of the task before the next ones.
template <typename T, typename Rows, typename Token>
inline void gate_up_blocks(const MoePass& pass, int64_t group, int64_t first_row, int64_t end_row,
                           const Rows& gate, const Rows& up, Token token) {
  const int64_t size = pass.expert_size;
  T* activations = static_cast<T*>(pass.activations);
  gate.ask(first_row);
  up.ask(first_row);
  const int64_t begin = pass.plan.first[group], end = pass.plan.first[group + 1];
  each_token_tile(begin, end, Rows::kPackedTokens, [&](int64_t begin, int64_t tokens) {
    gate.pack(tokens, [&](int64_t t) { return token(pass.plan.pair[begin + t] / pass.top_k); });
    for (int64_t row = first_row; row < end_row; row += kTileRows) {
      Floats gates[Rows::kPackedTokens], ups[Rows::kPackedTokens];
      gate.multiply(row, tokens, gates);
      up.multiply(row, tokens, ups);
      for (int64_t t = 0; t < tokens; ++t)
        store(activations + (begin + t) * size + row, activate(gates[t], ups[t]));
    }
  });
}

// The loop that down and a dense projection share: result(t) + row .. row + 15 = rows times token
// t, for the tokens 0 to `end_token`.
template <typename Rows, typename Token, typename Result>
inline void multiply_blocks(const Rows& rows, int64_t first_row, int64_t end_row, int64_t end_token,
                            Token token, Result result) {
  rows.ask(first_row);
  each_token_tile(0, end_token, Rows::kPackedTokens, [&](int64_t begin, int64_t tokens) {
    rows.pack(tokens, [&](int64_t t) { return token(begin + t); });
    for (int64_t row = first_row; row < end_row; row += kTileRows) {
      Floats sums[Rows::kPackedTokens];
      rows.multiply(row, tokens, sums);
      for (int64_t t = 0; t < tokens; ++t) store(result(begin + t) + row, sums[t]);
    }
  });
}

// products[..., first_row : end_row] of one group's pairs; `rows` has its expert's rows of down,
// and h(i) is the activations of pair i of the plan.
template <typename Rows, typename Token>
inline void down_blocks(const MoePass& pass, int64_t group, int64_t first_row, int64_t end_row,
                        const Rows& rows, Token h) {
  const int64_t hidden = pass.hidden_size;
  const int64_t begin = pass.plan.first[group];
  multiply_blocks(
      rows, first_row, end_row, pass.plan.first[group + 1] - begin,
      [&](int64_t t) { return h(begin + t); },
      [&](int64_t t) { return pass.products + pass.plan.pair[begin + t] * hidden; });
}

}  // namespace
}  // namespace dgemma
#endif
