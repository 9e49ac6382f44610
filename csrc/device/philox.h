// Philox4x32-10: the counter-based random numbers of every draw, the same on every device.
//
// J. Salmon, M. Moraes, R. Dror, D. Shaw: "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
// The constants are the paper's; its test vectors are in tests/test_denoise_sampling.py.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace dgemma {
namespace {

struct PhiloxBlock {
  uint32_t word[4];
};

DGEMMA_HOST_DEVICE PhiloxBlock philox4x32_10(PhiloxBlock counter, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(0xd2511f53u) * counter.word[0];
    const uint64_t product1 = static_cast<uint64_t>(0xcd9e8d57u) * counter.word[2];
    counter = {{static_cast<uint32_t>(product1 >> 32) ^ counter.word[1] ^ key0,
                static_cast<uint32_t>(product1),
                static_cast<uint32_t>(product0 >> 32) ^ counter.word[3] ^ key1,
                static_cast<uint32_t>(product0)}};
    key0 += 0x9e3779b9u;
    key1 += 0xbb67ae85u;
  }
  return counter;
}

// The uniform in [0, 1) of one draw: 53 bits, so every value is a double and 1 is never reached.
DGEMMA_HOST_DEVICE double draw_uniform(int64_t seed, int32_t canvas, int32_t step, int64_t position,
                                       int32_t purpose) {
  const uint64_t key = static_cast<uint64_t>(seed);
  const PhiloxBlock block =
      philox4x32_10({{static_cast<uint32_t>(canvas), static_cast<uint32_t>(step),
                      static_cast<uint32_t>(position), static_cast<uint32_t>(purpose)}},
                    static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32));
  const uint64_t bits = static_cast<uint64_t>(block.word[0]) << 32 | block.word[1];
  return static_cast<double>(bits >> 11) * 0x1p-53;
}

}  // namespace
}  // namespace dgemma
