// The C entry points for CUDA: checks, then a launch each.
#include "cuda/entry.h"
#include "layer/cuda/kernels.h"
#include "layer/operands.h"

namespace dgemma {
namespace {

// Blocks of a grid's first extent, one a token at most.
constexpr int64_t kMostTokens = 1 << 24;

dgemma_status check_rows(int64_t tokens, int64_t width, dgemma_dtype dtype, dgemma_cuda* cuda) {
  if (dtype != DGEMMA_BFLOAT16)
    return fail(cuda, DGEMMA_UNSUPPORTED, "dtype: got %d, wants bfloat16 (1)",
                static_cast<int>(dtype));
  if (tokens < 0 || tokens > kMostTokens)
    return fail(cuda, DGEMMA_INVALID_ARGUMENT, "tokens: got %lld, wants 0 to %lld",
                static_cast<long long>(tokens), static_cast<long long>(kMostTokens));
  if (width < 8 || width > kWidestRow || width % 8 != 0)
    return fail(cuda, DGEMMA_UNSUPPORTED, "hidden_size: got %lld, wants a multiple of 8 up to %lld",
                static_cast<long long>(width), static_cast<long long>(kWidestRow));
  return DGEMMA_OK;
}

template <typename Op>
dgemma_status run(const char* (*launch)(const Op&, void*), const Op& op, dgemma_cuda* cuda) {
  Gpu gpu = {};
  const dgemma_status status = find_gpu(&gpu, cuda);
  return status != DGEMMA_OK ? status : launched(launch(op, cuda->stream), cuda);
}

}  // namespace
}  // namespace dgemma

dgemma_status dgemma_cuda_token_embedding(const dgemma_token_embedding* op, dgemma_cuda* cuda) {
  using namespace dgemma;
  dgemma_status status = check_rows(op->tokens, op->hidden_size, op->dtype, cuda);
  if (status != DGEMMA_OK) return status;
  if (op->vocabulary < 1 || op->vocabulary > INT32_MAX)
    return fail(cuda, DGEMMA_INVALID_ARGUMENT, "vocabulary: got %lld, wants 1 to %d",
                static_cast<long long>(op->vocabulary), INT32_MAX);
  if (op->tokens == 0) return DGEMMA_OK;
  status = check_operands(operands_of(*op), cuda);
  return status != DGEMMA_OK ? status : run(&launch_token_embedding, *op, cuda);
}

dgemma_status dgemma_cuda_rms_norm(const dgemma_rms_norm* op, dgemma_cuda* cuda) {
  using namespace dgemma;
  dgemma_status status = check_rows(op->tokens, op->hidden_size, op->dtype, cuda);
  if (status != DGEMMA_OK || op->tokens == 0) return status;
  status = check_operands(operands_of(*op), cuda);
  return status != DGEMMA_OK ? status : run(&launch_rms_norm, *op, cuda);
}

dgemma_status dgemma_cuda_attention_residual(const dgemma_attention_residual* op,
                                             dgemma_cuda* cuda) {
  using namespace dgemma;
  dgemma_status status = check_rows(op->tokens, op->hidden_size, op->dtype, cuda);
  if (status != DGEMMA_OK || op->tokens == 0) return status;
  status = check_operands(operands_of(*op), cuda);
  return status != DGEMMA_OK ? status : run(&launch_attention_residual, *op, cuda);
}

dgemma_status dgemma_cuda_layer_output(const dgemma_layer_output* op, dgemma_cuda* cuda) {
  using namespace dgemma;
  dgemma_status status = check_rows(op->tokens, op->hidden_size, op->dtype, cuda);
  if (status != DGEMMA_OK || op->tokens == 0) return status;
  status = check_operands(operands_of(*op), cuda);
  return status != DGEMMA_OK ? status : run(&launch_layer_output, *op, cuda);
}

dgemma_status dgemma_cuda_gelu_product(const dgemma_gelu_product* op, dgemma_cuda* cuda) {
  using namespace dgemma;
  if (op->dtype != DGEMMA_BFLOAT16)
    return fail(cuda, DGEMMA_UNSUPPORTED, "dtype: got %d, wants bfloat16 (1)",
                static_cast<int>(op->dtype));
  if (op->values < 0 || op->values % 8 != 0 || op->values > (int64_t{1} << 40))
    return fail(cuda, DGEMMA_INVALID_ARGUMENT, "values: got %lld, wants a multiple of 8 up to 2^40",
                static_cast<long long>(op->values));
  if (op->values == 0) return DGEMMA_OK;
  const dgemma_status status = check_operands(operands_of(*op), cuda);
  return status != DGEMMA_OK ? status : run(&launch_gelu_product, *op, cuda);
}

dgemma_status dgemma_cuda_normalise_heads(const dgemma_normalise_heads* op, dgemma_cuda* cuda) {
  using namespace dgemma;
  dgemma_status status = check_rows(op->tokens, 8, op->dtype, cuda);
  if (status != DGEMMA_OK) return status;
  if (op->head_dim < 2 || op->head_dim > kWidestHead || op->head_dim % 2 != 0)
    return fail(cuda, DGEMMA_UNSUPPORTED, "head_dim: got %lld, wants an even number up to %lld",
                static_cast<long long>(op->head_dim), static_cast<long long>(kWidestHead));
  if (op->query_heads < 1 || op->key_heads < 1 || op->query_heads > 1024 || op->key_heads > 1024)
    return fail(cuda, DGEMMA_INVALID_ARGUMENT,
                "query_heads, key_heads: got %lld and %lld, wants 1 to 1024",
                static_cast<long long>(op->query_heads), static_cast<long long>(op->key_heads));
  if (op->tokens == 0) return DGEMMA_OK;
  status = check_operands(operands_of(*op), cuda);
  return status != DGEMMA_OK ? status : run(&launch_normalise_heads, *op, cuda);
}
