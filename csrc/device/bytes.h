// Bytes of registers in another order.
#pragma once

#include "device/language.h"

namespace dgemma::device {

// Four of the eight bytes of `high:low`, as the four nibbles of `selector` say, the lowest first: 0
// to 3 are the bytes of `low`, 4 to 7 those of `high`, and with the nibble's top bit set it is the
// sign bit of that byte, eight times. PTX ISA, "Data Movement and Conversion Instructions: prmt".
DGEMMA_DEVICE uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selector) {
  uint32_t out;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(out) : "r"(low), "r"(high), "r"(selector));
  return out;
}

}  // namespace dgemma::device
