// A pass's input: a token's row of the table, scaled, self-conditioning added, normalised. A block
// has a token.
#include "device/launch.h"
#include "layer/cuda/kernels.h"
#include "layer/cuda/row.h"

namespace dgemma {
namespace {

struct Embedding {
  const int32_t* ids;
  const bfloat16 *embedding, *conditioning;
  bfloat16* output;
  int32_t vocabulary, width;
  float scale, epsilon;
  bool normalise;
};

__global__ void __launch_bounds__(kMostThreads) token_embedding(const Embedding p) {
  device::wait_for_previous_kernel();
  device::let_next_kernel_begin();
  RowSums sums = {device::shared_memory<RowShared>()};
  const int64_t at = static_cast<int64_t>(blockIdx.x) * p.width;
  const int32_t id = p.ids[blockIdx.x];
  const bool known = id >= 0 && id < p.vocabulary;
  Row row = Row::load(p.embedding + static_cast<int64_t>(known ? id : 0) * p.width, p.width);
  // The host cannot check the ids: a wrong one shows as NaN.
  const float scale = known ? rounded(p.scale) : NAN;
#pragma unroll
  for (int i = 0; i < 8; ++i) row.value[i] = rounded(row.value[i] * scale);
  if (p.conditioning != nullptr) row = add(row, Row::load(p.conditioning + at, p.width));
  if (p.normalise) row = norm(row, p.width, p.epsilon, sums);
  row.store(p.output + at, p.width);
}

}  // namespace

const char* launch_token_embedding(const dgemma_token_embedding& op, void* stream) {
  const Embedding p = {.ids = op.ids,
                       .embedding = static_cast<const bfloat16*>(op.embedding),
                       .conditioning = static_cast<const bfloat16*>(op.conditioning),
                       .output = static_cast<bfloat16*>(op.output),
                       .vocabulary = static_cast<int32_t>(op.vocabulary),
                       .width = static_cast<int32_t>(op.hidden_size),
                       .scale = op.scale,
                       .epsilon = op.epsilon,
                       .normalise = op.normalise != 0};
  const device::LaunchShape shape = {.grid = dim3(static_cast<unsigned>(op.tokens)),
                                     .threads = row_threads(op.hidden_size),
                                     .shared_bytes = sizeof(RowShared),
                                     .overlaps_previous_kernel = true};
  return device::launch(shape, stream, token_embedding, p);
}

}  // namespace dgemma
