// Weights in bfloat16 as they lie in memory, by blocks. AVX-512 with products of bfloat16 alone.
// Compiled once per instruction set; see cpu/vector.h for what that forbids.
#pragma once

#include "grouped_gemm/cpu/plain_tile.h"

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)
namespace dgemma {
namespace {

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
      pack_plain_tokens<Bfloat16Products>(
          filled_tokens(tokens, count), columns_, tokens_ + begin * columns_,
          [&](int64_t t) { return token(t < count ? begin + t : 0); });
    });
  }

  // Prefetches a task's first tile, which no tile before it did.
  void ask(int64_t row) const { prefetch_plain_tile(matrix_ + row * columns_, columns_); }

  // sums[t]: rows row to row + 15 times token t of those that are packed; kLeastPlainTokens of them
  // are written at least.
  void multiply(int64_t row, int64_t tokens, Floats* sums) const {
    const bfloat16* first = matrix_ + row * columns_;
    each_token_tile(0, tokens, kMostPlainTokens, [&](int64_t begin, int64_t count) {
      multiply_packed<Bfloat16Products>(first, columns_, tokens_, tokens, begin, count,
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
