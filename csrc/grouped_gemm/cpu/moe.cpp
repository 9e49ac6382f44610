// The C entry points: argument checks, the passes over tokens, and what each task is.
#include "grouped_gemm/cpu/moe.h"

#include <cinttypes>

#include "common/ceil_divide.h"
#include "cpu/dispatch.h"
#include "cpu/entry.h"
#include "dgemma/grouped_gemm.h"
#include "grouped_gemm/cpu/plan.h"
#include "grouped_gemm/cpu/quantized.h"
#include "grouped_gemm/operands.h"

namespace dgemma {
namespace {

// Pairs in one pass. Weights are read once per pass; at the model's width a pass of 16,384 pairs
// takes 208 MB of workspace and computes 20 times longer than it reads. See NOTES.md.
constexpr int64_t kPairsPerPass = 16384;
// No single extent may be larger, so that products of two are exact; products of three are checked.
constexpr int64_t kLargestExtent = INT32_MAX;

int64_t tokens_per_pass(const dgemma_moe_ffn& op) {
  const int64_t tokens = op.top_k < kPairsPerPass ? kPairsPerPass / op.top_k : 1;
  return tokens < op.tokens ? tokens : op.tokens;
}

// The weights of a call: pointers in its dgemma_moe_ffn, or these.
struct QuantizedPair {
  const dgemma_quantized* gate_up = nullptr;
  const dgemma_quantized* down = nullptr;
};

// The parts of the workspace.
struct MoeBuffers {
  int32_t* plan;
  char* activations;
  float* products;
  Int8Tokens rounded_input;  // with INT8 weights
  Int8Tokens rounded_activations;
};

// Cuts them out of `base`, or without one only counts the bytes.
size_t carve(const dgemma_moe_ffn& op, const QuantizedPair& quantized, void* base,
             MoeBuffers* buffers) {
  const int64_t pairs = tokens_per_pass(op) * op.top_k;
  Carver carver = {static_cast<char*>(base)};
  buffers->plan = carver.take<int32_t>(moe_plan_size(pairs, op.experts));
  buffers->activations =
      carver.take<char>(pairs * op.expert_size * static_cast<int64_t>(bytes_of(op.dtype)));
  buffers->products = carver.take<float>(pairs * op.hidden_size);
  // One memory for both: the input's codes are done with before those of the activations are
  // written.
  Carver of_input = carver, of_activations = carver;
  if (is_int8(quantized.gate_up))
    buffers->rounded_input = take_int8_tokens(&of_input, tokens_per_pass(op), op.hidden_size);
  if (is_int8(quantized.down))
    buffers->rounded_activations = take_int8_tokens(&of_activations, pairs, op.expert_size);
  return of_input.used > of_activations.used ? of_input.used : of_activations.used;
}

size_t count_workspace_bytes(const dgemma_moe_ffn& op, const QuantizedPair& quantized) {
  MoeBuffers none = {};
  return carve(op, quantized, nullptr, &none);
}

// False for a matrix in INT8 of more columns than a call takes.
bool columns_fit(const dgemma_quantized& matrix, int64_t columns) {
  return !is_int8(&matrix) || columns <= kMostQuantizedColumns;
}

struct NamedExtent {
  const char* name;
  int64_t value;
  int64_t least;
};

// The first extent that is out of its range, or one with a null name.
NamedExtent bad_extent(const dgemma_moe_ffn& op) {
  const NamedExtent extents[] = {{"tokens", op.tokens, 0},
                                 {"hidden_size", op.hidden_size, 1},
                                 {"expert_size", op.expert_size, 1},
                                 {"experts", op.experts, 1},
                                 {"top_k", op.top_k, 1}};
  for (const NamedExtent& extent : extents)
    if (extent.value < extent.least || extent.value > kLargestExtent) return extent;
  return {nullptr, 0, 0};
}

// True when every tensor and the workspace have fewer than 2^63 bytes and a pass's pairs fit int32.
bool sizes_fit(const dgemma_moe_ffn& op) {
  const int64_t value = static_cast<int64_t>(bytes_of(op.dtype));
  const int64_t pairs = tokens_per_pass(op) * op.top_k;
  int64_t bytes;
  return !__builtin_mul_overflow(op.hidden_size * op.expert_size, 2 * op.experts, &bytes) &&
         !__builtin_mul_overflow(bytes, value, &bytes) &&
         !__builtin_mul_overflow(op.tokens * op.hidden_size, value, &bytes) &&
         pairs <= kLargestExtent &&
         !__builtin_mul_overflow(pairs * op.expert_size, value, &bytes) &&
         !__builtin_mul_overflow(pairs * op.hidden_size, 4, &bytes);
}

dgemma_status check(const dgemma_moe_ffn& op, const QuantizedPair& quantized, dgemma_cpu* cpu) {
  const NamedExtent extent = bad_extent(op);
  if (extent.name != nullptr)
    return fail(cpu, DGEMMA_INVALID_ARGUMENT, "%s: got %" PRId64 ", wants %" PRId64 " to %" PRId64,
                extent.name, extent.value, extent.least, kLargestExtent);
  if (op.dtype != DGEMMA_FLOAT32 && op.dtype != DGEMMA_BFLOAT16)
    return fail(cpu, DGEMMA_UNSUPPORTED, "dtype: got %d, wants %d (float32) or %d (bfloat16)",
                static_cast<int>(op.dtype), DGEMMA_FLOAT32, DGEMMA_BFLOAT16);
  if (!sizes_fit(op))
    return fail(cpu, DGEMMA_INVALID_ARGUMENT,
                "tokens, hidden_size, expert_size, experts, top_k: got more bytes than 63 bits "
                "count, wants less");
  if (op.tokens == 0) return DGEMMA_OK;

  if (quantized.gate_up != nullptr) {
    if (const auto status =
            check_quantized("gate_up", *quantized.gate_up, op.expert_size, op.hidden_size, cpu))
      return status;
    if (const auto status = check_quantized("down", *quantized.down, op.experts * op.hidden_size,
                                            op.expert_size, cpu))
      return status;
  }
  const OperandList operands = operands_of(op, quantized.gate_up, quantized.down);
  if (const auto status = check_operands(operands, cpu)) return status;
  if (const auto status = check_workspace(operands, op.workspace, op.workspace_bytes,
                                          count_workspace_bytes(op, quantized), cpu))
    return status;
  const int64_t bad = find_bad_expert_id(op.expert_ids, op.tokens * op.top_k, op.experts);
  if (bad >= 0)
    return fail(cpu, DGEMMA_INVALID_ARGUMENT,
                "expert_ids: got %d at token %" PRId64 ", slot %" PRId64
                ", wants -1 or 0 to %" PRId64,
                op.expert_ids[bad], bad / op.top_k, bad % op.top_k, op.experts - 1);
  return DGEMMA_OK;
}

// Rows of a task: a multiple of `least`, of `rows` in each group.
int64_t count_rows_per_task(const MoePlan& plan, int64_t rows, int64_t least) {
  const int64_t pairs = plan.first[plan.groups];
  if (plan.groups == 0 || pairs > kTokensOfLongTasks * plan.groups) return least;
  const int64_t tasks_per_group = ceil_divide(kTasks, plan.groups);
  const int64_t even = ceil_divide(rows, tasks_per_group);
  return ceil_divide(even, least) * least;
}

// One task for each group and each run of rows_per_task of its `rows` rows, group after group.
template <typename Task>
void run_row_tasks(dgemma_cpu* cpu, const MoePlan& plan, int64_t rows, int64_t least_rows,
                   const Task& task) {
  const int64_t groups = plan.groups;
  const int64_t rows_per_task = count_rows_per_task(plan, rows, least_rows);
  const int64_t runs = ceil_divide(rows, rows_per_task);
  run_tasks(cpu, groups * runs, [&](int64_t index) {
    const int64_t first = index % runs * rows_per_task;
    const int64_t end = first + rows_per_task;
    task(index / runs, first, end < rows ? end : rows);
  });
}

void run_pass(const MoePass& pass, int64_t tokens, const MoeKernels& kernels,
              Int8RoundTask round_task, dgemma_cpu* cpu) {
  if (is_int8(pass.quantized_gate_up))
    round_rows(cpu, round_task, pass.input, tokens, pass.hidden_size, pass.rounded_input);
  run_row_tasks(
      cpu, pass.plan, pass.expert_size, kGateUpRowsPerTask,
      [&](int64_t group, int64_t first, int64_t end) { kernels.gate_up(pass, group, first, end); });
  if (is_int8(pass.quantized_down))
    round_rows(cpu, round_task, pass.activations, pass.plan.first[pass.plan.groups],
               pass.expert_size, pass.rounded_activations);
  run_row_tasks(
      cpu, pass.plan, pass.hidden_size, kDownRowsPerTask,
      [&](int64_t group, int64_t first, int64_t end) { kernels.down(pass, group, first, end); });
  run_tasks(cpu, tokens, [&](int64_t token) { kernels.combine(pass, token); });
}

dgemma_status run(const dgemma_moe_ffn& op, const QuantizedPair& quantized, dgemma_cpu* cpu) {
  dgemma_status status = check(op, quantized, cpu);
  if (status != DGEMMA_OK) return status;
  dgemma_cpu_variant variant;
  status = resolve_cpu_variant(cpu, &variant);
  if (status != DGEMMA_OK) return status;

  const MoeKernels* const tables = quantized.gate_up != nullptr
                                       ? DGEMMA_TABLE_OF(variant, quantized_moe_kernels)
                                       : DGEMMA_TABLE_OF(variant, moe_kernels);
  const MoeKernels& kernels = tables[op.dtype];
  const Int8RoundTask round_task = DGEMMA_TABLE_OF(variant, int8_round_tasks)[op.dtype];
  MoeBuffers buffers = {};
  carve(op, quantized, op.workspace, &buffers);
  const int64_t step = tokens_per_pass(op);
  const int64_t token_bytes = op.hidden_size * static_cast<int64_t>(bytes_of(op.dtype));
  for (int64_t first = 0; first < op.tokens; first += step) {
    const int64_t tokens = op.tokens - first < step ? op.tokens - first : step;
    const int32_t* ids = op.expert_ids + first * op.top_k;
    const MoePass pass = {.hidden_size = op.hidden_size,
                          .expert_size = op.expert_size,
                          .top_k = op.top_k,
                          .input = static_cast<const char*>(op.input) + first * token_bytes,
                          .expert_ids = ids,
                          .expert_weights = op.expert_weights + first * op.top_k,
                          .gate_up = op.gate_up,
                          .down = op.down,
                          .quantized_gate_up = quantized.gate_up,
                          .quantized_down = quantized.down,
                          .output = static_cast<char*>(op.output) + first * token_bytes,
                          .plan = make_moe_plan(ids, tokens * op.top_k, op.experts, buffers.plan),
                          .activations = buffers.activations,
                          .products = buffers.products,
                          .rounded_input = buffers.rounded_input,
                          .rounded_activations = buffers.rounded_activations};
    run_pass(pass, tokens, kernels, round_task, cpu);
  }
  return DGEMMA_OK;
}

}  // namespace
}  // namespace dgemma

size_t dgemma_cpu_moe_ffn_workspace(const dgemma_moe_ffn* op) {
  if (op == nullptr || dgemma::bad_extent(*op).name != nullptr || !dgemma::sizes_fit(*op)) return 0;
  return dgemma::count_workspace_bytes(*op, {});
}

dgemma_status dgemma_cpu_moe_ffn(const dgemma_moe_ffn* op, dgemma_cpu* cpu) {
  if (const auto status = dgemma::check_call(op, cpu)) return status;
  return dgemma::run(*op, {}, cpu);
}

size_t dgemma_cpu_moe_ffn_quantized_workspace(const dgemma_moe_ffn_quantized* op) {
  using namespace dgemma;
  if (op == nullptr || bad_extent(op->ffn).name != nullptr || !sizes_fit(op->ffn) ||
      !columns_fit(op->gate_up, op->ffn.hidden_size) || !columns_fit(op->down, op->ffn.expert_size))
    return 0;
  return count_workspace_bytes(op->ffn, {&op->gate_up, &op->down});
}

dgemma_status dgemma_cpu_moe_ffn_quantized(const dgemma_moe_ffn_quantized* op, dgemma_cpu* cpu) {
  if (const auto status = dgemma::check_call(op, cpu)) return status;
  return dgemma::run(op->ffn, {&op->gate_up, &op->down}, cpu);
}
