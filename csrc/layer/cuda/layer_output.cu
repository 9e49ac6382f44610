// The end of a layer, and the norm in front of the next: a block has a token.
#include "device/launch.h"
#include "layer/cuda/kernels.h"
#include "layer/cuda/row.h"

namespace dgemma {
namespace {

struct Output {
  const bfloat16 *residual, *dense, *sparse, *dense_norm, *sparse_norm, *norm, *next_norm;
  bfloat16 *output, *next_input;
  int32_t width;
  float epsilon, scalar;
};

__global__ void __launch_bounds__(kMostThreads) layer_output(const Output p) {
  device::wait_for_previous_kernel();
  device::let_next_kernel_begin();
  RowSums sums = {device::shared_memory<RowShared>()};
  const int64_t at = static_cast<int64_t>(blockIdx.x) * p.width;
  const auto load = [&](const bfloat16* row) { return PackedRow::load(row, p.width); };
  const PackedRow dense_in = load(p.dense + at), sparse_in = load(p.sparse + at);
  const PackedRow residual = load(p.residual + at);
  const PackedRow dense_norm = load(p.dense_norm), sparse_norm = load(p.sparse_norm);
  const PackedRow last_norm = load(p.norm);
  const PackedRow next_norm = p.next_norm != nullptr ? load(p.next_norm) : PackedRow{};

  const Row dense = norm(dense_in.unpacked(), dense_norm, p.width, p.epsilon, sums);
  const Row sparse = norm(sparse_in.unpacked(), sparse_norm, p.width, p.epsilon, sums);
  const Row combined = norm(add(dense, sparse), last_norm, p.width, p.epsilon, sums);
  Row output = add(residual.unpacked(), combined);
#pragma unroll
  for (int i = 0; i < 8; ++i) output.value[i] = rounded(output.value[i] * p.scalar);
  output.store(p.output + at, p.width);
  if (p.next_norm != nullptr)
    norm(output, next_norm, p.width, p.epsilon, sums).store(p.next_input + at, p.width);
}

}  // namespace

const char* launch_layer_output(const dgemma_layer_output& op, void* stream) {
  const auto in = [](const void* p) { return static_cast<const bfloat16*>(p); };
  const Output p = {.residual = in(op.residual),
                    .dense = in(op.dense),
                    .sparse = in(op.sparse),
                    .dense_norm = in(op.dense_norm),
                    .sparse_norm = in(op.sparse_norm),
                    .norm = in(op.norm),
                    .next_norm = in(op.next_norm),
                    .output = static_cast<bfloat16*>(op.output),
                    .next_input = static_cast<bfloat16*>(op.next_input),
                    .width = static_cast<int32_t>(op.hidden_size),
                    .epsilon = op.epsilon,
                    .scalar = op.scalar};
  const device::LaunchShape shape = {.grid = dim3(static_cast<unsigned>(op.tokens)),
                                     .threads = row_threads(op.hidden_size),
                                     .shared_bytes = sizeof(RowShared),
                                     .overlaps_previous_kernel = true};
  return device::launch(shape, stream, layer_output, p);
}

}  // namespace dgemma
