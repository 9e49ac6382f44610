// A row's statistics by class. A block has a row and goes over it twice: a class's sums are taken
// from its own maximum, so that a class far below the row's keeps its mass.
//
// Sums are 64-bit integers, in units of 2^-f with f from the vocabulary's size alone: e^(z - max)
// is at most 1, so they cannot overflow, and they have no order, so the threads may add to them as
// they come. Most of a vocabulary is one class for most grammars: every thread keeps that class's
// part in registers, whichever it is, and adds the others' to shared memory. A carry goes from the
// low word of a sum to the high one, because shared memory adds words of 32 bits at once and longer
// ones by comparing until nobody came in between.
#include <bit>

#include "automaton/automaton.h"
#include "automaton/cuda/kernels.h"
#include "denoise/cuda/logits.h"
#include "device/launch.h"
#include "device/shared_memory.h"

namespace dgemma {
namespace {

constexpr int32_t kThreads = 512;
constexpr int32_t kWarps = kThreads / 32;

struct Rows {
  Logits logits;
  Automata automata;
  const uint8_t* pinned;
  const int32_t* canvas;
  float* class_max;
  int32_t* class_argmax;
  double *class_mass, *class_shifted;
  int64_t most_classes;
  int32_t fraction_bits;
};

struct Sum {
  uint32_t low, high;
};
struct OfClass {
  Sum mass, shifted;  // shifted: of e^(z - max) (max - z)
  uint32_t top;       // the greatest raw logit as a number in the same order; 0: none
  float max;          // its z
};
static_assert(sizeof(OfClass) == kBytesOfClass);

struct Header {
  int32_t sample[kThreads];
  uint32_t common;  // how often a class was found, and the class, below
};

DGEMMA_DEVICE void add(Sum* sum, uint64_t value) {
  const uint32_t low = static_cast<uint32_t>(value);
  const uint32_t carry = atomicAdd(&sum->low, low) + low < low ? 1 : 0;
  const uint32_t high = static_cast<uint32_t>(value >> 32) + carry;
  if (high != 0) atomicAdd(&sum->high, high);
}
DGEMMA_DEVICE double value_of(const Sum& sum) {
  return static_cast<double>(static_cast<uint64_t>(sum.high) << 32 | sum.low);
}

// Floats as integers in the same order, all above 0; -0 is 0.
DGEMMA_DEVICE uint32_t in_order(float value) {
  const uint32_t bits = __float_as_uint(value + 0.0f);
  return bits >> 31 != 0 ? ~bits : bits | 0x80000000u;
}
DGEMMA_DEVICE float from_order(uint32_t number) {
  return __uint_as_float(number >> 31 != 0 ? number & 0x7fffffffu : ~number);
}

// The class that most of some tokens have: which it is changes the time alone.
DGEMMA_DEVICE int32_t most_common_class(const int32_t* class_of, int32_t vocabulary,
                                        Header& header) {
  const int32_t thread = static_cast<int32_t>(threadIdx.x);
  const int32_t token = static_cast<int32_t>(static_cast<int64_t>(thread) * vocabulary / kThreads);
  const int32_t mine = class_of[token];
  header.sample[thread] = mine;
  if (thread == 0) header.common = 0;
  __syncthreads();
  uint32_t count = 0;
  for (int32_t other = 0; other < kThreads; ++other) count += header.sample[other] == mine ? 1 : 0;
  atomicMax(&header.common, count << 16 | static_cast<uint32_t>(mine));
  __syncthreads();
  return static_cast<int32_t>(header.common & 0xffffu);
}

// Calls use(token, its class, its raw logit) for a lane's tokens that may be drawn.
template <typename T, typename Use>
DGEMMA_DEVICE void each_token(const Logits& logits, int64_t row, const int32_t* class_of,
                              const Use& use) {
  const uint32_t* const bits = allowed_bits(logits.allowed, logits.vocabulary, row);
  const int32_t lane = static_cast<int32_t>(device::lane_index());
  for (int32_t tile = static_cast<int32_t>(device::warp_index()); tile < logits.tiles;
       tile += kWarps) {
    const int32_t first = tile * kTile + lane * kLaneEntries;
    const uint32_t usable = usable_entries(bits, logits.vocabulary, first);
    float raw[kLaneEntries];
    read_entries<T>(logits, row, first, usable, raw);
#pragma unroll
    for (int32_t i = 0; i < kLaneEntries; ++i) {
      // No logit that is no number; one of -infinity has a mass where there is a cap.
      const bool counts = raw[i] == raw[i] && (raw[i] > -INFINITY || logits.softcap > 0.0f);
      if ((usable >> i & 1) != 0 && counts) use(first + i, class_of[first + i], raw[i]);
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) class_statistics_kernel(const Rows p) {
  device::wait_for_previous_kernel();
  device::let_next_kernel_begin();
  const Logits& logits = p.logits;
  const int64_t row = blockIdx.x, request = row / logits.length;
  if (!is_active(logits.active, request) || !has_automaton(p.automata.descriptor, request)) return;
  const int32_t* const class_of =
      automaton_of(p.automata.arena, p.automata.descriptor, request).class_of_token;
  const int64_t first_class = row * p.most_classes;
  const int32_t classes = static_cast<int32_t>(p.most_classes);
  const int32_t thread = static_cast<int32_t>(threadIdx.x);
  if (p.pinned != nullptr && p.pinned[row] != 0) {
    const int32_t token = p.canvas[row], of_token = class_of[token];
    for (int32_t k = thread; k < classes; k += kThreads) {
      const bool here = k == of_token;
      p.class_max[first_class + k] = here ? 0.0f : -INFINITY;
      p.class_argmax[first_class + k] = here ? token : -1;
      p.class_mass[first_class + k] = here ? 1.0 : 0.0;
      p.class_shifted[first_class + k] = 0.0;
    }
    return;
  }
  Header& header = device::shared_memory<Header>();
  OfClass* const of = reinterpret_cast<OfClass*>(&header + 1);
  for (int32_t k = thread; k < classes; k += kThreads) {
    of[k] = {};
    p.class_argmax[first_class + k] = INT32_MAX;
  }
  const int32_t common = most_common_class(class_of, logits.vocabulary, header);

  uint32_t top = 0;
  each_token<T>(logits, row, class_of, [&](int32_t, int32_t k, float raw) {
    const uint32_t number = in_order(raw);
    if (k == common)
      top = max(top, number);
    else
      atomicMax(&of[k].top, number);
  });
  top = __reduce_max_sync(device::kAllLanes, top);
  if (device::lane_index() == 0 && top != 0) atomicMax(&of[common].top, top);
  __syncthreads();
  const LogitScale scale = make_scale(logits.softcap, logits.temperature[request]);
  for (int32_t k = thread; k < classes; k += kThreads)
    of[k].max = of[k].top != 0 ? scale(from_order(of[k].top)) : -INFINITY;
  __syncthreads();

  const float units = __uint_as_float(static_cast<uint32_t>(127 + p.fraction_bits) << 23);
  const OfClass common_top = {{}, {}, of[common].top, of[common].max};
  uint64_t mass = 0, shifted = 0;
  each_token<T>(logits, row, class_of, [&](int32_t token, int32_t k, float raw) {
    const bool is_common = k == common;
    const uint32_t greatest = is_common ? common_top.top : of[k].top;
    if (in_order(raw) == greatest) atomicMin(&p.class_argmax[first_class + k], token);
    const float below = scale(raw) - (is_common ? common_top.max : of[k].max);
    if (!(fabsf(below) < INFINITY)) return;  // of a logit that is infinite
    // tanhf need not keep the order of logits that are the next to each other.
    const float depth = fmaxf(-below, 0.0f), e = expf(-depth);
    const uint64_t own = static_cast<uint64_t>(e * units);
    const uint64_t own_shifted = static_cast<uint64_t>(e * depth * units);
    if (is_common) {
      mass += own;
      shifted += own_shifted;
    } else {
      if (own != 0) add(&of[k].mass, own);
      if (own_shifted != 0) add(&of[k].shifted, own_shifted);
    }
  });
  if (mass != 0) add(&of[common].mass, mass);
  if (shifted != 0) add(&of[common].shifted, shifted);
  __syncthreads();
  const double unit = 1.0 / units;
  for (int32_t k = thread; k < classes; k += kThreads) {
    p.class_max[first_class + k] = of[k].max;
    if (of[k].top == 0) p.class_argmax[first_class + k] = -1;
    p.class_mass[first_class + k] = value_of(of[k].mass) * unit;
    p.class_shifted[first_class + k] = -(value_of(of[k].shifted) * unit);
  }
}

}  // namespace

const char* launch_class_statistics(const dgemma_class_statistics& op, void* stream) {
  const Logits logits = make_logits(op.logits);
  // As many terms as tokens, of 2^f each at most: below 2^63.
  const int32_t fraction_bits = 63 - std::bit_width(static_cast<uint32_t>(logits.vocabulary));
  const device::LaunchShape shape = {
      .grid = dim3(static_cast<unsigned>(logits.batch * logits.length)),
      .threads = kThreads,
      .shared_bytes = static_cast<uint32_t>(sizeof(Header)) +
                      static_cast<uint32_t>(op.most_classes) * kBytesOfClass,
      .overlaps_previous_kernel = true};
  const auto kernel = op.logits.dtype == DGEMMA_BFLOAT16 ? class_statistics_kernel<device::bfloat16>
                                                         : class_statistics_kernel<float>;
  return device::launch(shape, stream, kernel,
                        Rows{logits,
                             {op.arena, op.descriptor},
                             op.pinned,
                             op.canvas,
                             op.class_max,
                             op.class_argmax,
                             op.class_mass,
                             op.class_shifted,
                             op.most_classes,
                             fraction_bits});
}

}  // namespace dgemma
