// Policies for the L2 cache: which lines of a copy it keeps. PTX ISA, "Data Movement and
// Conversion: createpolicy" (sm_80).
#pragma once

#include "device/language.h"

namespace dgemma::device {

struct CachePolicy {
  uint64_t bits;
};

// The first to go: what is read once, weights.
DGEMMA_DEVICE CachePolicy evict_first() {
  CachePolicy policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy.bits));
  return policy;
}

// The last to go: what every block reads again, activations.
DGEMMA_DEVICE CachePolicy evict_last() {
  CachePolicy policy;
  asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy.bits));
  return policy;
}

DGEMMA_DEVICE CachePolicy evict_normal() {
  CachePolicy policy;
  asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy.bits));
  return policy;
}

}  // namespace dgemma::device
