// The C entry points for CUDA of the vocabulary head: checks, the product with its epilogue, and
// the reduction over the tiles.
#include "denoise/cuda/entry_points.h"
#include "denoise/cuda/head.h"

namespace dgemma {
namespace {

dgemma_status check_head(const dgemma_vocabulary_head& op, dgemma_cuda* cuda) {
  if (op.statistics.logits.dtype != DGEMMA_BFLOAT16)
    return fail(cuda, DGEMMA_UNSUPPORTED, "dtype: got %d, wants bfloat16 (1)",
                static_cast<int>(op.statistics.logits.dtype));
  if (op.hidden_size < 8 || op.hidden_size > 65536 || op.hidden_size % 8 != 0)
    return fail(cuda, DGEMMA_UNSUPPORTED,
                "hidden_size: got %lld, wants a multiple of 8 up to 65536",
                static_cast<long long>(op.hidden_size));
  if (op.statistics.logits.batch > 65535)
    return fail(cuda, DGEMMA_UNSUPPORTED, "batch: got %lld, wants at most 65535",
                static_cast<long long>(op.statistics.logits.batch));
  return check_operands(operands_of(op), cuda);
}

// Returns null or the error's text.
const char* multiply(const Head& head, [[maybe_unused]] const Gpu& gpu, void* stream) {
#if defined(DGEMMA_WITH_SM90)
  if (gpu.path == CudaPath::kSm90)
    return launch_head_sm90_bf16(make_head_plan(head.logits, gpu.multiprocessors), head, stream);
#endif
  return launch_head_sm80_bf16(head, stream);
}

}  // namespace
}  // namespace dgemma

size_t dgemma_cuda_vocabulary_head_workspace(const dgemma_vocabulary_head* op) {
  return dgemma_cuda_vocabulary_statistics_workspace(&op->statistics);
}

dgemma_status dgemma_cuda_vocabulary_head(const dgemma_vocabulary_head* op, dgemma_cuda* cuda) {
  using namespace dgemma;
  dgemma_vocabulary_statistics statistics = op->statistics;
  statistics.logits.raw = op->raw;
  dgemma_status status = check_cuda_logits(statistics.logits, cuda);
  if (status != DGEMMA_OK || statistics.logits.batch == 0 || statistics.logits.length == 0)
    return status;
  status = check_head(*op, cuda);
  if (status != DGEMMA_OK) return status;
  status = check_workspace(operands_of(*op), statistics.workspace, statistics.workspace_bytes,
                           dgemma_cuda_vocabulary_head_workspace(op), cuda);
  if (status != DGEMMA_OK) return status;
  Gpu gpu = {};
  status = find_gpu(&gpu, cuda);
  if (status != DGEMMA_OK) return status;

  WorkspaceParts workspace;
  const TileParts parts = take_tile_parts(&workspace, statistics.workspace, statistics.logits);
  const Head head = {make_logits(statistics.logits),
                     static_cast<const device::bfloat16*>(op->hidden),
                     static_cast<const device::bfloat16*>(op->embedding),
                     static_cast<device::bfloat16*>(op->raw),
                     statistics.tile_max,
                     statistics.tile_sum,
                     parts,
                     static_cast<int32_t>(op->hidden_size)};
  status = launched(multiply(head, gpu, cuda->stream), cuda);
  if (status != DGEMMA_OK) return status;
  return launched(launch_finish_statistics(statistics, parts, cuda->stream), cuda);
}
