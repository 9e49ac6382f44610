// Draws one uniform token among the allowed, by a warp.
#pragma once

#include "denoise/cuda/logits.h"

namespace dgemma {
namespace {

// One word of a bit row; bits past the vocabulary count as clear.
DGEMMA_DEVICE uint32_t allowed_word(const uint32_t* bits, int32_t vocabulary, int32_t word) {
  const int32_t left = vocabulary - word * 32;
  if (left <= 0) return 0;
  return left >= 32 ? bits[word] : bits[word] & ((1u << left) - 1);
}

// The lane's number plus those of the lanes below it.
DGEMMA_DEVICE int32_t sum_up_to_lane(int32_t value) {
#pragma unroll
  for (uint32_t by = 1; by < 32; by *= 2) {
    const int32_t below = __shfl_up_sync(device::kAllLanes, value, by);
    if (device::lane_index() >= by) value += below;
  }
  return value;
}

// The allowed token number floor(u * count); u < 1, but the product may round to count. All lanes
// call this with the same arguments and get the same token.
DGEMMA_DEVICE int32_t uniform_token(const uint32_t* bits, int32_t vocabulary, double uniform) {
  const int32_t lane = static_cast<int32_t>(device::lane_index());
  const int32_t words = (vocabulary + 31) / 32;
  int32_t count = vocabulary;
  if (bits != nullptr) {
    count = 0;
    for (int32_t word = lane; word < words; word += 32)
      count += __popc(allowed_word(bits, vocabulary, word));
    count = __reduce_add_sync(device::kAllLanes, count);
  }
  int32_t index = static_cast<int32_t>(uniform * static_cast<double>(count));
  if (index >= count) index = count - 1;
  if (bits == nullptr) return index;
  for (int32_t begin = 0; begin < words; begin += 32) {
    uint32_t value = allowed_word(bits, vocabulary, begin + lane);
    const int32_t up_to = sum_up_to_lane(__popc(value));
    const int32_t all = __shfl_sync(device::kAllLanes, up_to, 31);
    if (index >= all) {
      index -= all;
      continue;
    }
    // The lane in whose word it is.
    const uint32_t reached = __ballot_sync(device::kAllLanes, up_to > index);
    const int32_t owner = __ffs(static_cast<int>(reached)) - 1;
    int32_t skip = index - (up_to - __popc(value));
    int32_t token = 0;
    if (lane == owner) {
      for (; skip > 0; --skip) value &= value - 1;
      token = (begin + lane) * 32 + __ffs(static_cast<int>(value)) - 1;
    }
    return __shfl_sync(device::kAllLanes, token, owner);
  }
  return 0;  // a row that allows nothing is the caller's error
}

}  // namespace
}  // namespace dgemma
