// Ordering between the two ways to shared memory: ordinary loads and stores (the generic proxy),
// and what TMA and wgmma do (the async proxy). PTX ISA, "Memory Consistency Model: Proxies" and
// "membar/fence".
#pragma once

#include "device/language.h"

namespace dgemma::device {

// fence.proxy.async: ordinary stores (cp.async and stmatrix too) before it can be seen by wgmma and
// bulk copies that are ordered after it. The writer calls it before the barrier, or the reader
// after the barrier.
DGEMMA_DEVICE void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// fence.mbarrier_init: makes freshly initialised mbarriers known to the async proxy and to the
// cluster. The thread that initialised them calls it, then the block (or the cluster) synchronises.
DGEMMA_DEVICE void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

}  // namespace dgemma::device
