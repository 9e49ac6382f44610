// Policies for the L2 cache: which lines of a copy it keeps. PTX ISA, "Data Movement and
// Conversion: createpolicy" (sm_80).
#pragma once

#include "device/language.h"

namespace dgemma::device {

struct CachePolicy {
  uint64_t bits;
};

// Lines that go first: what is read once, such as weights.
DGEMMA_DEVICE CachePolicy evict_first() {
  CachePolicy policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy.bits));
  return policy;
}

// Lines that stay longest: what every block reads again, such as activations.
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
