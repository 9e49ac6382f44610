// The C entry points for CUDA of the operators on stored logits: statistics, sampling, noise, the
// end of a step. Sizes and pointers are checked before a launch; values on the device cannot be.
#include <cinttypes>

#include "denoise/cuda/entry_points.h"
#include "denoise/sizes.h"

namespace dgemma {
namespace {

// Keeps rows times their blocks in a grid's first extent.
constexpr int64_t kMostRows = 1 << 20;

}  // namespace

dgemma_status check_cuda_rows(int64_t batch, int64_t length, int64_t vocabulary,
                              dgemma_cuda* cuda) {
  const dgemma_status status = check_sizes(batch, length, vocabulary, cuda);
  if (status != DGEMMA_OK) return status;
  if (length > kLongestCanvas)
    return fail(cuda, DGEMMA_UNSUPPORTED, "length: got %" PRId64 ", wants at most %d", length,
                kLongestCanvas);
  if (batch * length > kMostRows)
    return fail(cuda, DGEMMA_UNSUPPORTED,
                "batch x length: got %" PRId64 " x %" PRId64 ", wants at most %" PRId64, batch,
                length, kMostRows);
  return DGEMMA_OK;
}

dgemma_status check_cuda_logits(const dgemma_logits& logits, dgemma_cuda* cuda) {
  dgemma_status status = check_cuda_rows(logits.batch, logits.length, logits.vocabulary, cuda);
  if (status != DGEMMA_OK) return status;
  if (logits.dtype != DGEMMA_FLOAT32 && logits.dtype != DGEMMA_BFLOAT16)
    return fail(cuda, DGEMMA_UNSUPPORTED, "dtype: got %d, wants float32 (0) or bfloat16 (1)",
                static_cast<int>(logits.dtype));
  if (!(logits.softcap >= 0.0f) || logits.softcap > 3e38f)
    return fail(cuda, DGEMMA_INVALID_ARGUMENT,
                "softcap: got %g, wants 0 (none) or a positive number", logits.softcap);
  return DGEMMA_OK;
}

}  // namespace dgemma

size_t dgemma_cuda_vocabulary_statistics_workspace(const dgemma_vocabulary_statistics* op) {
  dgemma::WorkspaceParts workspace;
  dgemma::take_tile_parts(&workspace, nullptr, op->logits);
  return workspace.bytes;
}

dgemma_status dgemma_cuda_vocabulary_statistics(const dgemma_vocabulary_statistics* op,
                                                dgemma_cuda* cuda) {
  using namespace dgemma;
  dgemma_status status = check_cuda_logits(op->logits, cuda);
  if (is_done(status, op->logits.batch, op->logits.length)) return status;
  const OperandList operands = operands_of(*op);
  status = check_operands(operands, cuda);
  if (status != DGEMMA_OK) return status;
  status = check_workspace(operands, op->workspace, op->workspace_bytes,
                           dgemma_cuda_vocabulary_statistics_workspace(op), cuda);
  if (status != DGEMMA_OK) return status;
  Gpu gpu = {};
  status = find_gpu(&gpu, cuda);
  if (status != DGEMMA_OK) return status;
  WorkspaceParts workspace;
  const TileParts parts = take_tile_parts(&workspace, op->workspace, op->logits);
  status = launched(launch_tile_statistics(*op, parts, cuda->stream), cuda);
  if (status != DGEMMA_OK) return status;
  return launched(launch_finish_statistics(*op, parts, cuda->stream), cuda);
}

dgemma_status dgemma_cuda_sample(const dgemma_sample* op, dgemma_cuda* cuda) {
  using namespace dgemma;
  dgemma_status status = check_cuda_logits(op->logits, cuda);
  if (is_done(status, op->logits.batch, op->logits.length)) return status;
  status = check_operands(operands_of(*op), cuda);
  if (status != DGEMMA_OK) return status;
  Gpu gpu = {};
  status = find_gpu(&gpu, cuda);
  return status != DGEMMA_OK ? status : launched(launch_sample(*op, cuda->stream), cuda);
}

dgemma_status dgemma_cuda_merge_vocabulary_shards(const dgemma_merge_vocabulary_shards* op,
                                                  dgemma_cuda* cuda) {
  using namespace dgemma;
  dgemma_status status = check_shards(*op, cuda);
  if (status == DGEMMA_OK) status = check_cuda_rows(op->batch, op->length, op->shards, cuda);
  if (is_done(status, op->batch, op->length)) return status;
  status = check_operands(operands_of(*op), cuda);
  if (status != DGEMMA_OK) return status;
  Gpu gpu = {};
  status = find_gpu(&gpu, cuda);
  return status != DGEMMA_OK ? status : launched(launch_merge_shards(*op, cuda->stream), cuda);
}

dgemma_status dgemma_cuda_noise(const dgemma_noise* op, dgemma_cuda* cuda) {
  using namespace dgemma;
  dgemma_status status = check_cuda_rows(op->batch, op->length, op->vocabulary, cuda);
  if (status == DGEMMA_OK &&
      (op->purpose < DGEMMA_PURPOSE_INITIAL_NOISE || op->purpose > DGEMMA_PURPOSE_RENOISE))
    return fail(cuda, DGEMMA_INVALID_ARGUMENT,
                "purpose: got %d, wants 0 (initial noise), 1 (sample) or 2 (renoise)",
                static_cast<int>(op->purpose));
  if (is_done(status, op->batch, op->length)) return status;
  status = check_operands(operands_of(*op), cuda);
  if (status != DGEMMA_OK) return status;
  Gpu gpu = {};
  status = find_gpu(&gpu, cuda);
  return status != DGEMMA_OK ? status : launched(launch_noise(*op, cuda->stream), cuda);
}

dgemma_status dgemma_cuda_update_canvas(const dgemma_update_canvas* op, dgemma_cuda* cuda) {
  using namespace dgemma;
  dgemma_status status = check_cuda_rows(op->batch, op->length, op->vocabulary, cuda);
  if (is_done(status, op->batch, op->length)) return status;
  status = check_operands(operands_of(*op), cuda);
  if (status != DGEMMA_OK) return status;
  Gpu gpu = {};
  status = find_gpu(&gpu, cuda);
  return status != DGEMMA_OK ? status : launched(launch_update_canvas(*op, cuda->stream), cuda);
}
