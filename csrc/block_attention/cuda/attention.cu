// The C entry points for CUDA: checks of extents and pointers, then the launches. Slots, lengths
// and spans are on the device and cannot be checked; a slot out of range is skipped there.
#include <cmath>

#include "block_attention/cuda/attention.h"
#include "block_attention/operands.h"
#include "block_attention/pages.h"
#include "cuda/entry.h"

namespace dgemma {
namespace {

// What a thread copies at once.
constexpr int64_t kPieceBytes = 16;

template <typename Operation>
dgemma_status check_strides(const Operation& op, dgemma_cuda* cuda) {
  const int64_t multiple = kPieceBytes / (op.dtype == DGEMMA_BFLOAT16 ? 2 : 4);
  for (const NamedStride& stride : strides_of(op))
    if (stride.value < 0 || stride.value > kMaxStride || stride.value % multiple != 0)
      return fail(cuda, DGEMMA_INVALID_ARGUMENT, "%s: got %lld, wants a multiple of %lld",
                  stride.name, static_cast<long long>(stride.value),
                  static_cast<long long>(multiple));
  return DGEMMA_OK;
}

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

dgemma_status check_attention(const dgemma_paged_attention& op, dgemma_cuda* cuda) {
  if (const char* error = attention_cuda_error(op))
    return fail(cuda, DGEMMA_UNSUPPORTED, "%s", error);
  if (!std::isfinite(op.scale))
    return fail(cuda, DGEMMA_INVALID_ARGUMENT, "scale: got %g, wants a finite number", op.scale);
  if (const char* error = pages_cuda_error(op)) return fail(cuda, DGEMMA_UNSUPPORTED, "%s", error);
  if (const auto status = check_strides(op, cuda)) return status;
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
  return attention.page_table != nullptr
             ? launch_paged_attention_sm80_bf16(plan, attention, batch, stream)
             : launch_attention_sm80_bf16(plan, attention, batch, stream);
}

// Plans and launches a call that was checked; make(plan) gives the kernels' arguments.
template <typename Operation, typename Make>
dgemma_status attend(const Operation& op, Filling filling, dgemma_cuda* cuda, const Make& make) {
  const AttentionExtents extents = extents_of(op);
  if (extents.requests == 0 || extents.rows == 0) return DGEMMA_OK;
  Gpu gpu = {};
  dgemma_status status = find_gpu(&gpu, cuda);
  if (status != DGEMMA_OK) return status;
  const AttentionPlan plan = make_attention_plan(extents, gpu, filling);
  status = check_workspace(operands_of(op), op.workspace, op.workspace_bytes, plan.workspace_bytes,
                           cuda);
  if (status != DGEMMA_OK) return status;
  const Attention attention = make(plan);
  const auto batch = static_cast<int32_t>(extents.requests);
  status = launched(launch_attention(plan, attention, batch, cuda->stream), cuda);
  if (status != DGEMMA_OK || plan.splits == 1) return status;
  return launched(launch_combine_splits(plan, attention, batch, cuda->stream), cuda);
}

dgemma_status attend(const dgemma_block_attention& op, bool causal, Filling filling,
                     dgemma_cuda* cuda) {
  const dgemma_status status = check_attention(op, causal, cuda);
  if (status != DGEMMA_OK) return status;
  return attend(op, filling, cuda,
                [&](const AttentionPlan& plan) { return make_attention(op, plan, causal); });
}

}  // namespace
}  // namespace dgemma

size_t dgemma_cuda_block_attention_workspace(const dgemma_block_attention* op) {
  if (dgemma::attention_cuda_error(*op) != nullptr) return 0;
  // The workspace must serve whichever GPU the call will run on.
  return dgemma::attention_workspace_bytes(dgemma::extents_of(*op));
}

size_t dgemma_cuda_paged_attention_workspace(const dgemma_paged_attention* op) {
  if (dgemma::attention_cuda_error(*op) != nullptr) return 0;
  return dgemma::attention_workspace_bytes(dgemma::extents_of(*op));
}

dgemma_status dgemma_cuda_paged_attention(const dgemma_paged_attention* op, dgemma_cuda* cuda) {
  using namespace dgemma;
  if (const dgemma_status status = check_attention(*op, cuda)) return status;
  return attend(*op, Filling::kByRequest, cuda,
                [&](const AttentionPlan& plan) { return make_attention(*op, plan); });
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

dgemma_status dgemma_cuda_append_to_pages(const dgemma_append_to_pages* op, dgemma_cuda* cuda) {
  using namespace dgemma;
  if (op->dtype != DGEMMA_FLOAT32 && op->dtype != DGEMMA_BFLOAT16)
    return fail(cuda, DGEMMA_UNSUPPORTED, "dtype: got %d, wants float32 (0) or bfloat16 (1)",
                static_cast<int>(op->dtype));
  const int64_t bytes = op->head_dim * (op->dtype == DGEMMA_BFLOAT16 ? 2 : 4);
  if (op->key_heads < 1 || op->key_heads > 1024 || op->head_dim < 1 || bytes % kPieceBytes != 0 ||
      bytes > (1 << 16))
    return fail(
        cuda, DGEMMA_UNSUPPORTED,
        "key_heads, head_dim: got %lld, %lld, wants up to 1024 heads of a multiple of 16 bytes "
        "up to 2^16",
        static_cast<long long>(op->key_heads), static_cast<long long>(op->head_dim));
  if (op->tokens < 0 || op->tokens > (1 << 20) || op->pages < 0 || op->pages > INT32_MAX ||
      op->page_size < 1 || op->page_size > (1 << 20))
    return fail(cuda, DGEMMA_INVALID_ARGUMENT,
                "tokens, pages, page_size: got %lld, %lld, %lld, wants up to 2^20, 2^31, 2^20",
                static_cast<long long>(op->tokens), static_cast<long long>(op->pages),
                static_cast<long long>(op->page_size));
  if (const dgemma_status status = check_strides(*op, cuda)) return status;
  if (const dgemma_status status = check_operands(operands_of(*op), cuda)) return status;
  if (op->tokens == 0 || op->pages == 0) return DGEMMA_OK;
  if (const char* pool = pool_that_overlaps(*op))
    return fail(cuda, DGEMMA_INVALID_ARGUMENT,
                "%s: got strides by which its rows overlap, wants rows apart", pool);
  if (pools_overlap(*op))
    return fail(cuda, DGEMMA_INVALID_ARGUMENT,
                "value_pages: got %p, which overlaps key_pages, wants memory of its own",
                op->value_pages);
  Gpu gpu = {};
  const dgemma_status status = find_gpu(&gpu, cuda);
  return status != DGEMMA_OK ? status : launched(launch_append_to_pages(*op, cuda->stream), cuda);
}
