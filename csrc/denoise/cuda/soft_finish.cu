// Reduces the splits to the soft embedding: they are summed in order, checked against the
// tolerance, scaled and rounded. A block has a row.
#include "common/ceil_divide.h"
#include "denoise/cuda/row_scan.h"
#include "denoise/cuda/soft_tiles.h"
#include "device/launch.h"
#include "device/shared_memory.h"

namespace dgemma {
namespace {

struct Shared {
  float squares[kRowWarps];
};

struct Sum {
  const float* partial;  // of the row's first split
  int64_t stride;        // from one split to the next
  int32_t splits;        // that any tile is in

  DGEMMA_DEVICE float operator()(int32_t column) const {
    float sum = 0.0f;
    for (int32_t split = 0; split < splits; ++split) sum += partial[split * stride + column];
    return sum;
  }
};

__global__ void __launch_bounds__(kRowThreads) soft_finish(const SoftPass p, int32_t most_splits) {
  device::wait_for_previous_kernel();
  device::let_next_kernel_begin();
  const Logits& logits = p.logits;
  const int64_t row = blockIdx.x, request = row / logits.length;
  if (!is_in_round(p, request)) return;
  Shared& shared = device::shared_memory<Shared>();
  device::bfloat16* const output = p.output + row * p.hidden_size;
  if (!has_sum(p, row)) {
    const bool pinned = p.pinned != nullptr && p.pinned[row] != 0;
    for (int32_t i = static_cast<int32_t>(threadIdx.x); i < p.hidden_size; i += kRowThreads)
      output[i] = device::round_to_bfloat16(pinned ? 0.0f : NAN);
    return;
  }
  const int32_t count = p.count[request], each = ceil_divide(count, most_splits);
  const Sum sum = {
      .partial = p.partial + (request * most_splits * logits.length + row % logits.length) *
                                 static_cast<int64_t>(p.hidden_size),
      .stride = static_cast<int64_t>(logits.length) * p.hidden_size,
      .splits = ceil_divide(count, each)};
  float squares = 0.0f;
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < p.hidden_size; i += kRowThreads) {
    const float value = sum(i);
    squares = fmaf(value, value, squares);
    output[i] = device::round_to_bfloat16(rounded(value) * rounded(p.embedding_scale));
  }
  if (p.dense) return;

  squares = warp_sum(squares);
  const uint32_t warp = device::warp_index();  // of all lanes together, so not inside the if
  if (device::lane_index() == 0) shared.squares[warp] = squares;
  __syncthreads();
  if (threadIdx.x != 0) return;
  float total = 0.0f;
  for (int32_t w = 0; w < kRowWarps; ++w) total += shared.squares[w];
  const float norm = sqrtf(total);
  const float mass = kRoundingMargin * p.skipped_mass[row] / p.normaliser[row];
  if (!(mass * (p.max_embedding_norm + norm) <= p.tolerance * norm)) p.failed[request] = 1;
}

}  // namespace

const char* launch_soft_finish(const SoftPlan& plan, const SoftPass& pass, void* stream) {
  const device::LaunchShape shape = {
      .grid = dim3(static_cast<unsigned>(pass.logits.batch * pass.logits.length)),
      .threads = kRowThreads,
      .shared_bytes = sizeof(Shared),
      .overlaps_previous_kernel = true};
  return device::launch(shape, stream, soft_finish, pass, plan.splits);
}

}  // namespace dgemma
