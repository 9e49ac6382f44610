// The C entry points for CUDA of the operators on stored logits: statistics, sampling, noise, the
// end of a step. Sizes and pointers are checked before a launch; values on the device cannot be.
#include <cinttypes>

#include "denoise/cuda/entry_points.h"
#include "denoise/sizes.h"

namespace dgemma {
namespace {

// Keeps rows times their blocks in a grid's first extent.
constexpr int64_t kMostRows = 1 << 20;

dgemma_status check_allowed(const dgemma_allowed& allowed, dgemma_cuda* cuda) {
  if (allowed.mask == nullptr) return DGEMMA_OK;
  return check_pointers({{"allowed", allowed.mask, alignof(int32_t)},
                         {"allowed_row", allowed.row_index, alignof(int32_t)}},
                        cuda);
}

dgemma_status check_rows(int64_t batch, int64_t length, int64_t vocabulary, dgemma_cuda* cuda) {
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

// True when there is nothing to do; then `status` says whether that is an error.
bool is_done(dgemma_status status, int64_t batch, int64_t length) {
  return status != DGEMMA_OK || batch == 0 || length == 0;
}

}  // namespace

dgemma_status check_cuda_logits(const dgemma_logits& logits, dgemma_cuda* cuda) {
  dgemma_status status = check_rows(logits.batch, logits.length, logits.vocabulary, cuda);
  if (status != DGEMMA_OK) return status;
  if (logits.dtype != DGEMMA_FLOAT32 && logits.dtype != DGEMMA_BFLOAT16)
    return fail(cuda, DGEMMA_UNSUPPORTED, "dtype: got %d, wants float32 (0) or bfloat16 (1)",
                static_cast<int>(logits.dtype));
  if (!(logits.softcap >= 0.0f) || logits.softcap > 3e38f)
    return fail(cuda, DGEMMA_INVALID_ARGUMENT,
                "softcap: got %g, wants 0 (none) or a positive number", logits.softcap);
  if (logits.batch == 0 || logits.length == 0) return DGEMMA_OK;
  // Rows of a multiple of four are read four values at a time.
  const size_t value = logits.dtype == DGEMMA_BFLOAT16 ? 2 : 4;
  status = check_pointers({{"logits", logits.raw, logits.vocabulary % 4 == 0 ? 4 * value : value},
                           {"temperature", logits.temperature, alignof(float)}},
                          cuda);
  return status != DGEMMA_OK ? status : check_allowed(logits.allowed, cuda);
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
  status = check_statistics_outputs(*op, cuda);
  if (status != DGEMMA_OK) return status;
  status = check_workspace(op->workspace, op->workspace_bytes,
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
  const bool drawn = op->uniforms == nullptr;
  status = check_pointers({{"row_max", op->row_max, alignof(float)},
                           {"row_sum", op->row_sum, alignof(double)},
                           {"tile_max", op->tile_max, alignof(float)},
                           {"tile_sum", op->tile_sum, alignof(float)},
                           {"seed", op->seed, alignof(int64_t), !drawn},
                           {"canvas_index", op->canvas_index, alignof(int32_t), !drawn},
                           {"step", op->step, alignof(int32_t), !drawn},
                           {"uniforms", op->uniforms, alignof(double), true},
                           {"tokens", op->tokens, alignof(int32_t)}},
                          cuda);
  if (status != DGEMMA_OK) return status;
  Gpu gpu = {};
  status = find_gpu(&gpu, cuda);
  return status != DGEMMA_OK ? status : launched(launch_sample(*op, cuda->stream), cuda);
}

dgemma_status dgemma_cuda_noise(const dgemma_noise* op, dgemma_cuda* cuda) {
  using namespace dgemma;
  dgemma_status status = check_rows(op->batch, op->length, op->vocabulary, cuda);
  if (status == DGEMMA_OK &&
      (op->purpose < DGEMMA_PURPOSE_INITIAL_NOISE || op->purpose > DGEMMA_PURPOSE_RENOISE))
    return fail(cuda, DGEMMA_INVALID_ARGUMENT,
                "purpose: got %d, wants 0 (initial noise), 1 (sample) or 2 (renoise)",
                static_cast<int>(op->purpose));
  if (is_done(status, op->batch, op->length)) return status;
  const bool drawn = op->uniforms == nullptr;
  status = check_pointers({{"seed", op->seed, alignof(int64_t), !drawn},
                           {"canvas_index", op->canvas_index, alignof(int32_t), !drawn},
                           {"step", op->step, alignof(int32_t), !drawn},
                           {"uniforms", op->uniforms, alignof(double), true},
                           {"tokens", op->tokens, alignof(int32_t)}},
                          cuda);
  if (status == DGEMMA_OK) status = check_allowed(op->allowed, cuda);
  if (status != DGEMMA_OK) return status;
  Gpu gpu = {};
  status = find_gpu(&gpu, cuda);
  return status != DGEMMA_OK ? status : launched(launch_noise(*op, cuda->stream), cuda);
}

dgemma_status dgemma_cuda_update_canvas(const dgemma_update_canvas* op, dgemma_cuda* cuda) {
  using namespace dgemma;
  dgemma_status status = check_rows(op->batch, op->length, op->vocabulary, cuda);
  if (is_done(status, op->batch, op->length)) return status;
  const bool drawn = op->uniforms == nullptr;
  status = check_pointers({{"sampled", op->sampled, alignof(int32_t)},
                           {"argmax", op->argmax, alignof(int32_t)},
                           {"entropy", op->entropy, alignof(float)},
                           {"uniforms", op->uniforms, alignof(double), true},
                           {"seed", op->seed, alignof(int64_t), !drawn},
                           {"canvas_index", op->canvas_index, alignof(int32_t), !drawn},
                           {"max_steps", op->max_steps, alignof(int32_t)},
                           {"t_min", op->t_min, alignof(double)},
                           {"t_max", op->t_max, alignof(double)},
                           {"entropy_bound", op->entropy_bound, alignof(float)},
                           {"stability_threshold", op->stability_threshold, alignof(int32_t)},
                           {"confidence_threshold", op->confidence_threshold, alignof(float)},
                           {"active", op->active, 1},
                           {"canvas", op->canvas, alignof(int32_t)},
                           {"draft", op->draft, alignof(int32_t)},
                           {"stable_steps", op->stable_steps, alignof(int32_t)},
                           {"step", op->step, alignof(int32_t)},
                           {"temperature", op->temperature, alignof(float)},
                           {"accepted", op->accepted, 1},
                           {"mean_entropy", op->mean_entropy, alignof(float)},
                           {"status", op->status, alignof(int32_t)}},
                          cuda);
  if (status == DGEMMA_OK) status = check_allowed(op->allowed, cuda);
  if (status != DGEMMA_OK) return status;
  Gpu gpu = {};
  status = find_gpu(&gpu, cuda);
  return status != DGEMMA_OK ? status : launched(launch_update_canvas(*op, cuda->stream), cuda);
}
