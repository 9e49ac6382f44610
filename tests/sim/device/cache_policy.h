// Cache policies, which change nothing here. See csrc/device/cache_policy.h.
#pragma once

#include "device/language.h"

namespace dgemma::device {

struct CachePolicy {
  uint64_t bits;
};

inline CachePolicy evict_first() { return {1}; }
inline CachePolicy evict_last() { return {2}; }
inline CachePolicy evict_normal() { return {3}; }

}  // namespace dgemma::device
