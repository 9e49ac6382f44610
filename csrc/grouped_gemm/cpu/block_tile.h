// The inner loop over blocks of decoded weights: some tokens times 16 rows, all of k. What follows
// is decoded between the products, in registers alone: a store takes the time of two (NOTES.md).
// AVX-512 alone.
//
// A sum takes its products in the order of the registers, whatever the number of tokens.
#pragma once

#include "grouped_gemm/cpu/block_decode.h"
#include "grouped_gemm/cpu/dot_tile.h"

#if defined(__AVX512BW__)
namespace dgemma {
namespace {

// A token's values as products take them: in pairs where an instruction multiplies those, else
// widened, which takes twice the memory: of two pairs, their first values and then their second.
#if defined(__AVX512BF16__)
typedef bfloat16 TokenValue;
#else
typedef float TokenValue;
#endif

// Tokens of a tile, each with a sum of its own: 24 of 32 registers leave enough to decode in.
constexpr int kMostTileTokens = 24;

// Eight bytes of a token, eight times over.
template <typename Value>
inline Words repeat_eight(const Value* values) {
  uint64_t bytes;
  std::memcpy(&bytes, values, sizeof bytes);
  return (Words)(Quads{} + bytes);
}

// Four columns of eight rows times those of each token; a token's block follows the one before.
template <int kTokens>
__attribute__((always_inline)) inline void multiply_columns(Words weights, const TokenValue* token,
                                                            Floats (&sums)[kTokens]) {
#pragma GCC unroll 32
  for (int t = 0; t < kTokens; ++t) {
    const TokenValue* values = token + t * kBlockColumns;
#if defined(__AVX512BF16__)
    sums[t] = (Floats)_mm512_dpbf16_ps((__m512)sums[t], (__m512bh)weights,
                                       (__m512bh)repeat_eight(values));
#else
    sums[t] = fmadd((Floats)(weights << 16), (Floats)repeat_eight(values), sums[t]);
    sums[t] = fmadd((Floats)(weights & 0xffff0000u), (Floats)repeat_eight(values + 2), sums[t]);
#endif
  }
}

// Two sums of each row, of the first eight and of the others, to 16 rows in their order.
template <typename Vector>
inline Vector add_pairs(Vector x, Vector y) {
  return __builtin_shufflevector(x, y, 0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30) +
         __builtin_shufflevector(x, y, 1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31);
}

// to[t]: 16 rows times token t. `tokens` as pack_tokens leaves them, kTokens of them; `prefetcher`
// runs meanwhile, over as much memory as the tile's codes.
template <typename Blocks, int kTokens>
__attribute__((noinline)) void multiply_tile(Blocks weights, const TokenValue* tokens,
                                             int64_t blocks, const char* prefetcher, Floats* to) {
  constexpr int64_t kBlockBytes = 8 * Blocks::kRunBytes;
#pragma GCC unroll 2
  for (int eight = 0; eight < 2; ++eight) {
    Floats sums[kTokens] = {};
    const TokenValue* token = tokens;
    weights.begin(eight);
    for (int64_t block = 0; block < blocks; ++block) {
      // The last block is decoded once more after its end: a branch would not be cheaper.
      const int64_t next = block + 1 < blocks ? block + 1 : block;
#pragma GCC unroll 4
      for (int64_t line = 0; line < kBlockBytes; line += kLineBytes)
        __builtin_prefetch(prefetcher + line, 0, 2);
      prefetcher += kBlockBytes;
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
#pragma GCC unroll 4
        for (int i = 0; i < kHalfRegisters; ++i) {
          multiply_columns<kTokens>(weights.take(half, i), token + 16 * half + 4 * i, sums);
          weights.advance(half, i, next);
        }
      }
      token += kTokens * kBlockColumns;
    }
#pragma GCC unroll 32
    for (int t = 0; t < kTokens; ++t) to[t] = eight == 0 ? sums[t] : add_pairs(to[t], sums[t]);
  }
}

// The same for a number of tokens that is not known before.
template <typename Blocks, int kTokens = kMostTileTokens>
inline void multiply_tile(const Blocks& weights, const TokenValue* tokens, int64_t count,
                          int64_t blocks, const char* prefetcher, Floats* to) {
  if constexpr (kTokens > 0) {
    if (count == kTokens)
      return multiply_tile<Blocks, kTokens>(weights, tokens, blocks, prefetcher, to);
    multiply_tile<Blocks, kTokens - 1>(weights, tokens, count, blocks, prefetcher, to);
  }
}

}  // namespace
}  // namespace dgemma
#endif
