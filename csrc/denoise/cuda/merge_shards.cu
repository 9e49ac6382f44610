// The statistics of a vocabulary that lies in shards: a thread has a position.
#include "common/ceil_divide.h"
#include "cuda/occupancy.h"
#include "denoise/cuda/kernels.h"
#include "denoise/cuda/logits.h"
#include "denoise/merge_shards.h"
#include "device/launch.h"

namespace dgemma {
namespace {

// A canvas of 256 positions is two blocks; the shards of neighbouring positions lie beside each
// other.
constexpr int32_t kThreads = 128;
static_assert(fills_multiprocessor(kThreads));

__global__ void __launch_bounds__(kThreads)
    merge_shards_kernel(const dgemma_merge_vocabulary_shards op) {
  device::wait_for_previous_kernel();
  device::let_next_kernel_begin();
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= op.batch * op.length) return;
  const int64_t request = at / op.length;
  if (is_active(op.active, request)) merge_position(op, request, at % op.length);
}

}  // namespace

const char* launch_merge_shards(const dgemma_merge_vocabulary_shards& op, void* stream) {
  const device::LaunchShape shape = {
      .grid = dim3(static_cast<unsigned>(ceil_divide(op.batch * op.length, int64_t{kThreads}))),
      .threads = kThreads,
      .overlaps_previous_kernel = true};
  return device::launch(shape, stream, merge_shards_kernel, op);
}

}  // namespace dgemma
