// Fences between the proxies: what they are missed for stands in shared_memory.cpp. See
// csrc/device/fence.h.
#pragma once

#include "device/language.h"

namespace dgemma::device {

inline void fence_proxy_async() { sim::fence_proxy_async(); }
inline void fence_mbarrier_init() { sim::fence_mbarrier_init(); }

}  // namespace dgemma::device
