// The C entry points for CUDA: checks of extents and pointers, then the launches. Slots, lengths
// and spans are on the device and cannot be checked; a slot out of range is skipped there.
#include <cmath>

#include "block_attention/cuda/attention.h"
#include "block_attention/operands.h"
#include "cuda/entry.h"

namespace dgemma {
namespace {

dgemma_status check_attention(const dgemma_block_attention& op, bool causal, dgemma_cuda* cuda) {
  if (const char* error = attention_cuda_error(op))
    return fail(cuda, DGEMMA_UNSUPPORTED, "%s", error);
  if (!std::isfinite(op.scale))
    return fail(cuda, DGEMMA_INVALID_ARGUMENT, "scale: got %g, wants a finite number", op.scale);
  if (op.spans != nullptr && !causal)
    return fail(cuda, DGEMMA_INVALID_ARGUMENT,
                "spans: got a pointer, wants NULL for canvas attention");
  if (op.batch == 0 || op.block_length == 0) return DGEMMA_OK;
  return check_operands(operands_of(op), cuda);
}

const char* launch_attention(const AttentionPlan& plan, const Attention& attention, int32_t batch,
                             void* stream) {
#if defined(DGEMMA_WITH_SM90)
  if (plan.path == CudaPath::kSm90)
    return attention.head_dim == 512
               ? launch_attention_512_sm90_bf16(plan, attention, batch, stream)
               : launch_attention_256_sm90_bf16(plan, attention, batch, stream);
#endif
  return launch_attention_sm80_bf16(plan, attention, batch, stream);
}

dgemma_status attend(const dgemma_block_attention& op, bool causal, Filling filling,
                     dgemma_cuda* cuda) {
  dgemma_status status = check_attention(op, causal, cuda);
  if (status != DGEMMA_OK || op.batch == 0 || op.block_length == 0) return status;
  Gpu gpu = {};
  status = find_gpu(&gpu, cuda);
  if (status != DGEMMA_OK) return status;
  const AttentionPlan plan = make_attention_plan(op, gpu, filling);
  status = check_workspace(operands_of(op), op.workspace, op.workspace_bytes, plan.workspace_bytes,
                           cuda);
  if (status != DGEMMA_OK) return status;
  const Attention attention = make_attention(op, plan, causal);
  const auto batch = static_cast<int32_t>(op.batch);
  status = launched(launch_attention(plan, attention, batch, cuda->stream), cuda);
  if (status != DGEMMA_OK || plan.splits == 1) return status;
  return launched(launch_combine_splits(plan, attention, batch, cuda->stream), cuda);
}

}  // namespace
}  // namespace dgemma

size_t dgemma_cuda_block_attention_workspace(const dgemma_block_attention* op) {
  if (dgemma::attention_cuda_error(*op) != nullptr) return 0;
  // The workspace must serve whichever GPU the call will run on.
  return dgemma::attention_workspace_bytes(*op);
}

dgemma_status dgemma_cuda_canvas_attention(const dgemma_block_attention* op, dgemma_cuda* cuda) {
  return dgemma::attend(*op, false, dgemma::Filling::kByRequest, cuda);
}

dgemma_status dgemma_cuda_batched_canvas_attention(const dgemma_block_attention* op,
                                                   dgemma_cuda* cuda) {
  return dgemma::attend(*op, false, dgemma::Filling::kByBatch, cuda);
}

dgemma_status dgemma_cuda_causal_attention(const dgemma_block_attention* op, dgemma_cuda* cuda) {
  return dgemma::attend(*op, true, dgemma::Filling::kByRequest, cuda);
}

dgemma_status dgemma_cuda_append_to_cache(const dgemma_append_to_cache* op, dgemma_cuda* cuda) {
  using namespace dgemma;
  if (op->dtype != DGEMMA_FLOAT32 && op->dtype != DGEMMA_BFLOAT16)
    return fail(cuda, DGEMMA_UNSUPPORTED, "dtype: got %d, wants float32 (0) or bfloat16 (1)",
                static_cast<int>(op->dtype));
  const int64_t bytes = op->key_heads * op->head_dim * (op->dtype == DGEMMA_BFLOAT16 ? 2 : 4);
  if (op->key_heads < 1 || op->head_dim < 1 || bytes % 16 != 0 || bytes > (1 << 20))
    return fail(cuda, DGEMMA_UNSUPPORTED,
                "key_heads x head_dim: got %lld x %lld, wants a multiple of 16 bytes up to 2^20",
                static_cast<long long>(op->key_heads), static_cast<long long>(op->head_dim));
  if (op->batch < 0 || op->batch > 65535 || op->block_length < 0 || op->block_length > (1 << 20) ||
      op->slots < 0 || op->capacity < 0 || op->capacity > INT32_MAX || op->slots > INT32_MAX)
    return fail(cuda, DGEMMA_INVALID_ARGUMENT,
                "batch, block_length, slots, capacity: got %lld, %lld, %lld, %lld, wants up to "
                "65535, 2^20, 2^31, 2^31",
                static_cast<long long>(op->batch), static_cast<long long>(op->block_length),
                static_cast<long long>(op->slots), static_cast<long long>(op->capacity));
  if (op->batch == 0 || op->block_length == 0 || op->slots == 0 || op->capacity == 0)
    return DGEMMA_OK;
  dgemma_status status = check_operands(operands_of(*op), cuda);
  if (status != DGEMMA_OK) return status;
  Gpu gpu = {};
  status = find_gpu(&gpu, cuda);
  return status != DGEMMA_OK ? status : launched(launch_append_to_cache(*op, cuda->stream), cuda);
}
