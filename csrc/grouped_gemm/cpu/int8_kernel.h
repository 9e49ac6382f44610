// The tasks of INT8 weights: tokens are rounded to int8 too, each under a scale of its own, and
// products are summed as integers. Compiled once per instruction set; see cpu/vector.h for what
// that forbids.
//
// A sum of integers is exact in any order, and nothing here is fused: every instruction set gives
// the same sums.
#pragma once

#include "grouped_gemm/cpu/activate.h"
#include "grouped_gemm/cpu/dense.h"
#include "grouped_gemm/cpu/dot_tile.h"
#include "grouped_gemm/cpu/moe.h"
#include "grouped_gemm/cpu/weight_rows.h"

namespace dgemma {
namespace {

// How a token's codes lie, and how many columns a step takes. VNNI multiplies unsigned bytes by
// signed ones: the weights are made unsigned by 128, which the token's sum takes back. Without it
// both are widened to 16 bits, whose pairs of products do not overflow.
#if defined(__AVX512VNNI__)
typedef int8_t TokenCode;
constexpr int64_t kInt8Step = 64;
#elif defined(__AVX2__)
typedef int16_t TokenCode;
constexpr int64_t kInt8Step = 2 * kLanes;
#else
typedef int8_t TokenCode;
constexpr int64_t kInt8Step = 1;
#endif
// Sums of a tile fill one register of them.
constexpr int kInt8Rows = kLanes >= 4 ? 4 : 1;
constexpr int kInt8TileTokens = kLanes / kInt8Rows;
// Tokens that are rounded before they are multiplied with all rows of a task: 512 KB at the most
// columns, on the task's stack.
constexpr int64_t kInt8TokensPerBlock = kLanes >= 4 ? 32 : 16;
constexpr float kLargestCode = 127.0f;

constexpr int64_t int8_stride(int64_t columns) {
  return (columns + kInt8Step - 1) / kInt8Step * kInt8Step;
}

// To the nearest integer, ties to even.
inline Ints round_to_int(Floats x) {
#if defined(__AVX512F__)
  return (Ints)_mm512_maskz_cvtps_epi32(0xffff, (__m512)x);
#elif defined(__AVX2__)
  return (Ints)_mm256_cvtps_epi32((__m256)x);
#else
  return (Ints)(x + 12582912.0f) - 0x4b400000;  // compiled without contraction
#endif
}

// What is taken back of a token's products: 128 times the sum of its codes, and its scale.
struct Int8Token {
  float scale;
  int32_t offset;
};

// A token divided by its largest magnitude / 127, to the nearest; `to` is filled up with zeros.
template <typename T>
inline Int8Token round_token(const T* x, int64_t columns, TokenCode* to) {
  typedef TokenCode Codes __attribute__((vector_size(sizeof(TokenCode) * kLanes)));
  Floats largest = {};
  const auto at = [&](int64_t i) __attribute__((always_inline)) {
    return i + kLanes <= columns ? load(x + i) : load_partial(x + i, columns - i);
  };
  for (int64_t i = 0; i < columns; i += kLanes) {
    const Floats v = at(i);
    largest = max(largest, v < 0.0f ? -v : v);
  }
  const float most = maximum(largest);
  const float inverse = most > 0.0f ? kLargestCode / most : 0.0f;
  Ints sum = {};
  for (int64_t i = 0; i < columns; i += kLanes) {
    const Ints codes = round_to_int(at(i) * inverse);
    sum += codes;
    const Codes narrow = __builtin_convertvector(codes, Codes);
    const int64_t left = columns - i;
    std::memcpy(to + i, &narrow,
                sizeof(TokenCode) * static_cast<size_t>(left < kLanes ? left : kLanes));
  }
  for (int64_t i = columns; i < int8_stride(columns); ++i) to[i] = 0;
  int32_t total = 0;
  for (int i = 0; i < kLanes; ++i) total += sum[i];
  return {most / kLargestCode, 128 * total};
}

// A step's weights, a token's codes, and sums + weights * codes.
#if defined(__AVX512VNNI__)
typedef __m512i Int8Weights, Int8Codes;
inline Int8Weights load_int8(const int8_t* from) {
  __m512i v;
  std::memcpy(&v, from, sizeof v);
  return _mm512_xor_si512(v, _mm512_set1_epi8(static_cast<char>(0x80)));
}
inline Int8Codes load_codes(const TokenCode* from) {
  __m512i v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
inline Ints multiply_add(Ints sums, Int8Weights weights, Int8Codes codes) {
  return (Ints)_mm512_dpbusd_epi32((__m512i)sums, weights, codes);
}
#elif defined(__AVX512BW__)
typedef __m512i Int8Weights, Int8Codes;
inline Int8Weights load_int8(const int8_t* from) {
  __m256i v;
  std::memcpy(&v, from, sizeof v);
  return _mm512_maskz_cvtepi8_epi16(~0u, v);
}
inline Int8Codes load_codes(const TokenCode* from) {
  __m512i v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
inline Ints multiply_add(Ints sums, Int8Weights weights, Int8Codes codes) {
  return sums + (Ints)_mm512_madd_epi16(weights, codes);
}
#elif defined(__AVX2__)
typedef __m256i Int8Weights, Int8Codes;
inline Int8Weights load_int8(const int8_t* from) {
  __m128i v;
  std::memcpy(&v, from, sizeof v);
  return _mm256_cvtepi8_epi16(v);
}
inline Int8Codes load_codes(const TokenCode* from) {
  __m256i v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
inline Ints multiply_add(Ints sums, Int8Weights weights, Int8Codes codes) {
  return sums + (Ints)_mm256_madd_epi16(weights, codes);
}
#else
typedef int32_t Int8Weights, Int8Codes;
inline Int8Weights load_int8(const int8_t* from) { return *from; }
inline Int8Codes load_codes(const TokenCode* from) { return *from; }
inline Ints multiply_add(Ints sums, Int8Weights weights, Int8Codes codes) {
  return sums + weights * codes;
}
#endif

// products[t * kInt8Rows + r] = the sum over the columns of row r times token t.
template <int kTokens>
__attribute__((noinline)) void int8_tile(const int8_t* const (&rows)[kInt8Rows],
                                         const TokenCode* tokens, int64_t columns,
                                         int32_t* products) {
  constexpr int kSums = kTokens * kInt8Rows;
  Ints sums[kSums] = {};
  const int64_t stride = int8_stride(columns);
  const auto step = [&](const int8_t* const(&from)[kInt8Rows], int64_t at,
                        int64_t column) __attribute__((always_inline)) {
    // All tokens' codes first: rows then share them in registers.
    Int8Codes codes[kTokens];
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) codes[t] = load_codes(tokens + t * stride + column);
#pragma GCC unroll 4
    for (int r = 0; r < kInt8Rows; ++r) {
      const Int8Weights weights = load_int8(from[r] + at);
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

// Some tokens, rounded, times rows of a matrix.
class Int8Tokens {
 public:
  // Memory of `scratch` for a block of tokens of so many columns.
  static constexpr int64_t scratch_bytes(int64_t columns) {
    return kInt8TokensPerBlock * int8_stride(columns) * static_cast<int64_t>(sizeof(TokenCode));
  }
  Int8Tokens(int64_t columns, void* scratch)
      : columns_(columns), codes_(static_cast<TokenCode*>(scratch)) {}

  // token(t) is where token t's values lie.
  template <typename Token>
  void round(int64_t tokens, Token token) {
    count_ = tokens;
    for (int64_t t = 0; t < tokens; ++t)
      tokens_[t] = round_token(token(t), columns_, codes_ + t * int8_stride(columns_));
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
        int8_tile<kTokens>(from, codes_ + t * int8_stride(columns_), columns_, products);
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
  TokenCode* const codes_;
  int64_t count_ = 0;
  Int8Token tokens_[kInt8TokensPerBlock];
};
static_assert(kInt8TileTokens <= 4);
#define DGEMMA_INT8_SCRATCH(columns)                                                   \
  __builtin_alloca_with_align(static_cast<size_t>(Int8Tokens::scratch_bytes(columns)), \
                              512 /* bits */)

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
  const T* input = static_cast<const T*>(pass.input);
  T* activations = static_cast<T*>(pass.activations);
  Int8Tokens tokens(k, DGEMMA_INT8_SCRATCH(k));
  for (int64_t block = begin; block < end; block += kInt8TokensPerBlock) {
    const int64_t left = end - block;
    const int64_t count = left < kInt8TokensPerBlock ? left : kInt8TokensPerBlock;
    tokens.round(count,
                 [&](int64_t t) { return input + pass.plan.pair[block + t] / pass.top_k * k; });
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
  const T* activations = static_cast<const T*>(pass.activations);
  Int8Tokens tokens(k, DGEMMA_INT8_SCRATCH(k));
  for (int64_t block = begin; block < end; block += kInt8TokensPerBlock) {
    const int64_t left = end - block;
    tokens.round(left < kInt8TokensPerBlock ? left : kInt8TokensPerBlock,
                 [&](int64_t t) { return activations + (block + t) * k; });
    for_each_rows(first_row, end_row, [&](int64_t row, int64_t rows) {
      tokens.multiply(*pass.quantized_down, down + row, rows, [&](int64_t t, int r, float value) {
        pass.products[pass.plan.pair[block + t] * hidden + row + r] = value;
      });
    });
  }
}

template <typename T>
void int8_dense_task(const dgemma_dense& op, const dgemma_quantized& weight, int64_t first_row,
                     int64_t end_row) {
  const int64_t k = op.in_features;
  const T* input = static_cast<const T*>(op.input);
  T* output = static_cast<T*>(op.output);
  Int8Tokens tokens(k, DGEMMA_INT8_SCRATCH(k));
  for (int64_t block = 0; block < op.rows; block += kInt8TokensPerBlock) {
    const int64_t left = op.rows - block;
    tokens.round(left < kInt8TokensPerBlock ? left : kInt8TokensPerBlock,
                 [&](int64_t t) { return input + (block + t) * k; });
    for_each_rows(first_row, end_row, [&](int64_t row, int64_t rows) {
      tokens.multiply(weight, row, rows, [&](int64_t t, int r, float value) {
        output[(block + t) * op.out_features + row + r] = round_to<T>(value);
      });
    });
  }
}

}  // namespace
}  // namespace dgemma
