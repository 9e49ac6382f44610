// The passes over (position, state). Three blocks have a request: one goes backward over the masses
// that lead on to an end and then draws forward, one goes forward over the masses that lead to a
// state, one backward over the best scores and then writes the draft. A state's sum is one
// thread's, in the order of its arcs, as on the CPU; positions follow each other at a barrier.
#include "automaton/automaton.h"
#include "automaton/cuda/choose.h"
#include "automaton/cuda/kernels.h"
#include "denoise/cuda/logits.h"
#include "device/launch.h"
#include "device/philox.h"
#include "device/shared_memory.h"

namespace dgemma {
namespace {

enum Pass : uint32_t { kBackward, kForward, kDraft, kPasses };

// A request's part of the op.
struct Canvas {
  const Chain& p;
  Automaton a;
  int64_t request;
  int64_t first;  // its position 0 in arrays [batch, length]
  int32_t length, thread, threads;

  DGEMMA_DEVICE bool ends(int32_t state) const {
    return a.distance[state] <= p.op.tokens_left[request] && a.passes(length, state);
  }
  // A state in which the canvas may not be after i tokens has no arcs there.
  DGEMMA_DEVICE int32_t out_end(int32_t i, int32_t q) const {
    return a.out_begin[a.passes(i, q) ? q + 1 : q];
  }
  DGEMMA_DEVICE int32_t in_end(int32_t i, int32_t q) const {
    return a.in_begin[a.passes(i, q) ? q + 1 : q];
  }
  DGEMMA_DEVICE const Scaled* set_mass(int32_t i) const {
    return p.set_mass + (first + i) * p.op.most_sets;
  }
  DGEMMA_DEVICE Scaled* backward(int32_t i) const {
    return p.backward + (first + request + i) * p.op.most_states;  // a request has length + 1
  }
  DGEMMA_DEVICE Scaled* forward(int32_t i) const {
    return p.forward + (first + i) * p.op.most_states;
  }
  DGEMMA_DEVICE int32_t* first_arc(int32_t i) const {
    return p.first_arc + (first + i) * p.op.most_states;
  }
};

// The whole block calls this.
DGEMMA_DEVICE bool entropies_are_finite(const Canvas& c) {
  bool finite = true;
  for (int32_t i = c.thread; i < c.length; i += c.threads) {
    const bool pinned = c.p.op.pinned != nullptr && c.p.op.pinned[c.first + i] != 0;
    finite = finite && (pinned || fabsf(c.p.op.entropy[c.first + i]) < INFINITY);
  }
  return __syncthreads_and(finite) != 0;
}

// `near`: the states of two positions in shared memory, or null.
DGEMMA_DEVICE void pass_backward(const Canvas& c, Scaled* near) {
  const int64_t stride = c.p.op.most_states;
  const auto put = [&](int32_t i, int32_t q, const Scaled& mass) {
    c.backward(i)[q] = mass;
    if (near != nullptr) near[i % 2 * stride + q] = mass;
  };
  for (int32_t q = c.thread; q < c.a.states; q += c.threads)
    put(c.length, q, c.ends(q) ? Scaled{1.0, 0} : Scaled());
  __syncthreads();
  for (int32_t i = c.length - 1; i >= 0; --i) {
    const Scaled* const sets = c.set_mass(i);
    const Scaled* const after = near != nullptr ? near + (i + 1) % 2 * stride : c.backward(i + 1);
    for (int32_t q = c.thread; q < c.a.states; q += c.threads) {
      ScaledSum sum;
      const int32_t end = c.out_end(i, q);
      for (int32_t x = c.a.out_begin[q]; x < end; ++x)
        sum.add_product(after[c.a.out_target[x]], sets[c.a.out_set[x]]);
      put(i, q, sum.value());
    }
    __syncthreads();
  }
}

DGEMMA_DEVICE void pass_forward(const Canvas& c, Scaled* near) {
  const int64_t stride = c.p.op.most_states;
  const auto put = [&](int32_t i, int32_t q, const Scaled& mass) {
    c.forward(i)[q] = mass;
    if (near != nullptr) near[i % 2 * stride + q] = mass;
  };
  const int32_t start = c.p.op.state[c.request];
  for (int32_t q = c.thread; q < c.a.states; q += c.threads)
    put(0, q, q == start ? Scaled{1.0, 0} : Scaled());
  __syncthreads();
  for (int32_t i = 1; i < c.length; ++i) {
    const Scaled* const sets = c.set_mass(i - 1);
    const Scaled* const before = near != nullptr ? near + (i - 1) % 2 * stride : c.forward(i - 1);
    for (int32_t q = c.thread; q < c.a.states; q += c.threads) {
      ScaledSum sum;
      const int32_t end = c.in_end(i, q);
      for (int32_t x = c.a.in_begin[q]; x < end; ++x)
        sum.add_product(before[c.a.in_source[x]], sets[c.a.in_set[x]]);
      put(i, q, sum.value());
    }
    __syncthreads();
  }
}

// One warp: an arc for every position, then a class of the arc's set, by one uniform.
DGEMMA_DEVICE void draw(const Canvas& c) {
  const dgemma_constrain& op = c.p.op;
  int32_t q = op.state[c.request];
  for (int32_t i = 0; i < c.length; ++i) {
    const int64_t at = c.first + i;
    const Scaled* const after = c.backward(i + 1);
    const Scaled* const sets = c.set_mass(i);
    const Scaled* const classes = c.p.class_mass + at * op.most_classes;
    const Scaled all = c.backward(i)[q];
    const double uniform = op.uniforms != nullptr
                               ? op.uniforms[at]
                               : draw_uniform(op.seed[c.request], op.canvas_index[c.request],
                                              op.step[c.request], i, DGEMMA_PURPOSE_SAMPLE);
    const Choice arc = choose(c.a.out_begin[q], c.a.out_begin[q + 1], uniform, [&](int32_t x) {
      return share_of(sets[c.a.out_set[x]], after[c.a.out_target[x]], all);
    });
    const int32_t set = c.a.out_set[arc.index];
    const Scaled of_set = sets[set];
    const Choice entry =
        choose(c.a.set_begin[set], c.a.set_begin[set + 1], arc.remainder,
               [&](int32_t x) { return share_of(classes[c.a.set_class[x]], {1.0, 0}, of_set); });
    if (c.thread == 0) {
      op.chosen_class[at] = c.a.set_class[entry.index];
      op.remainder[at] = entry.remainder;
    }
    q = c.a.out_target[arc.index];
  }
}

// The best ways backward, then the one from the start. A state's score is the greatest sum of z
// that leads from it to an end. `scores`: of two positions.
DGEMMA_DEVICE void write_draft(const Canvas& c, double* scores) {
  const dgemma_constrain& op = c.p.op;
  for (int32_t q = c.thread; q < c.a.states; q += c.threads)
    scores[c.length % 2 * op.most_states + q] = c.ends(q) ? 0.0 : -INFINITY;
  __syncthreads();
  for (int32_t i = c.length - 1; i >= 0; --i) {
    const BestOfSet* const best = c.p.best + (c.first + i) * op.most_sets;
    const double* const after = scores + (i + 1) % 2 * op.most_states;
    for (int32_t q = c.thread; q < c.a.states; q += c.threads) {
      double highest = -INFINITY;
      int32_t chosen = -1, token = -1;
      const int32_t end = c.out_end(i, q);
      for (int32_t x = c.a.out_begin[q]; x < end; ++x) {
        const BestOfSet one = best[c.a.out_set[x]];
        const double score = one.largest + after[c.a.out_target[x]];
        if (score > highest || (chosen >= 0 && score == highest && one.token < token)) {
          highest = score;
          chosen = x;
          token = one.token;
        }
      }
      scores[i % 2 * op.most_states + q] = highest;
      c.first_arc(i)[q] = chosen;
    }
    __syncthreads();
  }
  if (c.first_arc(0)[op.state[c.request]] < 0) return;
  __syncthreads();
  // One thread follows the arcs, which wait for each other, and leaves them where those of state 0
  // were.
  if (c.thread == 0) {
    int32_t q = op.state[c.request];
    for (int32_t i = 0; i < c.length; ++i) {
      const int32_t arc = c.first_arc(i)[q];
      c.first_arc(i)[0] = arc;
      q = c.a.out_target[arc];
    }
  }
  __syncthreads();
  for (int32_t i = c.thread; i < c.length; i += c.threads) {
    const int32_t set = c.a.out_set[c.first_arc(i)[0]];
    op.argmax[c.first + i] = c.p.best[(c.first + i) * op.most_sets + set].token;
  }
}

__global__ void __launch_bounds__(kMostPassThreads, kLeastBlocks)
    passes_kernel(const Chain p, const bool states_are_near) {
  device::wait_for_previous_kernel();
  device::let_next_kernel_begin();
  const dgemma_constrain& op = p.op;
  const int64_t request = blockIdx.x / kPasses;
  const uint32_t pass = blockIdx.x % kPasses;
  if (!is_active(op.active, request) || !has_automaton(op.descriptor, request)) return;
  const Canvas c = {p,
                    automaton_of(op.arena, op.descriptor, request),
                    request,
                    request * op.length,
                    static_cast<int32_t>(op.length),
                    static_cast<int32_t>(threadIdx.x),
                    static_cast<int32_t>(blockDim.x)};
  Scaled* const near = states_are_near ? &device::shared_memory<Scaled>() : nullptr;
  const bool finite = entropies_are_finite(c);
  if (pass == kBackward && !finite && c.thread == 0) {
    op.matches[request] = 1;
    p.outcome[request] = kNotFinite;
  }
  if (!finite) return;
  if (pass == kForward) return pass_forward(c, near);
  if (pass == kDraft)
    return write_draft(c, states_are_near ? reinterpret_cast<double*>(near)
                                          : p.score + 2 * request * op.most_states);
  pass_backward(c, near);
  const bool matches = c.backward(0)[op.state[request]].mantissa > 0.0;
  if (c.thread == 0) {
    op.matches[request] = matches ? 1 : 0;
    p.outcome[request] = matches ? kConditioned : kNoCanvas;
  }
  if (matches && c.thread < 32) draw(c);
}

}  // namespace

const char* launch_passes(const ChainPlan& plan, const Chain& chain, void* stream) {
  const device::LaunchShape shape = {.grid = dim3(static_cast<unsigned>(chain.op.batch * kPasses)),
                                     .threads = static_cast<uint32_t>(plan.pass_threads),
                                     .shared_bytes = plan.states_bytes,
                                     .overlaps_previous_kernel = true};
  return device::launch(shape, stream, passes_kernel, chain, plan.states_bytes > 0);
}

}  // namespace dgemma
