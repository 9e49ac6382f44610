// Accept, renoise, stop: one block has a request. Acceptance needs no sort: the entropies that come
// before a position are counted, which gives its place in the order, and one thread then adds them
// up in that order, in double as the CPU does, so both decide alike.
#include <algorithm>

#include "denoise/cuda/kernels.h"
#include "denoise/cuda/noise.h"
#include "device/launch.h"
#include "device/philox.h"
#include "device/shared_memory.h"

namespace dgemma {
namespace {

// A position's renoising takes a warp: 32 of them where the canvas is long enough.
constexpr int32_t kMostThreads = 1024;
// One thread adds up entropies: it loads and converts so many in front of a run of additions, so
// that only those wait for each other.
constexpr int32_t kAtOnce = 8;

struct Update {
  int32_t length, vocabulary;
  const int32_t *sampled, *argmax;
  const float* entropy;
  const uint8_t* pinned;
  AllowedTokens allowed;
  const double* uniforms;
  const int64_t* seed;
  const int32_t *canvas_index, *max_steps;
  const double *t_min, *t_max;
  const float* entropy_bound;
  const int32_t* stability_threshold;
  const float* confidence_threshold;
  uint8_t* active;
  int32_t *canvas, *draft, *stable_steps, *step;
  float* temperature;
  uint8_t* accepted;
  float* mean_entropy;
  int32_t* status;
};

struct Shared {
  float entropy[kLongestCanvas];   // infinite where a position is pinned: it comes after all
  float sorted[kLongestCanvas];    // the entropies in (entropy, index) order
  uint16_t place[kLongestCanvas];  // of each position in that order; past all where it is pinned
  int32_t free_positions;          // that are not pinned
  int32_t accepted;                // how many of the order
  float mean;
};

// The mean over the positions that are not pinned, summed in index order; 0 when all are pinned.
DGEMMA_DEVICE float mean_of(const Update& p, const Shared& shared) {
  double total = 0.0;
  for (int32_t first = 0; first < p.length; first += kAtOnce) {
    double entropy[kAtOnce];
#pragma unroll
    for (int32_t i = 0; i < kAtOnce; ++i) {
      const float next = first + i < p.length ? shared.entropy[first + i] : INFINITY;
      entropy[i] = next < INFINITY ? next : 0.0f;  // a zero leaves a sum as it is
    }
#pragma unroll
    for (int32_t i = 0; i < kAtOnce; ++i) total += entropy[i];
  }
  return shared.free_positions > 0 ? static_cast<float>(total / shared.free_positions) : 0.0f;
}

// Counts the positions, in the order, that are accepted: the sum of the entropies before each, and
// before all in front of it, is within the bound.
DGEMMA_DEVICE int32_t count_accepted(const Shared& shared, float bound) {
  const int32_t end = shared.free_positions;
  const double limit = bound;
  double taken = 0.0;
  int32_t count = 0;
  bool within = true;
  for (int32_t first = 0; first < end && within; first += kAtOnce) {
    double entropy[kAtOnce];
#pragma unroll
    for (int32_t i = 0; i < kAtOnce; ++i)
      entropy[i] = first + i < end ? shared.sorted[first + i] : 0.0f;
#pragma unroll
    for (int32_t i = 0; i < kAtOnce; ++i) {
      within = within && first + i < end && taken <= limit;
      count += within;
      taken += entropy[i];
    }
  }
  return count;
}

// t_min + (t_max - t_min) * remaining / max_steps, rounded to fp32 after every operation.
DGEMMA_DEVICE float scheduled_temperature(double t_min, double t_max, int32_t remaining,
                                          int32_t max_steps) {
  const float share = __fdiv_rn(static_cast<float>(remaining), static_cast<float>(max_steps));
  const float rise = __fmul_rn(static_cast<float>(t_max - t_min), share);
  return __fadd_rn(static_cast<float>(t_min), rise);
}

__global__ void __launch_bounds__(kMostThreads) update_canvas_kernel(const Update p) {
  device::wait_for_previous_kernel();
  device::let_next_kernel_begin();
  Shared& shared = device::shared_memory<Shared>();
  const int64_t request = blockIdx.x, first = request * p.length;
  if (p.active[request] == 0) return;
  const int32_t thread = static_cast<int32_t>(threadIdx.x);
  const int32_t threads = static_cast<int32_t>(blockDim.x);

  bool finite = true;
  if (thread == 0) shared.free_positions = 0;
  __syncthreads();
  for (int32_t i = thread; i < p.length; i += threads) {
    const bool pinned = p.pinned != nullptr && p.pinned[first + i] != 0;
    const float entropy = pinned ? INFINITY : p.entropy[first + i];
    finite = finite && (pinned || fabsf(entropy) < INFINITY);
    shared.entropy[i] = entropy;
    if (!pinned) atomicAdd(&shared.free_positions, 1);
  }
  if (__syncthreads_or(!finite)) {
    for (int32_t i = thread; i < p.length; i += threads) p.accepted[first + i] = 0;
    if (thread == 0) {
      p.mean_entropy[request] = NAN;
      p.status[request] = DGEMMA_CANVAS_NON_FINITE;
      p.active[request] = 0;
    }
    return;
  }

  // Places in (entropy, index) order. A canvas of 256 has a thread for every position here.
  for (int32_t i = thread; i < p.length; i += threads) {
    const float mine = shared.entropy[i];
    shared.place[i] = static_cast<uint16_t>(p.length);
    if (!(mine < INFINITY)) continue;
    int32_t place = 0;
    for (int32_t j = 0; j < p.length; ++j) {
      const float other = shared.entropy[j];
      place += other < mine || (other == mine && j < i);
    }
    shared.place[i] = static_cast<uint16_t>(place);
    shared.sorted[place] = mine;
  }
  __syncthreads();
  if (thread == 0) shared.accepted = count_accepted(shared, p.entropy_bound[request]);
  if (thread == 32) shared.mean = mean_of(p, shared);
  __syncthreads();

  // Accepted are those whose place is below the count.
  const int32_t accepted = shared.accepted;
  bool unchanged = true;
  for (int32_t i = static_cast<int32_t>(device::warp_index()); i < p.length; i += threads / 32) {
    const int64_t at = first + i;
    const bool pinned = !(shared.entropy[i] < INFINITY);
    const bool takes_sample = shared.place[i] < accepted;
    int32_t token = 0;
    if (!pinned && !takes_sample) {
      const double uniform = p.uniforms != nullptr
                                 ? p.uniforms[at]
                                 : draw_uniform(p.seed[request], p.canvas_index[request],
                                                p.step[request], i, DGEMMA_PURPOSE_RENOISE);
      token = uniform_token(allowed_bits(p.allowed, p.vocabulary, at), p.vocabulary, uniform);
    }
    const int32_t draft = pinned ? p.canvas[at] : p.argmax[at];
    unchanged = unchanged && (pinned || p.draft[at] == draft);
    __syncwarp();
    if (device::lane_index() != 0) continue;
    p.accepted[at] = takes_sample;
    p.draft[at] = draft;
    if (!pinned) p.canvas[at] = takes_sample ? p.sampled[at] : token;
  }
  const bool same_draft = __syncthreads_and(unchanged) != 0;
  if (thread != 0) return;

  const int32_t stable_steps = same_draft ? p.stable_steps[request] + 1 : 0;
  const int32_t steps_done = p.step[request], max_steps = p.max_steps[request];
  const bool stable = stable_steps >= p.stability_threshold[request] &&
                      shared.mean < p.confidence_threshold[request];
  const bool last = steps_done >= max_steps;
  p.mean_entropy[request] = shared.mean;
  p.stable_steps[request] = stable_steps;
  p.status[request] = stable ? DGEMMA_CANVAS_STABLE
                      : last ? DGEMMA_CANVAS_STEP_CAP
                             : DGEMMA_CANVAS_RUNNING;
  p.active[request] = !stable && !last;
  p.step[request] = steps_done + 1;
  p.temperature[request] =
      scheduled_temperature(p.t_min[request], p.t_max[request], max_steps - steps_done, max_steps);
}

}  // namespace

const char* launch_update_canvas(const dgemma_update_canvas& op, void* stream) {
  const Update p = {.length = static_cast<int32_t>(op.length),
                    .vocabulary = static_cast<int32_t>(op.vocabulary),
                    .sampled = op.sampled,
                    .argmax = op.argmax,
                    .entropy = op.entropy,
                    .pinned = op.pinned,
                    .allowed = {.mask = reinterpret_cast<const uint32_t*>(op.allowed.mask),
                                .row_index = op.allowed.row_index},
                    .uniforms = op.uniforms,
                    .seed = op.seed,
                    .canvas_index = op.canvas_index,
                    .max_steps = op.max_steps,
                    .t_min = op.t_min,
                    .t_max = op.t_max,
                    .entropy_bound = op.entropy_bound,
                    .stability_threshold = op.stability_threshold,
                    .confidence_threshold = op.confidence_threshold,
                    .active = op.active,
                    .canvas = op.canvas,
                    .draft = op.draft,
                    .stable_steps = op.stable_steps,
                    .step = op.step,
                    .temperature = op.temperature,
                    .accepted = op.accepted,
                    .mean_entropy = op.mean_entropy,
                    .status = op.status};
  const int64_t threads = std::clamp<int64_t>(32 * op.length, 64, kMostThreads);
  const device::LaunchShape shape = {.grid = dim3(static_cast<unsigned>(op.batch)),
                                     .threads = static_cast<uint32_t>(threads),
                                     .shared_bytes = sizeof(Shared),
                                     .overlaps_previous_kernel = true};
  return device::launch(shape, stream, update_canvas_kernel, p);
}

}  // namespace dgemma
