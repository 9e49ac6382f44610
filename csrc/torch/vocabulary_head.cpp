// The operator vocabulary_head: schema, tensor checks, tensors to pointers. On the CPU it is made
// of torch's product and vocabulary_statistics (ops/vocabulary_head.py).
#include "dgemma/vocabulary_head.h"

#include "torch/backend.h"
#include "torch/logits.h"

STABLE_TORCH_LIBRARY_FRAGMENT(dgemma, library) {
  library.def(
      "vocabulary_head(Tensor hidden, Tensor embedding, float softcap, Tensor temperature, "
      "Tensor? active, Tensor? allowed, Tensor? allowed_row, Tensor(a!) logits, Tensor(b!) argmax, "
      "Tensor(c!) entropy, Tensor(d!) row_max, Tensor(e!) row_sum, Tensor(f!) tile_max, "
      "Tensor(g!) tile_sum) -> ()");
}

#if defined(DGEMMA_WITH_CUDA)
namespace dgemma {
namespace {

void vocabulary_head(const Tensor& hidden, const Tensor& embedding, double softcap,
                     const Tensor& temperature, const OptionalTensor& active,
                     const OptionalTensor& allowed, const OptionalTensor& allowed_row,
                     const Tensor& logits, const Tensor& argmax, const Tensor& entropy,
                     const Tensor& row_max, const Tensor& row_sum, const Tensor& tile_max,
                     const Tensor& tile_sum) {
  const Arguments arguments("vocabulary_head", OnCuda::kDevice);
  dgemma_vocabulary_head op = {};
  dgemma_vocabulary_statistics& statistics = op.statistics;
  statistics.logits =
      Logits{logits, softcap, temperature, active, allowed, allowed_row}.describe(arguments);
  const dgemma_logits& read = statistics.logits;
  const Shape positions = {read.batch, read.length};
  const Shape tiles = {read.batch, read.length, tiles_of(read.vocabulary)};
  op.hidden_size = arguments.size(embedding, "embedding", 2, 1);
  op.hidden = arguments.in(hidden, "hidden", {read.batch, read.length, op.hidden_size}, read.dtype);
  op.embedding =
      arguments.in(embedding, "embedding", {read.vocabulary, op.hidden_size}, read.dtype);
  op.raw = arguments.out(logits, "logits", {read.batch, read.length, read.vocabulary}, read.dtype);
  statistics.argmax = arguments.out<int32_t>(argmax, "argmax", positions);
  statistics.entropy = arguments.out<float>(entropy, "entropy", positions);
  statistics.row_max = arguments.out<float>(row_max, "row_max", positions);
  statistics.row_sum = arguments.out<double>(row_sum, "row_sum", positions);
  statistics.tile_max = arguments.out<float>(tile_max, "tile_max", tiles);
  statistics.tile_sum = arguments.out<float>(tile_sum, "tile_sum", tiles);
  const Tensor workspace = torch::stable::new_empty(
      hidden, {static_cast<int64_t>(dgemma_cuda_vocabulary_head_workspace(&op))}, ScalarType::Byte);
  statistics.workspace = arguments.workspace(workspace, &statistics.workspace_bytes);
  OnCuda("vocabulary_head", hidden).run(&dgemma_cuda_vocabulary_head, op);
}

template <typename Library>
void implement(Library& library) {
  library.impl("vocabulary_head", TORCH_BOX(&vocabulary_head));
}

}  // namespace
}  // namespace dgemma

#if defined(DGEMMA_SIM)
STABLE_TORCH_LIBRARY_IMPL(dgemma, CPU, library) { dgemma::implement(library); }
#else
STABLE_TORCH_LIBRARY_IMPL(dgemma, CUDA, library) { dgemma::implement(library); }
#endif
#endif
