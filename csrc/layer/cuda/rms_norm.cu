// The norm of every row, with a weight or without: a block has a row.
#include "device/launch.h"
#include "layer/cuda/kernels.h"
#include "layer/cuda/row.h"

namespace dgemma {
namespace {

struct Norm {
  const bfloat16 *input, *weight;
  bfloat16* output;
  int32_t width;
  float epsilon;
};

__global__ void __launch_bounds__(kMostThreads) rms_norm(const Norm p) {
  device::wait_for_previous_kernel();
  device::let_next_kernel_begin();
  RowSums sums = {device::shared_memory<RowShared>()};
  const int64_t at = static_cast<int64_t>(blockIdx.x) * p.width;
  const Row x = Row::load(p.input + at, p.width);
  const PackedRow weight = p.weight != nullptr ? PackedRow::load(p.weight, p.width) : PackedRow{};
  const Row y = p.weight != nullptr ? norm(x, weight, p.width, p.epsilon, sums)
                                    : norm(x, p.width, p.epsilon, sums);
  y.store(p.output + at, p.width);
}

}  // namespace

const char* launch_rms_norm(const dgemma_rms_norm& op, void* stream) {
  const Norm p = {.input = static_cast<const bfloat16*>(op.input),
                  .weight = static_cast<const bfloat16*>(op.weight),
                  .output = static_cast<bfloat16*>(op.output),
                  .width = static_cast<int32_t>(op.hidden_size),
                  .epsilon = op.epsilon};
  const device::LaunchShape shape = {.grid = dim3(static_cast<unsigned>(op.tokens)),
                                     .threads = row_threads(op.hidden_size),
                                     .shared_bytes = sizeof(RowShared),
                                     .overlaps_previous_kernel = true};
  return device::launch(shape, stream, rms_norm, p);
}

}  // namespace dgemma
