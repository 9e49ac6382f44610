// The C entry points of the router on the CPU: what stands before its product, the choice behind
// it, and all of it with the projection as a dense product.
#include "grouped_gemm/cpu/route.h"

#include <cmath>

#include "cpu/bfloat16.h"
#include "cpu/dispatch.h"
#include "cpu/entry.h"
#include "grouped_gemm/cpu/choice.h"
#include "grouped_gemm/operands.h"

namespace dgemma {
namespace {

// Tokens of one task: a canvas of 256 gives 32 tasks.
constexpr int64_t kTokensPerTask = 8;

template <typename Run>
void for_runs_of_tokens(dgemma_cpu* cpu, int64_t tokens, const Run& run) {
  run_tasks(cpu, (tokens + kTokensPerTask - 1) / kTokensPerTask, [&](int64_t task) {
    const int64_t first = task * kTokensPerTask, end = first + kTokensPerTask;
    run(first, end < tokens ? end : tokens);
  });
}

// Parts of the workspace.
struct RouteBuffers {
  void* scaled;          // [tokens, hidden_size], dtype
  void* scores;          // [tokens, experts], dtype
  float* probabilities;  // [tokens, experts]
};

size_t carve(const dgemma_route& op, void* base, RouteBuffers* buffers) {
  const auto element = static_cast<int64_t>(bytes_of(op.dtype));
  Carver carver = {static_cast<char*>(base)};
  buffers->scaled = carver.take<char>(op.tokens * op.hidden_size * element);
  buffers->scores = carver.take<char>(op.tokens * op.experts * element);
  buffers->probabilities = carver.take<float>(op.tokens * op.experts);
  return carver.used;
}

bool sizes_fit(const dgemma_route& op) {
  const auto fits = [](int64_t size, int64_t least) {
    return size >= least && size <= kLargestSize;
  };
  return fits(op.tokens, 0) && fits(op.hidden_size, 1) && fits(op.experts, 1);
}

dgemma_status check_epsilon(float epsilon, dgemma_cpu* cpu) {
  if (std::isfinite(epsilon) && epsilon >= 0.0f) return DGEMMA_OK;
  return fail(cpu, DGEMMA_INVALID_ARGUMENT, "epsilon: got %g, wants 0 or a little more", epsilon);
}

dgemma_status check(const dgemma_router_input* op, dgemma_cpu* cpu) {
  if (const auto status = check_call(op, cpu)) return status;
  if (const auto status =
          check_sizes({{"tokens", op->tokens, 0}, {"hidden_size", op->hidden_size, 1}}, cpu))
    return status;
  if (const auto status = check_dtype(op->dtype, cpu)) return status;
  if (const auto status = check_epsilon(op->epsilon, cpu)) return status;
  if (op->tokens == 0) return DGEMMA_OK;
  return check_operands(operands_of(*op), cpu);
}

dgemma_status check(const dgemma_router_choice* op, dgemma_cpu* cpu) {
  if (const auto status = check_call(op, cpu)) return status;
  if (const auto status = check_sizes({{"tokens", op->tokens, 0},
                                       {"experts", op->experts, 1},
                                       {"top_k", op->top_k, 1, op->experts}},
                                      cpu))
    return status;
  if (const auto status = check_dtype(op->dtype, cpu)) return status;
  if (op->tokens == 0) return DGEMMA_OK;
  return check_operands(operands_of(*op), cpu);
}

dgemma_status check(const dgemma_route* op, dgemma_cpu* cpu) {
  if (const auto status = check_call(op, cpu)) return status;
  if (const auto status = check_sizes({{"tokens", op->tokens, 0},
                                       {"hidden_size", op->hidden_size, 1},
                                       {"experts", op->experts, 1},
                                       {"top_k", op->top_k, 1, op->experts}},
                                      cpu))
    return status;
  if (const auto status = check_dtype(op->dtype, cpu)) return status;
  if (const auto status = check_epsilon(op->epsilon, cpu)) return status;
  if (op->tokens == 0) return DGEMMA_OK;
  const OperandList operands = operands_of(*op);
  if (const auto status = check_operands(operands, cpu)) return status;
  return check_workspace(operands, op->workspace, op->workspace_bytes,
                         dgemma_cpu_route_workspace(op), cpu);
}

float value_at(const void* tensor, dgemma_dtype dtype, int64_t index) {
  return dtype == DGEMMA_BFLOAT16 ? to_float(static_cast<const bfloat16*>(tensor)[index])
                                  : static_cast<const float*>(tensor)[index];
}

void softmax(float* values, int64_t count) {
  float largest = values[0];
  for (int64_t i = 1; i < count; ++i) largest = values[i] > largest ? values[i] : largest;
  float sum = 0.0f;
  for (int64_t i = 0; i < count; ++i) sum += values[i] = std::exp(values[i] - largest);
  for (int64_t i = 0; i < count; ++i) values[i] /= sum;
}

// Normalises and scales tokens that were checked.
void scale_tokens(const dgemma_router_input& op, dgemma_cpu_variant variant, dgemma_cpu* cpu) {
  const auto hidden_scale = static_cast<float>(std::pow(static_cast<double>(op.hidden_size), -0.5));
  const RouterInputTask scale = DGEMMA_TABLE_OF(variant, router_input_tasks)[op.dtype];
  for_runs_of_tokens(cpu, op.tokens,
                     [&](int64_t first, int64_t end) { scale(op, hidden_scale, first, end); });
}

// Chooses a token's experts and their weights from its scores. The sum is in their order.
void choose(const dgemma_route& op, const RouteBuffers& buffers, int64_t token) {
  float* p = buffers.probabilities + token * op.experts;
  for (int64_t e = 0; e < op.experts; ++e)
    p[e] = value_at(buffers.scores, op.dtype, token * op.experts + e);
  softmax(p, op.experts);
  int32_t* ids = op.expert_ids + token * op.top_k;
  float* weights = op.expert_weights + token * op.top_k;
  choose_largest(p, op.experts, op.top_k, ids, weights);
  float sum = 0.0f;
  for (int64_t k = 0; k < op.top_k; ++k) sum += weights[k];
  for (int64_t k = 0; k < op.top_k; ++k)
    weights[k] = weights[k] / sum * value_at(op.per_expert_scale, op.dtype, ids[k]);
}

}  // namespace
}  // namespace dgemma

dgemma_status dgemma_cpu_router_input(const dgemma_router_input* op, dgemma_cpu* cpu) {
  using namespace dgemma;
  if (const auto status = check(op, cpu)) return status;
  dgemma_cpu_variant variant;
  if (const auto status = resolve_cpu_variant(cpu, &variant)) return status;
  scale_tokens(*op, variant, cpu);
  return DGEMMA_OK;
}

dgemma_status dgemma_cpu_router_choice(const dgemma_router_choice* op, dgemma_cpu* cpu) {
  using namespace dgemma;
  if (const auto status = check(op, cpu)) return status;
  dgemma_cpu_variant variant;
  if (const auto status = resolve_cpu_variant(cpu, &variant)) return status;
  const RouterChoiceTask choose = DGEMMA_TABLE_OF(variant, router_choice_tasks)[op->dtype];
  for_runs_of_tokens(cpu, op->tokens, [&](int64_t first, int64_t end) { choose(*op, first, end); });
  return DGEMMA_OK;
}

size_t dgemma_cpu_route_workspace(const dgemma_route* op) {
  if (op == nullptr || !dgemma::sizes_fit(*op)) return 0;  // the call itself reports what is wrong
  dgemma::RouteBuffers buffers;
  return dgemma::carve(*op, nullptr, &buffers);
}

dgemma_status dgemma_cpu_route(const dgemma_route* op, dgemma_cpu* cpu) {
  using namespace dgemma;
  if (const auto status = check(op, cpu)) return status;
  dgemma_cpu_variant variant;
  if (const auto status = resolve_cpu_variant(cpu, &variant)) return status;
  if (op->tokens == 0) return DGEMMA_OK;

  RouteBuffers buffers;
  carve(*op, op->workspace, &buffers);
  dgemma_router_input input = {};
  input.tokens = op->tokens;
  input.hidden_size = op->hidden_size;
  input.epsilon = op->epsilon;
  input.dtype = op->dtype;
  input.input = op->input;
  input.scale = op->scale;
  input.output = buffers.scaled;
  scale_tokens(input, variant, cpu);
  dgemma_dense projection = {};
  projection.rows = op->tokens;
  projection.in_features = op->hidden_size;
  projection.out_features = op->experts;
  projection.dtype = op->dtype;
  projection.input = buffers.scaled;
  projection.weight = op->projection;
  projection.output = buffers.scores;
  if (const auto status = dgemma_cpu_dense(&projection, cpu)) return status;
  for_runs_of_tokens(cpu, op->tokens, [&](int64_t first, int64_t end) {
    for (int64_t token = first; token < end; ++token) choose(*op, buffers, token);
  });
  return DGEMMA_OK;
}
