// Rounding results to bfloat16 where a tensor core's accumulators hold weight rows by tokens.
#pragma once

#include "device/bfloat16.h"
#include "device/warp.h"

namespace dgemma {

// A lane has results of row lane / 4 for the tokens 2 (lane % 4) and the next. Of two lanes with
// neighbouring rows, the one with the even row gets both rows of the first token, the other both of
// the second. All lanes of the warp call this.
DGEMMA_DEVICE uint32_t pack_rows(float first_token, float second_token) {
  const bool second = device::lane_index() / 4 % 2 != 0;
  const float other = __shfl_xor_sync(device::kAllLanes, second ? first_token : second_token, 4);
  return second ? device::pack_bfloat16(other, second_token)
                : device::pack_bfloat16(first_token, other);
}

// The result that pack_rows gives to this lane, within 8 rows by 8 tokens: the first of the two
// rows, and the token.
DGEMMA_DEVICE int32_t packed_row() { return static_cast<int32_t>(device::lane_index() / 8 * 2); }
DGEMMA_DEVICE int32_t packed_token() {
  const uint32_t lane = device::lane_index();
  return static_cast<int32_t>(2 * (lane % 4) + lane / 4 % 2);
}

}  // namespace dgemma
