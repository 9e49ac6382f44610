// A tile of 16 rows as they lie in memory, by blocks of 64 bytes: nothing is decoded, so registers
// are left for both eights of its rows at once, and eight bytes of a token are repeated once for
// the two. Values of bfloat16 or int8; AVX-512 with dot products of both. Compiled once per
// instruction set; see cpu/vector.h for what that forbids.
#pragma once

#include "grouped_gemm/cpu/block_kernel.h"

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)
namespace dgemma {
namespace {

// Tokens of a tile, each with two sums: 20 of 32 registers leave 8 for half a block of 16 rows.
constexpr int kMostPlainTokens = 10;
// Fewer than that would ask for memory faster than it comes, which makes it come slower (NOTES.md).
constexpr int kLeastPlainTokens = 6;

// Tokens that a tile multiplies where it has `count` of all `tokens`: only what has few in all is
// filled up, since later tiles have their rows from the cache.
constexpr int64_t filled_tokens(int64_t tokens, int64_t count) {
  return tokens < kLeastPlainTokens ? kLeastPlainTokens : count;
}

// The products of a kind of values: a register has eight bytes of each of eight rows, and a row has
// two sums.
struct Bfloat16Products {
  typedef bfloat16 Value;
  typedef Floats Sums;
  static Words prepare(Words weights) { return weights; }
  static Sums multiply_add(Sums sums, Words weights, Words token) {
    return (Sums)_mm512_dpbf16_ps((__m512)sums, (__m512bh)weights, (__m512bh)token);
  }
};
// Weights are made unsigned by 128: cpu/int8_round.h.
struct Int8Products {
  typedef int8_t Value;
  typedef Ints Sums;
  static Words prepare(Words weights) { return weights ^ 0x80808080u; }
  static Sums multiply_add(Sums sums, Words weights, Words token) {
    return (Sums)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)weights, (__m512i)token);
  }
};

// Values of eight bytes, and of a block.
template <typename Products>
constexpr int64_t kRunValues = 8 / static_cast<int64_t>(sizeof(typename Products::Value));
template <typename Products>
constexpr int64_t kPlainColumns = 8 * kRunValues<Products>;

// to[block][token][..]: a block's values of all tokens together, the even eights of bytes before
// the odd ones. token(t) is where token t's values lie.
template <typename Products, typename Token>
inline void pack_plain_tokens(int64_t tokens, int64_t columns, typename Products::Value* to,
                              Token token) {
  constexpr int64_t kBlock = kPlainColumns<Products>;
  for (int64_t t = 0; t < tokens; ++t) {
    const typename Products::Value* from = token(t);
    for (int64_t column = 0; column < columns; column += kBlock) {
      const Quads x = load_as<Quads>(from + column);
      const Quads ordered = __builtin_shufflevector(x, x, 0, 2, 4, 6, 1, 3, 5, 7);
      std::memcpy(to + column * tokens + t * kBlock, &ordered, sizeof ordered);
    }
  }
}

// Half a block of eight rows, the even or the odd eights of bytes: registers of eight bytes of each
// row, a row in each 64-bit lane, as cpu/block_decode.h has them, in the order of the columns.
template <typename Value>
struct HalfBlock {
  Quads parts[4];

  // In each 128-bit part, the even or the odd eight bytes of a row and of the next.
  static Quads interleave(const Value* row, int64_t stride, int half) {
    const Quads x = load_as<Quads>(row), y = load_as<Quads>(row + stride);
    return half == 0 ? __builtin_shufflevector(x, y, 0, 8, 2, 10, 4, 12, 6, 14)
                     : __builtin_shufflevector(x, y, 1, 9, 3, 11, 5, 13, 7, 15);
  }
  // Of four rows from each of `fours` the first two (eight 0) or the last two (eight 1).
  __attribute__((always_inline)) HalfBlock(const Value* const (&fours)[4], int64_t stride,
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

// Prefetches 16 rows for a tile that begins at once, as a tile does for the next one.
template <typename Value>
inline void prefetch_plain_tile(const Value* rows, int64_t stride) {
  constexpr int64_t kLineValues = kLineBytes / static_cast<int64_t>(sizeof(Value));
  for (int64_t column = 0; column < stride; column += kLineValues)
    for (int row = 0; row < kTileRows; ++row)
      __builtin_prefetch(rows + row * stride + column, 0, 2);
}

// to[t]: 16 rows, `stride` values apart, times token t of kTokens. The 16 rows after them, or with
// two shares every other pair of them, are prefetched meanwhile, in the order in which the next
// tile reads them: the processor's own prefetchers follow sixteen rows at once, each within its
// page, and go further ahead than by one.
template <typename Products, int kShares, int kTokens>
__attribute__((noinline)) void multiply_plain_tile(const typename Products::Value* rows,
                                                   int64_t stride,
                                                   const typename Products::Value* tokens,
                                                   int64_t share, typename Products::Sums* to) {
  typedef typename Products::Value Value;
  typename Products::Sums sums[2][kTokens] = {};
  const Value* fours[4] = {rows, rows + 4 * stride, rows + 8 * stride, rows + 12 * stride};
  const Value* next[4];
  for (int i = 0; i < 4; ++i) next[i] = fours[i] + (kTileRows + 2 * share) * stride;
  const Value* const end = rows + stride;
  while (fours[0] != end) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const HalfBlock<Value> first(fours, stride, 0, half), second(fours, stride, 1, half);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        if (i % kShares == 0) {
          const Value* const ahead = next[2 * half + i / 2] + i % 2 * 2 * stride;
          __builtin_prefetch(ahead, 0, 2);
          __builtin_prefetch(ahead + stride, 0, 2);
        }
        const Words x = Products::prepare(first.take(i)), y = Products::prepare(second.take(i));
#pragma GCC unroll 16
        for (int t = 0; t < kTokens; ++t) {
          const Words token = repeat_eight(tokens + t * kPlainColumns<Products> +
                                           (4 * half + i) * kRunValues<Products>);
          sums[0][t] = Products::multiply_add(sums[0][t], x, token);
          sums[1][t] = Products::multiply_add(sums[1][t], y, token);
        }
      }
    }
    tokens += kTokens * kPlainColumns<Products>;
    for (const Value*& four : fours) four += kPlainColumns<Products>;
    for (const Value*& four : next) four += kPlainColumns<Products>;
  }
#pragma GCC unroll 16
  for (int t = 0; t < kTokens; ++t) to[t] = add_pairs(sums[0][t], sums[1][t]);
}

// The same for a number of tokens that is not known before.
template <typename Products, int kShares, int kTokens = kMostPlainTokens>
inline void multiply_plain_tile(const typename Products::Value* rows, int64_t stride,
                                const typename Products::Value* tokens, int64_t count,
                                int64_t share, typename Products::Sums* to) {
  if constexpr (kTokens > 0) {
    if (count == kTokens)
      return multiply_plain_tile<Products, kShares, kTokens>(rows, stride, tokens, share, to);
    multiply_plain_tile<Products, kShares, kTokens - 1>(rows, stride, tokens, count, share, to);
  }
}

// to[t]: 16 rows times `count` of all packed `tokens` from `begin` on; kLeastPlainTokens are
// written at least. Where there are more tiles than one, the first two share the next rows: memory
// has the time of both to give them, which counts where several threads read at once (NOTES.md).
template <typename Products>
inline void multiply_packed(const typename Products::Value* rows, int64_t stride,
                            const typename Products::Value* packed, int64_t tokens, int64_t begin,
                            int64_t count, typename Products::Sums* to) {
  packed += begin * stride;
  count = filled_tokens(tokens, count);
  if (tokens <= kMostPlainTokens)
    multiply_plain_tile<Products, 1>(rows, stride, packed, count, 0, to);
  else
    multiply_plain_tile<Products, 2>(rows, stride, packed, count, begin > 0, to);
}

}  // namespace
}  // namespace dgemma
#endif
