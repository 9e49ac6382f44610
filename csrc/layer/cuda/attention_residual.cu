// The residual after attention and the two normalised inputs made of it: a block has a token.
#include "device/launch.h"
#include "layer/cuda/kernels.h"
#include "layer/cuda/row.h"

namespace dgemma {
namespace {

struct Residual {
  const bfloat16 *hidden, *attended, *attended_norm, *dense_norm, *sparse_norm;
  bfloat16 *residual, *dense_input, *sparse_input;
  int32_t width;
  float epsilon;
};

__global__ void __launch_bounds__(kMostThreads) attention_residual(const Residual p) {
  device::wait_for_previous_kernel();
  device::let_next_kernel_begin();
  RowSums sums = {device::shared_memory<RowShared>()};
  const int64_t at = static_cast<int64_t>(blockIdx.x) * p.width;
  const auto load = [&](const bfloat16* row) { return PackedRow::load(row, p.width); };
  const PackedRow attended_in = load(p.attended + at), hidden = load(p.hidden + at);
  const PackedRow attended_norm = load(p.attended_norm), dense_norm = load(p.dense_norm);
  const PackedRow sparse_norm = load(p.sparse_norm);

  const Row attended = norm(attended_in.unpacked(), attended_norm, p.width, p.epsilon, sums);
  const Row residual = add(hidden.unpacked(), attended);
  residual.store(p.residual + at, p.width);
  norm(residual, dense_norm, p.width, p.epsilon, sums).store(p.dense_input + at, p.width);
  norm(residual, sparse_norm, p.width, p.epsilon, sums).store(p.sparse_input + at, p.width);
}

}  // namespace

const char* launch_attention_residual(const dgemma_attention_residual& op, void* stream) {
  const auto in = [](const void* p) { return static_cast<const bfloat16*>(p); };
  const Residual p = {.hidden = in(op.hidden),
                      .attended = in(op.attended),
                      .attended_norm = in(op.attended_norm),
                      .dense_norm = in(op.dense_norm),
                      .sparse_norm = in(op.sparse_norm),
                      .residual = static_cast<bfloat16*>(op.residual),
                      .dense_input = static_cast<bfloat16*>(op.dense_input),
                      .sparse_input = static_cast<bfloat16*>(op.sparse_input),
                      .width = static_cast<int32_t>(op.hidden_size),
                      .epsilon = op.epsilon};
  const device::LaunchShape shape = {.grid = dim3(static_cast<unsigned>(op.tokens)),
                                     .threads = row_threads(op.hidden_size),
                                     .shared_bytes = sizeof(RowShared),
                                     .overlaps_previous_kernel = true};
  return device::launch(shape, stream, attention_residual, p);
}

}  // namespace dgemma
