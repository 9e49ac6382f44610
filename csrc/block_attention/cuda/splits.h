// The number of splits of a request's keys, on the host and on the device.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace dgemma {

// Fewer keys than this are not worth a part of their own: its sums cost as much to write and to
// read again as its products.
constexpr int32_t kLeastKeys = 256;
constexpr int32_t kMostSplits = 8;

// `wanted`: blocks that the splits are to make of the request. `blocks`: tiles of queries of the
// request, over all key heads. `keys`: what its queries may see.
DGEMMA_HOST_DEVICE int32_t attention_splits(int32_t wanted, int32_t blocks, int32_t keys) {
  const int32_t to_fill = wanted / blocks;  // rounded down: one wave, not one and a half
  const int32_t worth = keys / kLeastKeys;
  int32_t splits = to_fill < worth ? to_fill : worth;
  splits = splits < kMostSplits ? splits : kMostSplits;
  return splits > 1 ? splits : 1;
}

}  // namespace dgemma
