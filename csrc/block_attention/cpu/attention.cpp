// canvas_attention and causal_attention on the CPU: checks, and the call as the kernels take it.
#include "block_attention/cpu/attention.h"

#include "block_attention/cpu/checks.h"
#include "block_attention/cpu/visible_keys.h"
#include "block_attention/cpu/work_tiles.h"
#include "cpu/entry.h"

namespace dgemma {
namespace {

AttentionCall::Request request_of(const dgemma_block_attention& op, bool causal, int64_t b) {
  AttentionCall::Request request = {};
  if (op.slot[b] < 0) return request;
  request.causal = causal;
  request.rows = op.length != nullptr ? op.length[b] : op.block_length;
  request.first_row = b * op.block_length;
  request.prefix = op.prefix_length[b];
  request.first_stored = request.prefix > op.capacity ? request.prefix - op.capacity : 0;
  request.slot = op.slot[b];
  request.spans = op.spans + (op.spans != nullptr ? b * op.spans_per_request * 2 : 0);
  request.span_count = op.spans != nullptr ? op.spans_per_request : 0;
  return request;
}

AttentionCall call_of(const dgemma_block_attention& op) {
  const int64_t row = op.key_heads * op.head_dim;
  const auto storage = [&](const void* stored, const void* block) {
    return KeyStorage{.stored = stored,
                      .block = block,
                      .page_stride = 0,
                      .row_stride = row,
                      .head_stride = op.head_dim};
  };
  return {.requests = op.batch,
          .query_heads = op.query_heads,
          .key_heads = op.key_heads,
          .head_dim = op.head_dim,
          .page_size = 0,
          .capacity = op.capacity,
          .window = op.window,
          .scale = op.scale,
          .query = op.query,
          .output = op.output,
          .keys = storage(op.prefix_key, op.key),
          .values = storage(op.prefix_value, op.value)};
}

dgemma_status check(const dgemma_block_attention& op, bool causal, dgemma_cpu* cpu) {
  if (const auto status = check_extents(op, cpu)) return status;
  if (const auto status = check_queries(op, cpu)) return status;
  if (op.spans != nullptr && !causal)
    return invalid(cpu, "spans: got a pointer, wants NULL for canvas attention");
  const OperandList operands = operands_of(op);
  if (const auto status = check_operands(operands, cpu)) return status;
  // The call finds an aligned part by itself.
  if (const auto status = check_workspace(operands, op.workspace, op.workspace_bytes,
                                          dgemma_cpu_block_attention_workspace(&op), 1,
                                          {cpu->message, sizeof cpu->message}))
    return status;
  if (const auto status = check_requests(op, cpu)) return status;
  for (int64_t b = 0; b < op.batch; ++b) {
    if (op.slot[b] < 0) continue;
    const int64_t prefix = op.prefix_length[b];
    const int64_t wanted = prefix - first_in_window(op.window, prefix);
    if (wanted > op.capacity)
      return invalid(cpu,
                     "prefix_length[%lld]: got %lld, of which a query may see %lld, wants at most "
                     "capacity %lld of them",
                     static_cast<long long>(b), static_cast<long long>(prefix),
                     static_cast<long long>(wanted), static_cast<long long>(op.capacity));
    if (const auto status = check_spans(op, b, cpu)) return status;
  }
  return DGEMMA_OK;
}

dgemma_status attention(const dgemma_block_attention& op, bool causal, dgemma_cpu* cpu) {
  if (const auto status = check(op, causal, cpu)) return status;
  return run_attention(op, call_of(op), [&](int64_t b) { return request_of(op, causal, b); }, cpu);
}

}  // namespace
}  // namespace dgemma

size_t dgemma_cpu_block_attention_workspace(const dgemma_block_attention* op) {
  if (op == nullptr) return 0;
  return dgemma::workspace_of(dgemma::extents_of(*op));
}

dgemma_status dgemma_cpu_canvas_attention(const dgemma_block_attention* op, dgemma_cpu* cpu) {
  if (const auto status = dgemma::check_call(op, cpu)) return status;
  return dgemma::attention(*op, false, cpu);
}

dgemma_status dgemma_cpu_causal_attention(const dgemma_block_attention* op, dgemma_cpu* cpu) {
  if (const auto status = dgemma::check_call(op, cpu)) return status;
  return dgemma::attention(*op, true, cpu);
}
