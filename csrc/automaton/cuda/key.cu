// The acceptance key of a position: max(H given acceptance, s H), by a block.
//
// Given acceptance a token's probability is its own times a weight of its class, which is summed
// over the arcs whose set has the class. Arcs lie by state, so their terms go to their sets, and
// those to their classes, by atomic additions of integers: a sum of integers has no order. A weight
// counts in units of its own greatest term, so terms of any magnitude keep their digits.
#include "automaton/automaton.h"
#include "automaton/cuda/kernels.h"
#include "denoise/cuda/logits.h"
#include "denoise/cuda/row_scan.h"
#include "device/launch.h"
#include "device/shared_memory.h"

namespace dgemma {
namespace {

static_assert(kPositionThreads == kRowThreads, "running_total() has a block's threads");

// Bits behind the point for `terms` terms below 2: their sum stays below 2^63.
DGEMMA_DEVICE int32_t fraction_bits(int64_t terms) {
  return 30 + __clz(static_cast<int32_t>(terms));
}

DGEMMA_DEVICE void raise_top(Weight* weight, const Scaled& term) {
  if (term.mantissa > 0.0) atomicMax(&weight->top, term.exponent);
}
DGEMMA_DEVICE void add(Weight* weight, const Scaled& term, int32_t bits) {
  const double units = term.mantissa * power_of_two(int64_t{term.exponent} - weight->top + bits);
  if (units >= 1.0) atomicAdd(&weight->sum, static_cast<unsigned long long>(units));
}
DGEMMA_DEVICE Scaled value_of(const Weight& weight, int32_t bits) {
  return scaled(static_cast<double>(weight.sum), int64_t{weight.top} - bits);
}

struct Scratch {
  double total[kRowWarps];
  int32_t first_class;  // of those that have a mass
};
static_assert(sizeof(Scratch) <= kKeyScratch);

// Calls use(state's mass here, arc) for the arcs from states that are reached here. A thread has
// states.
template <typename Use>
DGEMMA_DEVICE void each_arc(const Automaton& a, const Scaled* here, const Use& use) {
  for (int32_t q = static_cast<int32_t>(threadIdx.x); q < a.states; q += kPositionThreads) {
    const Scaled mass = here[q];
    if (mass.mantissa == 0.0) continue;
    for (int32_t x = a.out_begin[q]; x < a.out_begin[q + 1]; ++x) use(mass, x);
  }
}

// The weights of the sets, then of the classes. The whole block calls this.
DGEMMA_DEVICE void find_weights(const Automaton& a, const Scaled* here, const Scaled* after,
                                Weight* of_set, Weight* of_class) {
  const int32_t thread = static_cast<int32_t>(threadIdx.x);
  for (int32_t j = thread; j < a.sets; j += kPositionThreads) of_set[j] = {0, INT32_MIN};
  for (int32_t k = thread; k < a.classes; k += kPositionThreads) of_class[k] = {0, INT32_MIN};
  __syncthreads();
  const auto term = [&](const Scaled& mass, int32_t arc) {
    const Scaled on = after[a.out_target[arc]];
    return scaled(mass.mantissa * on.mantissa, int64_t{mass.exponent} + on.exponent);
  };
  each_arc(a, here, [&](const Scaled& mass, int32_t arc) {
    raise_top(of_set + a.out_set[arc], term(mass, arc));
  });
  __syncthreads();
  const int32_t bits_of_set = fraction_bits(a.arcs), bits_of_class = fraction_bits(a.sets);
  each_arc(a, here, [&](const Scaled& mass, int32_t arc) {
    add(of_set + a.out_set[arc], term(mass, arc), bits_of_set);
  });
  __syncthreads();
  const auto each_class = [&](const auto& use) {
    for (int32_t j = thread; j < a.sets; j += kPositionThreads) {
      const Scaled weight = value_of(of_set[j], bits_of_set);
      for (int32_t x = a.set_begin[j]; x < a.set_begin[j + 1]; ++x)
        use(of_class + a.set_class[x], weight);
    }
  };
  each_class([](Weight* of_one, const Scaled& weight) { raise_top(of_one, weight); });
  __syncthreads();
  each_class([&](Weight* of_one, const Scaled& weight) { add(of_one, weight, bits_of_class); });
  __syncthreads();
}

__global__ void __launch_bounds__(kPositionThreads, kLeastBlocks)
    key_kernel(const Chain p, const bool weights_are_near) {
  device::wait_for_previous_kernel();
  device::let_next_kernel_begin();
  const dgemma_constrain& op = p.op;
  const int64_t row = blockIdx.x, request = row / op.length, i = row % op.length;
  const bool pinned = op.pinned != nullptr && op.pinned[row] != 0;
  if (pinned || !is_active(op.active, request) || !has_automaton(op.descriptor, request) ||
      p.outcome[request] != kConditioned)
    return;
  const Automaton a = automaton_of(op.arena, op.descriptor, request);
  Scratch& scratch = device::shared_memory<Scratch>();
  Weight* const of_set =
      weights_are_near ? reinterpret_cast<Weight*>(reinterpret_cast<char*>(&scratch) + kKeyScratch)
                       : p.weights + row * (op.most_sets + op.most_classes);
  Weight* const of_class = of_set + op.most_sets;
  const Scaled* const backward = p.backward + (row + request) * op.most_states;
  const Scaled all = p.backward[(row - i + request) * op.most_states + op.state[request]];
  if (threadIdx.x == 0) scratch.first_class = INT32_MAX;
  find_weights(a, p.forward + row * op.most_states, backward + op.most_states, of_set, of_class);

  // With P the probability of a class and h the entropy inside it, H = sum of P (h - log P).
  const Scaled* const masses = p.class_mass + row * op.most_classes;
  const int64_t first_statistic = row * op.most_classes;
  const int32_t bits = fraction_bits(a.sets);
  double part = 0.0;
  for (int32_t k = static_cast<int32_t>(threadIdx.x); k < a.classes; k += kPositionThreads) {
    if (masses[k].mantissa == 0.0) continue;
    atomicMin(&scratch.first_class, k);
    const double probability = share_of(masses[k], value_of(of_class[k], bits), all);
    if (!(probability > 0.0)) continue;
    const double mass = op.class_mass[first_statistic + k];
    part +=
        probability * (log(mass) - op.class_shifted[first_statistic + k] / mass - log(probability));
  }
  const double entropy = running_total(part, scratch.total).total;
  const int32_t first_class = scratch.first_class;
  bool alike = true;
  for (int32_t k = static_cast<int32_t>(threadIdx.x); k < a.classes; k += kPositionThreads) {
    if (masses[k].mantissa == 0.0) continue;
    const Scaled one = value_of(of_class[k], bits), other = value_of(of_class[first_class], bits);
    alike = alike && one.mantissa == other.mantissa && one.exponent == other.exponent;
  }
  alike = __syncthreads_and(alike) != 0;
  if (threadIdx.x != 0) return;
  const double own = op.entropy[row];
  const double remaining = op.max_steps[request] - op.step[request] + 1;
  const double given = alike ? own : fmax(entropy, 0.0);
  op.entropy[row] = static_cast<float>(fmax(given, remaining / op.max_steps[request] * own));
}

}  // namespace

const char* launch_key(const ChainPlan& plan, const Chain& chain, void* stream) {
  const device::LaunchShape shape = {
      .grid = dim3(static_cast<unsigned>(chain.op.batch * chain.op.length)),
      .threads = kPositionThreads,
      .shared_bytes = kKeyScratch + plan.weights_bytes,
      .overlaps_previous_kernel = true};
  return device::launch(shape, stream, key_kernel, chain, plan.weights_bytes > 0);
}

}  // namespace dgemma
