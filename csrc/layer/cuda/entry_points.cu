// The C entry points for CUDA: checks, then a launch each.
#include "cuda/entry.h"
#include "layer/cuda/kernels.h"

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
  status = check_pointers({{"ids", op->ids, sizeof(int32_t)},
                           {"embedding", op->embedding, 16},
                           {"conditioning", op->conditioning, 16, true},
                           {"output", op->output, 16}},
                          cuda);
  return status != DGEMMA_OK ? status : run(&launch_token_embedding, *op, cuda);
}

dgemma_status dgemma_cuda_rms_norm(const dgemma_rms_norm* op, dgemma_cuda* cuda) {
  using namespace dgemma;
  dgemma_status status = check_rows(op->tokens, op->hidden_size, op->dtype, cuda);
  if (status != DGEMMA_OK || op->tokens == 0) return status;
  status = check_pointers(
      {{"input", op->input, 16}, {"weight", op->weight, 16, true}, {"output", op->output, 16}},
      cuda);
  return status != DGEMMA_OK ? status : run(&launch_rms_norm, *op, cuda);
}

dgemma_status dgemma_cuda_attention_residual(const dgemma_attention_residual* op,
                                             dgemma_cuda* cuda) {
  using namespace dgemma;
  dgemma_status status = check_rows(op->tokens, op->hidden_size, op->dtype, cuda);
  if (status != DGEMMA_OK || op->tokens == 0) return status;
  status = check_pointers({{"hidden", op->hidden, 16},
                           {"attended", op->attended, 16},
                           {"attended_norm", op->attended_norm, 16},
                           {"dense_norm", op->dense_norm, 16},
                           {"sparse_norm", op->sparse_norm, 16},
                           {"residual", op->residual, 16},
                           {"dense_input", op->dense_input, 16},
                           {"sparse_input", op->sparse_input, 16}},
                          cuda);
  return status != DGEMMA_OK ? status : run(&launch_attention_residual, *op, cuda);
}

dgemma_status dgemma_cuda_layer_output(const dgemma_layer_output* op, dgemma_cuda* cuda) {
  using namespace dgemma;
  dgemma_status status = check_rows(op->tokens, op->hidden_size, op->dtype, cuda);
  if (status != DGEMMA_OK || op->tokens == 0) return status;
  const bool last = op->next_norm == nullptr;
  status = check_pointers({{"residual", op->residual, 16},
                           {"dense", op->dense, 16},
                           {"sparse", op->sparse, 16},
                           {"dense_norm", op->dense_norm, 16},
                           {"sparse_norm", op->sparse_norm, 16},
                           {"norm", op->norm, 16},
                           {"next_norm", op->next_norm, 16, true},
                           {"output", op->output, 16},
                           {"next_input", op->next_input, 16, last}},
                          cuda);
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
  const dgemma_status status = check_pointers(
      {{"gate", op->gate, 16}, {"up", op->up, 16}, {"output", op->output, 16}}, cuda);
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
  status = check_pointers({{"raw_query", op->raw_query, 2},
                           {"raw_key", op->raw_key, 2},
                           {"raw_value", op->raw_value, 2, true},
                           {"query_norm", op->query_norm, 2},
                           {"key_norm", op->key_norm, 2},
                           {"cosine", op->cosine, 2},
                           {"sine", op->sine, 2},
                           {"query", op->query, 2},
                           {"key", op->key, 2},
                           {"value", op->value, 2}},
                          cuda);
  return status != DGEMMA_OK ? status : run(&launch_normalise_heads, *op, cuda);
}
