// One of several masses by a uniform, by a warp.
#pragma once

#include "device/language.h"
#include "device/warp.h"

namespace dgemma {
namespace {

struct Choice {
  int32_t index;
  double remainder;  // where the uniform lies within the chosen mass's part, in [0, 1)
};

// The lane's number plus those of the lanes below it.
DGEMMA_DEVICE double sum_up_to_lane(double value) {
#pragma unroll
  for (uint32_t by = 1; by < 32; by *= 2) {
    const double below = __shfl_up_sync(device::kAllLanes, value, by);
    if (device::lane_index() >= by) value += below;
  }
  return value;
}

// The first of [begin, end) up to which the masses add up to more than the uniform's part of all,
// or the last that has any where rounding leaves none. One mass alone is 1, so it leaves the
// uniform as it is. All lanes call this with the same arguments and get the same choice; one mass
// is positive.
template <typename Mass>
DGEMMA_DEVICE Choice choose(int32_t begin, int32_t end, double uniform, const Mass& mass_of) {
  const int32_t lane = static_cast<int32_t>(device::lane_index());
  double total = 0.0;
  int32_t last = begin;
  for (int32_t first = begin; first < end; first += 32) {
    const double mass = first + lane < end ? mass_of(first + lane) : 0.0;
    const uint32_t there = __ballot_sync(device::kAllLanes, mass > 0.0);
    if (there != 0) last = first + 31 - __clz(static_cast<int>(there));
    total += __shfl_sync(device::kAllLanes, sum_up_to_lane(mass), 31);
  }
  const double wanted = uniform * total;
  double before = 0.0;
  for (int32_t first = begin; first < end; first += 32) {
    const int32_t at = first + lane;
    const double mass = at < end ? mass_of(at) : 0.0;
    const double up_to = sum_up_to_lane(mass);
    const bool reached = mass > 0.0 && (before + up_to > wanted || at == last);
    const uint32_t found = __ballot_sync(device::kAllLanes, reached);
    if (found == 0) {
      before += __shfl_sync(device::kAllLanes, up_to, 31);
      continue;
    }
    const int32_t owner = __ffs(static_cast<int>(found)) - 1;
    constexpr double kMost = 1.0 - 0x1p-53;
    const double left = (wanted - (before + (up_to - mass))) / mass;
    const double remainder = left < 0.0 ? 0.0 : left > kMost ? kMost : left;
    return {first + owner, __shfl_sync(device::kAllLanes, remainder, owner)};
  }
  return {last, uniform};  // not reached: the last mass that is positive is taken above
}

}  // namespace
}  // namespace dgemma
