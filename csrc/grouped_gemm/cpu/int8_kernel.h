// Products of rounded tokens with INT8 weights, summed as integers, and the tasks of the experts
// and of a dense projection. Compiled once per instruction set; see cpu/vector.h for what that
// forbids.
//
// A sum of integers is exact in any order, and nothing here is fused: every instruction set gives
// the same sums.
#pragma once

#include <type_traits>

#include "grouped_gemm/cpu/activate.h"
#include "grouped_gemm/cpu/dense.h"
#include "grouped_gemm/cpu/dot_tile.h"
#include "grouped_gemm/cpu/int8_blocks.h"
#include "grouped_gemm/cpu/int8_round.h"
#include "grouped_gemm/cpu/moe.h"
#include "grouped_gemm/cpu/weight_rows.h"

namespace dgemma {
namespace {

// Columns of a step: a register of codes.
constexpr int64_t kInt8Step =
    kLanes == 1 ? 1 : 4 * kLanes / static_cast<int64_t>(sizeof(TokenCode));
// Sums of a tile fill one register of them.
constexpr int kInt8Rows = kLanes >= 4 ? 4 : 1;
constexpr int kInt8TileTokens = kLanes / kInt8Rows;
// Tokens that are multiplied with all rows of a task before the next ones: 90 KB at the model's
// width, 180 where a code takes 16 bits.
constexpr int64_t kInt8TokensPerBlock = kLanes >= 4 ? 32 : 16;

// Bytes of a vector, wherever they lie.
template <typename Vector, typename T>
inline Vector load_bytes(const T* from) {
  Vector v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

// A step's codes of a token or of a row, and sums + weights * codes.
#if defined(__AVX512VNNI__)
typedef __m512i Int8Codes;
inline Int8Codes load_weights(const int8_t* from) {
  return _mm512_xor_si512(load_bytes<__m512i>(from), _mm512_set1_epi8(static_cast<char>(0x80)));
}
inline Ints multiply_add(Ints sums, Int8Codes weights, Int8Codes codes) {
  return (Ints)_mm512_dpbusd_epi32((__m512i)sums, weights, codes);
}
#elif defined(__AVX512BW__)
typedef __m512i Int8Codes;
inline Int8Codes load_weights(const int8_t* from) {
  return _mm512_maskz_cvtepi8_epi16(~0u, load_bytes<__m256i>(from));
}
inline Ints multiply_add(Ints sums, Int8Codes weights, Int8Codes codes) {
  return sums + (Ints)_mm512_madd_epi16(weights, codes);
}
#elif defined(__AVX2__)
typedef __m256i Int8Codes;
inline Int8Codes load_weights(const int8_t* from) {
  return _mm256_cvtepi8_epi16(load_bytes<__m128i>(from));
}
inline Ints multiply_add(Ints sums, Int8Codes weights, Int8Codes codes) {
  return sums + (Ints)_mm256_madd_epi16(weights, codes);
}
#else
typedef int8_t Int8Codes;
inline Int8Codes load_weights(const int8_t* from) { return *from; }
inline Ints multiply_add(Ints sums, Int8Codes weights, Int8Codes codes) {
  return sums + int32_t{weights} * int32_t{codes};
}
#endif

// products[t * kInt8Rows + r] = the sum over the columns of row r times token t.
template <int kTokens>
__attribute__((noinline)) void int8_tile(const int8_t* const (&rows)[kInt8Rows],
                                         const TokenCode* const* tokens, int64_t columns,
                                         int32_t* products) {
  constexpr int kSums = kTokens * kInt8Rows;
  Ints sums[kSums] = {};
  const TokenCode* x[kTokens];
#pragma GCC unroll 4
  for (int t = 0; t < kTokens; ++t) x[t] = tokens[t];
  const auto step = [&](const int8_t* const(&from)[kInt8Rows], int64_t at,
                        int64_t column) __attribute__((always_inline)) {
    // All tokens' codes first: rows then share them in registers.
    Int8Codes codes[kTokens];
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) codes[t] = load_bytes<Int8Codes>(x[t] + column);
#pragma GCC unroll 4
    for (int r = 0; r < kInt8Rows; ++r) {
      const Int8Codes weights = load_weights(from[r] + at);
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t)
        sums[t * kInt8Rows + r] = multiply_add(sums[t * kInt8Rows + r], weights, codes[t]);
    }
  };
  const int64_t whole = columns - columns % kInt8Step;
  for (int64_t column = 0; column < whole; column += kInt8Step) step(rows, column, column);
  if (whole < columns) {
    int8_t padded[kInt8Rows][kInt8Step] = {};
    const int8_t* last[kInt8Rows];
    for (int r = 0; r < kInt8Rows; ++r) {
      std::memcpy(padded[r], rows[r] + whole, static_cast<size_t>(columns - whole));
      last[r] = padded[r];
    }
    step(last, 0, whole);
  }
  const Ints folded = fold_all<kSums>(sums);
#pragma GCC unroll 16
  for (int i = 0; i < kSums; ++i) products[i] = folded[folded_lane(i)];
}

// Some tokens times rows of a matrix.
class Int8TokenBlock {
 public:
  explicit Int8TokenBlock(int64_t columns) : columns_(columns) {}

  // token(t) is the number of token t among the rounded ones.
  template <typename Token>
  void take(const Int8Tokens& rounded, int64_t tokens, Token token) {
    count_ = tokens;
    for (int64_t t = 0; t < tokens; ++t) {
      codes_[t] = codes_of(rounded, token(t), columns_);
      tokens_[t] = rounded.tokens[token(t)];
    }
  }

  // write(t, r, value) for every token t and each of the matrix's rows row .. row + rows - 1, at
  // most kInt8Rows of them.
  template <typename Write>
  __attribute__((always_inline)) void multiply(const dgemma_quantized& matrix, int64_t row,
                                               int64_t rows, const Write& write) const {
    const int8_t* from[kInt8Rows];
    for (int r = 0; r < kInt8Rows; ++r)
      from[r] =
          static_cast<const int8_t*>(matrix.values) + (row + (r < rows ? r : rows - 1)) * columns_;
    float factors[kInt8Rows];
    for (float& factor : factors) factor = 1.0f;
    if (matrix.factors != nullptr) load_row_scales(matrix, row, rows, factors);
    for (int64_t t = 0; t < count_; t += kInt8TileTokens) {
      const int64_t left = count_ - t;
      with_count(left < kInt8TileTokens ? left : kInt8TileTokens, [&](auto count) {
        constexpr int kTokens = decltype(count)::value;
        int32_t products[kTokens * kInt8Rows];
        int8_tile<kTokens>(from, codes_ + t, columns_, products);
        for (int i = 0; i < kTokens; ++i)
          for (int r = 0; r < rows; ++r)
            write(t + i, r, finish(products[i * kInt8Rows + r], tokens_[t + i]) * factors[r]);
      });
    }
  }

 private:
  static float finish(int32_t product, const Int8Token& token) {
#if defined(__AVX512VNNI__)
    product -= token.offset;
#endif
    return static_cast<float>(product) * token.scale;
  }
  template <typename Run>
  static void with_count(int64_t count, Run run) {
    if (count == 1) return run(std::integral_constant<int, 1>{});
    if constexpr (kInt8TileTokens >= 2)
      if (count == 2) return run(std::integral_constant<int, 2>{});
    if constexpr (kInt8TileTokens >= 3) {
      if (count == 3) return run(std::integral_constant<int, 3>{});
      run(std::integral_constant<int, 4>{});
    }
  }

  const int64_t columns_;
  int64_t count_ = 0;
  const TokenCode* codes_[kInt8TokensPerBlock];
  Int8Token tokens_[kInt8TokensPerBlock];
};
static_assert(kInt8TileTokens <= 4);
// Calls body(first row, rows) for the rows of a task, kInt8Rows at a time.
template <typename Body>
inline void for_each_rows(int64_t first_row, int64_t end_row, const Body& body) {
  for (int64_t row = first_row; row < end_row; row += kInt8Rows)
    body(row, end_row - row < kInt8Rows ? end_row - row : int64_t{kInt8Rows});
}

template <typename T>
void int8_gate_up_task(const MoePass& pass, int64_t group, int64_t first_row, int64_t end_row) {
  const int64_t k = pass.hidden_size, size = pass.expert_size;
  const int64_t gate = pass.plan.expert[group] * 2 * size;
  const int64_t begin = pass.plan.first[group], end = pass.plan.first[group + 1];
  T* activations = static_cast<T*>(pass.activations);
#if defined(__AVX512VNNI__)
  if (takes_int8_blocks(size, k)) return int8_gate_up_blocks<T>(pass, group, first_row, end_row);
#endif
  Int8TokenBlock tokens(k);
  for (int64_t block = begin; block < end; block += kInt8TokensPerBlock) {
    const int64_t left = end - block;
    const int64_t count = left < kInt8TokensPerBlock ? left : kInt8TokensPerBlock;
    tokens.take(pass.rounded_input, count,
                [&](int64_t t) { return pass.plan.pair[block + t] / pass.top_k; });
    for_each_rows(first_row, end_row, [&](int64_t row, int64_t rows) {
      // Whole registers of them, of which some may be of no token.
      float gates[kInt8TokensPerBlock * kInt8Rows], ups[kInt8TokensPerBlock * kInt8Rows];
      static_assert(kInt8TokensPerBlock * kInt8Rows % kLanes == 0);
      for (int i = 0; i < kInt8TokensPerBlock * kInt8Rows; ++i) gates[i] = ups[i] = 0.0f;
      tokens.multiply(*pass.quantized_gate_up, gate + row, rows,
                      [&](int64_t t, int r, float value) { gates[t * kInt8Rows + r] = value; });
      tokens.multiply(*pass.quantized_gate_up, gate + size + row, rows,
                      [&](int64_t t, int r, float value) { ups[t * kInt8Rows + r] = value; });
      T h[kInt8TokensPerBlock * kInt8Rows];
      for (int64_t i = 0; i < count * kInt8Rows; i += kLanes)
        store(h + i, activate(load(gates + i), load(ups + i)));
      for (int64_t t = 0; t < count; ++t)
        for (int64_t r = 0; r < rows; ++r)
          activations[(block + t) * size + row + r] = h[t * kInt8Rows + r];
    });
  }
}

template <typename T>
void int8_down_task(const MoePass& pass, int64_t group, int64_t first_row, int64_t end_row) {
  const int64_t k = pass.expert_size, hidden = pass.hidden_size;
  const int64_t down = pass.plan.expert[group] * hidden;
  const int64_t begin = pass.plan.first[group], end = pass.plan.first[group + 1];
#if defined(__AVX512VNNI__)
  if (takes_int8_blocks(hidden, k)) return int8_down_blocks(pass, group, first_row, end_row);
#endif
  Int8TokenBlock tokens(k);
  for (int64_t block = begin; block < end; block += kInt8TokensPerBlock) {
    const int64_t left = end - block;
    tokens.take(pass.rounded_activations, left < kInt8TokensPerBlock ? left : kInt8TokensPerBlock,
                [&](int64_t t) { return block + t; });
    for_each_rows(first_row, end_row, [&](int64_t row, int64_t rows) {
      tokens.multiply(*pass.quantized_down, down + row, rows, [&](int64_t t, int r, float value) {
        pass.products[pass.plan.pair[block + t] * hidden + row + r] = value;
      });
    });
  }
}

template <typename T>
void int8_dense_task(const DensePass& pass, int64_t first_row, int64_t end_row) {
  const dgemma_dense& op = pass.op;
  const int64_t k = op.in_features;
  T* output = static_cast<T*>(op.output);
#if defined(__AVX512VNNI__)
  if (takes_int8_blocks(op.out_features, k)) return int8_dense_blocks<T>(pass, first_row, end_row);
#endif
  Int8TokenBlock tokens(k);
  for (int64_t block = 0; block < op.rows; block += kInt8TokensPerBlock) {
    const int64_t left = op.rows - block;
    tokens.take(pass.rounded, left < kInt8TokensPerBlock ? left : kInt8TokensPerBlock,
                [&](int64_t t) { return block + t; });
    for_each_rows(first_row, end_row, [&](int64_t row, int64_t rows) {
      tokens.multiply(*pass.weight, row, rows, [&](int64_t t, int r, float value) {
        output[(block + t) * op.out_features + row + r] = round_to<T>(value);
      });
    });
  }
}

}  // namespace
}  // namespace dgemma
