// Draws one uniform token among the allowed.
#pragma once

#include "denoise/cpu/allowed.h"

namespace dgemma {
namespace {

// Counts the allowed tokens of a position. Neighbours often share a bit row, so the last count is
// kept.
class AllowedCount {
 public:
  explicit AllowedCount(int64_t vocabulary) : vocabulary_(vocabulary) {}

  int64_t operator()(const int32_t* bits) {
    if (bits == nullptr) return vocabulary_;
    if (bits != bits_) {
      bits_ = bits;
      count_ = count_allowed(bits, vocabulary_);
    }
    return count_;
  }

 private:
  int64_t vocabulary_;
  const int32_t* bits_ = nullptr;
  int64_t count_ = 0;
};

// The allowed token number floor(u * count); u < 1, but the product may round to count.
inline int32_t uniform_token(const int32_t* bits, int64_t vocabulary, double uniform,
                             AllowedCount& counts) {
  const int64_t count = counts(bits);
  const int64_t index = static_cast<int64_t>(uniform * static_cast<double>(count));
  return nth_allowed(bits, vocabulary, index < count ? index : count - 1);
}

}  // namespace
}  // namespace dgemma
