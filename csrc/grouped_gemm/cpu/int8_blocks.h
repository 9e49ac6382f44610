// INT8 weights as they lie in memory, by blocks, times rounded tokens. AVX-512 with products of
// int8 alone. Compiled once per instruction set; see cpu/vector.h for what that forbids.
#pragma once

#include "grouped_gemm/cpu/dense.h"
#include "grouped_gemm/cpu/int8_round.h"
#include "grouped_gemm/cpu/plain_tile.h"
#include "grouped_gemm/cpu/weight_rows.h"

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)
namespace dgemma {
namespace {

// True when a matrix of so many rows and columns is multiplied by blocks, whatever the tokens were.
inline bool takes_int8_blocks(int64_t rows, int64_t columns) {
  return rows % kTileRows == 0 && columns % kPlainColumns<Int8Products> == 0;
}

// Sixteen rows at a time of a matrix in INT8, times packed tokens.
class Int8BlockRows {
 public:
  // Four tiles of ten: 110 KiB at the model's width, an eighth of the second-level cache.
  static constexpr int64_t kPackedTokens = 40;

  // Memory for a task: 640 KiB of its stack at most.
  static constexpr int64_t scratch_bytes(int64_t columns) { return kPackedTokens * columns; }

  // A token that was rounded before, by its number.
  struct Token {
    const Int8Tokens& rounded;
    int64_t number;
  };

  // Row 0 stands for `first_row` of the matrix; `scratch` has scratch_bytes, and `tokens` place for
  // kPackedTokens.
  Int8BlockRows(const dgemma_quantized& matrix, int64_t first_row, int64_t columns, void* scratch,
                Int8Token* tokens)
      : matrix_(matrix),
        first_row_(first_row),
        columns_(columns),
        codes_(static_cast<int8_t*>(scratch)),
        tokens_(tokens) {}

  // Packs up to kPackedTokens tokens for the products that follow.
  template <typename TokenAt>
  void pack(int64_t tokens, TokenAt token) const {
    each_token_tile(0, tokens, kMostPlainTokens, [&](int64_t begin, int64_t count) {
      const auto codes = [&](int64_t t) {
        const int64_t place = t < count ? begin + t : 0;
        const Token one = token(place);
        tokens_[place] = one.rounded.tokens[one.number];
        return codes_of(one.rounded, one.number, columns_);
      };
      pack_plain_tokens<Int8Products>(filled_tokens(tokens, count), columns_,
                                      codes_ + begin * columns_, codes);
    });
  }

  // Prefetches a task's first tile, which no tile before it did.
  void ask(int64_t row) const { prefetch_plain_tile(values(row), columns_); }

  // sums[t]: rows row to row + 15 times token t of those that are packed, with both scales.
  void multiply(int64_t row, int64_t tokens, Floats* sums) const {
    float factors[kTileRows];
    for (float& factor : factors) factor = 1.0f;
    if (matrix_.factors != nullptr) load_row_scales(matrix_, first_row_ + row, kTileRows, factors);
    each_token_tile(0, tokens, kMostPlainTokens, [&](int64_t begin, int64_t count) {
      Ints products[kMostPlainTokens] = {};  // the compiler cannot see that all are written
      multiply_packed<Int8Products>(values(row), columns_, codes_, tokens, begin, count, products);
      for (int64_t t = 0; t < count; ++t) {
        const Int8Token& token = tokens_[begin + t];
        sums[begin + t] = __builtin_convertvector(products[t] - token.offset, Floats) *
                          token.scale * load(factors);
      }
    });
  }

 private:
  const int8_t* values(int64_t row) const {
    return static_cast<const int8_t*>(matrix_.values) + (first_row_ + row) * columns_;
  }

  const dgemma_quantized matrix_;
  const int64_t first_row_;
  const int64_t columns_;
  int8_t* const codes_;
  Int8Token* const tokens_;
};

// Memory for packed tokens, in the caller's frame.
#define DGEMMA_INT8_SCRATCH(columns)                                                      \
  __builtin_alloca_with_align(static_cast<size_t>(Int8BlockRows::scratch_bytes(columns)), \
                              512 /* bits */)

template <typename T>
inline void int8_gate_up_blocks(const MoePass& pass, int64_t group, int64_t first_row,
                                int64_t end_row) {
  const int64_t k = pass.hidden_size, size = pass.expert_size;
  const int64_t gate = pass.plan.expert[group] * 2 * size;
  void* const scratch = DGEMMA_INT8_SCRATCH(k);
  Int8Token tokens[Int8BlockRows::kPackedTokens];
  gate_up_blocks<T>(pass, group, first_row, end_row,
                    Int8BlockRows(*pass.quantized_gate_up, gate, k, scratch, tokens),
                    Int8BlockRows(*pass.quantized_gate_up, gate + size, k, scratch, tokens),
                    [&](int64_t t) { return Int8BlockRows::Token{pass.rounded_input, t}; });
}

inline void int8_down_blocks(const MoePass& pass, int64_t group, int64_t first_row,
                             int64_t end_row) {
  const int64_t k = pass.expert_size;
  Int8Token tokens[Int8BlockRows::kPackedTokens];
  down_blocks(pass, group, first_row, end_row,
              Int8BlockRows(*pass.quantized_down, pass.plan.expert[group] * pass.hidden_size, k,
                            DGEMMA_INT8_SCRATCH(k), tokens),
              [&](int64_t pair) { return Int8BlockRows::Token{pass.rounded_activations, pair}; });
}

template <typename T>
inline void int8_dense_blocks(const DensePass& pass, int64_t first_row, int64_t end_row) {
  const dgemma_dense& op = pass.op;
  T* output = static_cast<T*>(op.output);
  Int8Token tokens[Int8BlockRows::kPackedTokens];
  multiply_blocks(
      Int8BlockRows(*pass.weight, 0, op.in_features, DGEMMA_INT8_SCRATCH(op.in_features), tokens),
      first_row, end_row, op.rows, [&](int64_t t) { return Int8BlockRows::Token{pass.rounded, t}; },
      [&](int64_t t) { return output + t * op.out_features; });
}

}  // namespace
}  // namespace dgemma
#endif
