// Chooses experts by their scores: softmax, the top k, their weights. A warp has a token; lane l
// has the experts l, l + 32, ...
#include "device/launch.h"
#include "device/warp.h"
#include "grouped_gemm/cuda/route.h"

namespace dgemma {
namespace {

constexpr int32_t kWarps = kRouterThreads / 32;

DGEMMA_DEVICE float sum_of_lanes(float value) {
  for (int lanes = 16; lanes > 0; lanes /= 2)
    value += __shfl_xor_sync(device::kAllLanes, value, lanes);
  return value;
}
DGEMMA_DEVICE float maximum_of_lanes(float value) {
  for (int lanes = 16; lanes > 0; lanes /= 2)
    value = fmaxf(value, __shfl_xor_sync(device::kAllLanes, value, lanes));
  return value;
}

// A lane's experts' scores: the segments added in their order, rounded to bfloat16. Those past the
// last expert are minus infinity, whose probability is zero.
template <int kPerLane>
DGEMMA_DEVICE void load_scores(const RouteCall& p, int32_t token, float (&score)[kPerLane]) {
  const int64_t segment_values = static_cast<int64_t>(p.tokens) * p.experts;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int32_t expert = static_cast<int32_t>(device::lane_index()) + 32 * i;
    score[i] = -INFINITY;
    if (expert >= p.experts) continue;
    const float* from = p.partial + static_cast<int64_t>(token) * p.experts + expert;
    float sum = 0.0f;
    for (int32_t segment = 0; segment < p.segments; ++segment)
      sum += from[segment * segment_values];
    score[i] = device::to_float(device::round_to_bfloat16(sum));
  }
}

template <int kPerLane>
DGEMMA_DEVICE void softmax(float (&value)[kPerLane]) {
  float maximum = value[0];
#pragma unroll
  for (int i = 1; i < kPerLane; ++i) maximum = fmaxf(maximum, value[i]);
  maximum = maximum_of_lanes(maximum);
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    value[i] = expf(value[i] - maximum);
    sum += value[i];
  }
  sum = sum_of_lanes(sum);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) value[i] /= sum;
}

// A lane's best expert that is left. Probabilities are not negative, so their bits are in the order
// of their values; one more makes room for 0, which says that the expert has been chosen.
struct Best {
  uint32_t key;
  int32_t expert;
};
template <int kPerLane>
DGEMMA_DEVICE Best best_of_lane(const uint32_t (&key)[kPerLane]) {
  Best best = {0, 0};
#pragma unroll
  for (int i = 0; i < kPerLane; ++i)
    if (key[i] > best.key) best = {key[i], static_cast<int32_t>(device::lane_index()) + 32 * i};
  return best;
}

template <int kPerLane>
__global__ void __launch_bounds__(kRouterThreads) router_choice(const RouteCall p) {
  device::wait_for_previous_kernel();
  device::let_next_kernel_begin();
  const int32_t token =
      static_cast<int32_t>(blockIdx.x) * kWarps + static_cast<int32_t>(device::warp_index());
  const int32_t lane = static_cast<int32_t>(device::lane_index());
  if (token >= p.tokens) return;

  float probability[kPerLane];
  load_scores(p, token, probability);
  softmax(probability);
  uint32_t key[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i)
    key[i] = lane + 32 * i < p.experts ? __float_as_uint(probability[i]) + 1 : 0;

  // Choice j is lane j's. The sum is taken in the order of the choices.
  int32_t mine = 0;
  float chosen = 0.0f, total = 0.0f;
  for (int32_t choice = 0; choice < p.top_k; ++choice) {
    const Best best = best_of_lane(key);
    const uint32_t highest = __reduce_max_sync(device::kAllLanes, best.key);
    const int32_t expert =
        __reduce_min_sync(device::kAllLanes, best.key == highest ? best.expert : INT32_MAX);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i)
      if (lane + 32 * i == expert) key[i] = 0;
    const float value = __uint_as_float(highest - 1);
    total += value;
    if (lane == choice) {
      mine = expert;
      chosen = value;
    }
  }
  if (lane >= p.top_k) return;
  const int64_t at = static_cast<int64_t>(token) * p.top_k + lane;
  p.expert_ids[at] = mine;
  p.expert_weights[at] = chosen / total * device::to_float(p.per_expert_scale[mine]);
}

template <int kPerLane>
const char* launch(const RoutePlan& plan, const RouteCall& call, void* stream) {
  const device::LaunchShape shape = {.grid = dim3(static_cast<unsigned>(plan.choice_blocks)),
                                     .threads = kRouterThreads,
                                     .overlaps_previous_kernel = true};
  return device::launch(shape, stream, router_choice<kPerLane>, call);
}

}  // namespace

const char* launch_router_choice(const RoutePlan& plan, const RouteCall& call, void* stream) {
  if (call.experts <= 128) return launch<4>(plan, call, stream);
  return launch<kRouterMostExperts / 32>(plan, call, stream);
}

}  // namespace dgemma
