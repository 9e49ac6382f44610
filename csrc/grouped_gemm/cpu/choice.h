// The largest of a token's probabilities.
#pragma once

#include <cstdint>

namespace dgemma {

// Everything below is compiled once per instruction set, so it must not be shared by the linker.
namespace {

// Whether a stands before b in a descending sort of torch's, which takes NaN for the largest.
inline bool stands_before(float a, float b) {
  return a > b || (__builtin_isnan(a) && !__builtin_isnan(b));
}

// ids and chosen [top_k]: the top_k largest of `values` [count], largest first, equal ones in their
// order. One pass: a value behind the last of those chosen so far is passed by, which is almost
// all.
inline void choose_largest(const float* values, int64_t count, int64_t top_k, int32_t* ids,
                           float* chosen) {
  for (int64_t i = 0; i < count; ++i) {
    const float value = values[i];
    int64_t place = i < top_k ? i : top_k;
    if (place == top_k && !stands_before(value, chosen[--place])) continue;
    for (; place > 0 && stands_before(value, chosen[place - 1]); --place) {
      chosen[place] = chosen[place - 1];
      ids[place] = ids[place - 1];
    }
    chosen[place] = value;
    ids[place] = static_cast<int32_t>(i);
  }
}

}  // namespace
}  // namespace dgemma
