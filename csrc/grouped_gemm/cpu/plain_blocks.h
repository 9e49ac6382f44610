// Weights in bfloat16 as they lie in memory, by blocks: nothing is decoded, so registers are left
// for both eights of a tile's rows at once, and four values of a token are repeated once for the
// two. AVX-512 with products of bfloat16 alone. Compiled once per instruction set; see cpu/vector.h
// for what that forbids.
#pragma once

#include "grouped_gemm/cpu/block_kernel.h"

#if defined(__AVX512BF16__)
namespace dgemma {
namespace {

// Tokens of a tile, each with two sums: 20 of 32 registers leave 8 for half a block of 16 rows.
constexpr int kMostPlainTokens = 10;

// The place of a block's column i: the even fours of columns come first, then the odd ones.
struct PlainBlocks {
  static constexpr int place(int i) { return i / 4 % 2 * 16 + i / 8 * 4 + i % 4; }
};

// Half a block of eight rows, the even or the odd fours of columns: registers of four columns, a
// row in each 64-bit lane, as cpu/block_decode.h has them, in the order of the columns.
struct HalfBlock {
  Quads parts[4];

  // In each 128-bit part, the even or the odd four columns of a row and of the next.
  static Quads interleave(const bfloat16* row, int64_t stride, int half) {
    const Quads x = load_as<Quads>(row), y = load_as<Quads>(row + stride);
    return half == 0 ? __builtin_shufflevector(x, y, 0, 8, 2, 10, 4, 12, 6, 14)
                     : __builtin_shufflevector(x, y, 1, 9, 3, 11, 5, 13, 7, 15);
  }
  // Of four rows from each of `fours` the first two (eight 0) or the last two (eight 1).
  __attribute__((always_inline)) HalfBlock(const bfloat16* const (&fours)[4], int64_t stride,
                                           int eight, int half) {
#pragma GCC unroll 2
    for (int a = 0; a < 2; ++a) {
      const Quads x = interleave(fours[2 * a] + 2 * eight * stride, stride, half);
      const Quads y = interleave(fours[2 * a + 1] + 2 * eight * stride, stride, half);
      parts[a] = __builtin_shufflevector(x, y, 0, 1, 2, 3, 8, 9, 10, 11);
      parts[2 + a] = __builtin_shufflevector(x, y, 4, 5, 6, 7, 12, 13, 14, 15);
    }
  }
  __attribute__((always_inline)) Words take(int i) const {
    const Quads x = parts[i / 2 * 2], y = parts[i / 2 * 2 + 1];
    return i % 2 == 0 ? (Words)__builtin_shufflevector(x, y, 0, 1, 4, 5, 8, 9, 12, 13)
                      : (Words)__builtin_shufflevector(x, y, 2, 3, 6, 7, 10, 11, 14, 15);
  }
};

// to[t]: 16 rows, `stride` values apart, times token t of kTokens. `prefetcher` runs meanwhile over
// as much memory as the rows take.
template <int kTokens>
__attribute__((noinline)) void multiply_plain_tile(const bfloat16* rows, int64_t stride,
                                                   const bfloat16* tokens, const char* prefetcher,
                                                   Floats* to) {
  Floats sums[2][kTokens] = {};
  const bfloat16* fours[4] = {rows, rows + 4 * stride, rows + 8 * stride, rows + 12 * stride};
  const bfloat16* const end = rows + stride;
  while (fours[0] != end) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const HalfBlock first(fours, stride, 0, half), second(fours, stride, 1, half);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        __builtin_prefetch(prefetcher, 0, 2);
        __builtin_prefetch(prefetcher + kLineBytes, 0, 2);
        prefetcher += 2 * kLineBytes;
        const Words x = first.take(i), y = second.take(i);
#pragma GCC unroll 16
        for (int t = 0; t < kTokens; ++t) {
          const __m512bh token =
              (__m512bh)repeat_eight(tokens + t * kBlockColumns + 16 * half + 4 * i);
          sums[0][t] = (Floats)_mm512_dpbf16_ps((__m512)sums[0][t], (__m512bh)x, token);
          sums[1][t] = (Floats)_mm512_dpbf16_ps((__m512)sums[1][t], (__m512bh)y, token);
        }
      }
    }
    tokens += kTokens * kBlockColumns;
    for (const bfloat16*& four : fours) four += kBlockColumns;
  }
#pragma GCC unroll 16
  for (int t = 0; t < kTokens; ++t) to[t] = add_pairs(sums[0][t], sums[1][t]);
}

// The same for a number of tokens that is not known before.
template <int kTokens = kMostPlainTokens>
inline void multiply_plain_tile(const bfloat16* rows, int64_t stride, const bfloat16* tokens,
                                int64_t count, const char* prefetcher, Floats* to) {
  if constexpr (kTokens > 0) {
    if (count == kTokens) return multiply_plain_tile<kTokens>(rows, stride, tokens, prefetcher, to);
    multiply_plain_tile<kTokens - 1>(rows, stride, tokens, count, prefetcher, to);
  }
}

// Sixteen rows at a time of a matrix in bfloat16, times packed tokens.
class PlainBlockRows {
 public:
  // Five tiles of eight: 220 KiB at the model's width, a quarter of the second-level cache.
  static constexpr int64_t kPackedTokens = 40;
  // 640 KiB of a task's stack at most.
  static constexpr int64_t kMostColumns = 8192;

  // `scratch` has packed_bytes of kPackedTokens.
  PlainBlockRows(const bfloat16* matrix, int64_t columns, void* scratch)
      : matrix_(matrix), columns_(columns), tokens_(static_cast<bfloat16*>(scratch)) {}

  // Packs up to kPackedTokens tokens for the products that follow.
  template <typename Token>
  void pack(int64_t tokens, Token token) const {
    each_token_tile(0, tokens, kMostPlainTokens, [&](int64_t begin, int64_t count) {
      pack_tokens<PlainBlocks>(count, columns_, tokens_ + begin * columns_,
                               [&](int64_t t) { return token(begin + t); });
    });
  }

  // Prefetches a task's first tile, which no tile before it did.
  void ask(int64_t row) const {
    const char* from = reinterpret_cast<const char*>(matrix_ + row * columns_);
    for (int64_t i = 0; i < kTileRows * columns_ * 2; i += kLineBytes)
      __builtin_prefetch(from + i, 0, 2);
  }

  // sums[t]: rows row to row + 15 times token t of those that are packed.
  void multiply(int64_t row, int64_t tokens, Floats* sums) const {
    const bfloat16* first = matrix_ + row * columns_;
    each_token_tile(0, tokens, kMostPlainTokens, [&](int64_t begin, int64_t count) {
      multiply_plain_tile(first, columns_, tokens_ + begin * columns_, count,
                          reinterpret_cast<const char*>(first + kTileRows * columns_),
                          sums + begin);
    });
  }

 private:
  const bfloat16* const matrix_;
  const int64_t columns_;
  bfloat16* const tokens_;
};

// Memory for packed tokens, in the caller's frame.
#define DGEMMA_PACKED_SCRATCH(columns) \
  __builtin_alloca_with_align(         \
      static_cast<size_t>(packed_bytes(PlainBlockRows::kPackedTokens, columns)), 512 /* bits */)

}  // namespace
}  // namespace dgemma
#endif
