// The bit rows that say which tokens a position may hold.
#pragma once

#include <cstdint>

#include "dgemma/denoise.h"

namespace dgemma {
namespace {

inline int64_t words_per_row(int64_t vocabulary) { return (vocabulary + 31) / 32; }

// The bit row of a position, or NULL when it may hold every token.
inline const int32_t* allowed_bits(const dgemma_allowed& allowed, int64_t vocabulary,
                                   int64_t position) {
  if (allowed.mask == nullptr) return nullptr;
  const int32_t row = allowed.row_index[position];
  return row < 0 ? nullptr : allowed.mask + row * words_per_row(vocabulary);
}

// One word of a row; bits past the vocabulary count as clear.
inline uint32_t allowed_word(const int32_t* bits, int64_t vocabulary, int64_t word) {
  const uint32_t value = static_cast<uint32_t>(bits[word]);
  const int64_t left = vocabulary - word * 32;
  return left >= 32 ? value : value & ((1u << left) - 1u);
}

inline bool is_allowed(const int32_t* bits, int64_t token) {
  return bits == nullptr || (static_cast<uint32_t>(bits[token / 32]) >> (token % 32) & 1u) != 0;
}

inline bool allows_any(const int32_t* bits, int64_t vocabulary) {
  for (int64_t word = 0; word < words_per_row(vocabulary); ++word)
    if (allowed_word(bits, vocabulary, word) != 0) return true;
  return false;
}

inline int64_t count_allowed(const int32_t* bits, int64_t vocabulary) {
  if (bits == nullptr) return vocabulary;
  int64_t count = 0;
  for (int64_t word = 0; word < words_per_row(vocabulary); ++word)
    count += __builtin_popcount(allowed_word(bits, vocabulary, word));
  return count;
}

// The k-th allowed id, counted from 0 in increasing order; k is below count_allowed().
inline int32_t nth_allowed(const int32_t* bits, int64_t vocabulary, int64_t k) {
  if (bits == nullptr) return static_cast<int32_t>(k);
  for (int64_t word = 0;; ++word) {
    uint32_t value = allowed_word(bits, vocabulary, word);
    const int64_t count = __builtin_popcount(value);
    if (k >= count) {
      k -= count;
      continue;
    }
    for (; k > 0; --k) value &= value - 1;
    return static_cast<int32_t>(word * 32 + __builtin_ctz(value));
  }
}

}  // namespace
}  // namespace dgemma
