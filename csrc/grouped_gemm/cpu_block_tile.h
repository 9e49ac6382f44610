// The inner loop over blocks of decoded weights: some tokens times 16 rows, all of k. The next
// block is decoded between the products of one. AVX-512 alone.
//
// A sum takes its products in the order of a block's registers, whatever the number of tokens.
#pragma once

#include "grouped_gemm/cpu_block_decode.h"
#include "grouped_gemm/cpu_dot_tile.h"

#if defined(__AVX512BW__)
namespace dgemma {
namespace {

// A token's values as products take them: in pairs where an instruction multiplies those, else
// widened, which takes twice the memory. Tokens of a tile, each with a sum of its own: more than 24
// of 32 registers leave too few to decode in (NOTES.md).
#if defined(__AVX512BF16__)
typedef bfloat16 TokenValue;
constexpr int kMostBlockTokens = 24;
#else
typedef float TokenValue;
constexpr int kMostBlockTokens = 12;
#endif

// Two columns of 16 rows times those of each token; a token's block follows the one before.
template <int kTokens>
__attribute__((always_inline)) inline void multiply_columns(Words weights, const TokenValue* token,
                                                            Floats (&sums)[kTokens]) {
#pragma GCC unroll 32
  for (int t = 0; t < kTokens; ++t) {
    const TokenValue* values = token + t * kBlockColumns;
#if defined(__AVX512BF16__)
    uint32_t pair;
    std::memcpy(&pair, values, sizeof pair);
    sums[t] =
        (Floats)_mm512_dpbf16_ps((__m512)sums[t], (__m512bh)weights, (__m512bh)(Words{} + pair));
#else
    sums[t] = fmadd((Floats)(weights << 16), broadcast(values[0]), sums[t]);
    sums[t] = fmadd((Floats)(weights & 0xffff0000u), broadcast(values[1]), sums[t]);
#endif
  }
}

// sums[t]: 16 rows times token t. `tokens` as pack_tokens leaves them, kTokens of them; `ahead` is
// asked for meanwhile, as much memory as the tile's codes.
template <dgemma_weight_format kFormat, int kTokens>
__attribute__((noinline)) void multiply_tile(BlockDecoder<kFormat> decoder,
                                             const TokenValue* tokens, int64_t blocks,
                                             const char* ahead, Floats* to) {
  Words weights[2][kBlockRegisters];
  Floats sums[kTokens] = {};
  const auto at_most_last = [&](int64_t block) { return block < blocks ? block : blocks - 1; };
  decoder.begin(0);
#pragma GCC unroll 16
  for (int part = 0; part < kBlockRegisters; ++part)
    decoder.make(part, 0, at_most_last(1), weights[0]);
  for (int64_t block = 0; block < blocks; ++block) {
    const Words* now = weights[block % 2];
    Words* next = weights[1 - block % 2];
#pragma GCC unroll 8
    for (int64_t line = 0; line < kBlockRows * BlockDecoder<kFormat>::kRunBytes / kLineBytes;
         ++line)
      __builtin_prefetch(ahead + line * kLineBytes, 0, 2);
    ahead += kBlockRows * BlockDecoder<kFormat>::kRunBytes;
#pragma GCC unroll 16
    for (int i = 0; i < kBlockRegisters; ++i) {
      multiply_columns<kTokens>(now[i], tokens + 2 * i, sums);
      // After the last block it is decoded once more: a branch would not be cheaper.
      decoder.make(i, at_most_last(block + 1), at_most_last(block + 2), next);
    }
    tokens += kTokens * kBlockColumns;
  }
#pragma GCC unroll 32
  for (int t = 0; t < kTokens; ++t) to[t] = sums[t];
}

// The same for a number of tokens that is not known before.
template <dgemma_weight_format kFormat, int kTokens = kMostBlockTokens>
inline void multiply_tile(const BlockDecoder<kFormat>& decoder, const TokenValue* tokens,
                          int64_t count, int64_t blocks, const char* ahead, Floats* to) {
  if constexpr (kTokens > 0) {
    if (count == kTokens)
      return multiply_tile<kFormat, kTokens>(decoder, tokens, blocks, ahead, to);
    multiply_tile<kFormat, kTokens - 1>(decoder, tokens, count, blocks, ahead, to);
  }
}

}  // namespace
}  // namespace dgemma
#endif
