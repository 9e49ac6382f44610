// The masses of a position's classes, as mantissa and exponent, those of its sets, and the best
// token of each set: what the passes over the canvas go through. A block has a position; the sum of
// a set is one thread's, in the order of the set, as on the CPU.
#include "automaton/automaton.h"
#include "automaton/cuda/kernels.h"
#include "denoise/cuda/logits.h"
#include "device/launch.h"

namespace dgemma {
namespace {

__global__ void __launch_bounds__(kPositionThreads, kLeastBlocks) masses_kernel(const Chain p) {
  device::wait_for_previous_kernel();
  device::let_next_kernel_begin();
  const dgemma_constrain& op = p.op;
  const int64_t row = blockIdx.x, request = row / op.length;
  if (!is_active(op.active, request) || !has_automaton(op.descriptor, request)) return;
  const Automaton a = automaton_of(op.arena, op.descriptor, request);
  const int64_t first_class = row * op.most_classes, first_set = row * op.most_sets;
  const int32_t thread = static_cast<int32_t>(threadIdx.x);
  for (int32_t k = thread; k < a.classes; k += kPositionThreads) {
    const int64_t at = first_class + k;
    p.class_mass[at] = op.class_argmax[at] < 0
                           ? Scaled()
                           : scaled_exponential(op.class_mass[at], op.class_max[at]);
  }
  __syncthreads();
  for (int32_t j = thread; j < a.sets; j += kPositionThreads) {
    ScaledSum sum;
    BestOfSet best = {-INFINITY, -1};
    for (int32_t x = a.set_begin[j]; x < a.set_begin[j + 1]; ++x) {
      const int64_t at = first_class + a.set_class[x];
      const Scaled mass = p.class_mass[at];
      sum.add(mass.mantissa, mass.exponent);
      const float z = op.class_max[at];
      const int32_t token = op.class_argmax[at];
      if (token >= 0 && (z > best.largest || (z == best.largest && token < best.token)))
        best = {z, token};
    }
    p.set_mass[first_set + j] = sum.value();
    p.best[first_set + j] = best;
  }
}

}  // namespace

const char* launch_masses(const Chain& chain, void* stream) {
  const device::LaunchShape shape = {
      .grid = dim3(static_cast<unsigned>(chain.op.batch * chain.op.length)),
      .threads = kPositionThreads,
      .overlaps_previous_kernel = true};
  return device::launch(shape, stream, masses_kernel, chain);
}

}  // namespace dgemma
