// paged_attention on the CPU: checks, and the call as the kernels take it.
#include "block_attention/cpu/attention.h"
#include "block_attention/cpu/page_checks.h"
#include "block_attention/cpu/visible_keys.h"
#include "block_attention/cpu/work_tiles.h"
#include "cpu/entry.h"

namespace dgemma {
namespace {

AttentionCall::Request request_of(const dgemma_paged_attention& op, int64_t b) {
  AttentionCall::Request request = {};
  request.causal = op.causal[b] != 0;
  request.rows = op.query_start[b + 1] - op.query_start[b];
  request.first_row = op.query_start[b];
  request.prefix = op.sequence_length[b] - request.rows;
  request.page_table = op.page_table + b * op.pages_per_request;
  request.spans = op.spans + (op.spans != nullptr ? b * op.spans_per_request * 2 : 0);
  request.span_count = op.spans != nullptr ? op.spans_per_request : 0;
  return request;
}

AttentionCall call_of(const dgemma_paged_attention& op) {
  return {.requests = op.requests,
          .query_heads = op.query_heads,
          .key_heads = op.key_heads,
          .head_dim = op.head_dim,
          .page_size = op.page_size,
          .capacity = 0,
          .window = op.window,
          .scale = op.scale,
          .query = op.query,
          .output = op.output,
          .keys = {.stored = op.key_pages,
                   .block = nullptr,
                   .page_stride = op.key_page_stride,
                   .row_stride = op.key_row_stride,
                   .head_stride = op.key_head_stride},
          .values = {.stored = op.value_pages,
                     .block = nullptr,
                     .page_stride = op.value_page_stride,
                     .row_stride = op.value_row_stride,
                     .head_stride = op.value_head_stride}};
}

// The first position that any query of the request sees. Windows of later rows begin later, and a
// span that reaches back past the first row holds it.
int64_t first_visible(const dgemma_paged_attention& op, const AttentionCall::Request& request) {
  return visible_keys(op.window, request, 0).first;
}

dgemma_status check_pages(const dgemma_paged_attention& op, int64_t b,
                          const AttentionCall::Request& request, dgemma_cpu* cpu) {
  const int64_t length = op.sequence_length[b];
  for (int64_t page = first_visible(op, request) / op.page_size; page * op.page_size < length;
       ++page) {
    const int32_t found = request.page_table[page];
    if (found < 0 || found >= op.pages)
      return invalid(cpu, "page_table[%lld, %lld]: got %d, wants 0 .. %lld",
                     static_cast<long long>(b), static_cast<long long>(page), found,
                     static_cast<long long>(op.pages) - 1);
  }
  return DGEMMA_OK;
}

dgemma_status check_request(const dgemma_paged_attention& op, int64_t b, dgemma_cpu* cpu) {
  const auto index = static_cast<long long>(b);
  const int64_t first = op.query_start[b];
  const int64_t rows = op.query_start[b + 1] - first;
  const int64_t most =
      op.tokens - first < op.max_query_length ? op.tokens - first : op.max_query_length;
  if (first < 0 || first > op.tokens)
    return invalid(cpu, "query_start[%lld]: got %lld, wants 0 .. %lld", index,
                   static_cast<long long>(first), static_cast<long long>(op.tokens));
  if (rows < 0 || rows > most)
    return invalid(cpu, "query_start[%lld]: got %d, wants %lld .. %lld", index + 1,
                   op.query_start[b + 1], static_cast<long long>(first),
                   static_cast<long long>(first + most));
  if (rows == 0) return DGEMMA_OK;
  const int64_t stored = op.pages_per_request * op.page_size;
  const int64_t longest = stored < kMaxPosition ? stored : kMaxPosition;
  if (op.sequence_length[b] < rows || op.sequence_length[b] > longest)
    return invalid(cpu, "sequence_length[%lld]: got %d, wants %lld .. %lld", index,
                   op.sequence_length[b], static_cast<long long>(rows),
                   static_cast<long long>(longest));
  if (const auto status = check_spans(op, b, cpu)) return status;
  return check_pages(op, b, request_of(op, b), cpu);
}

dgemma_status check(const dgemma_paged_attention& op, dgemma_cpu* cpu) {
  const auto status = check_extents({{"requests", op.requests, 0},
                                     {"tokens", op.tokens, 0},
                                     {"max_query_length", op.max_query_length, 0},
                                     {"pages_per_request", op.pages_per_request, 0}},
                                    cpu);
  if (status != DGEMMA_OK) return status;
  if (const auto status = check_page_extents(op, cpu)) return status;
  if (const auto status = check_queries(op, cpu)) return status;
  const OperandList operands = operands_of(op);
  if (const auto status = check_operands(operands, cpu)) return status;
  // The call finds an aligned part by itself.
  if (const auto status = check_workspace(operands, op.workspace, op.workspace_bytes,
                                          dgemma_cpu_paged_attention_workspace(&op), 1,
                                          {cpu->message, sizeof cpu->message}))
    return status;
  for (int64_t b = 0; b < op.requests; ++b)
    if (const auto status = check_request(op, b, cpu)) return status;
  return DGEMMA_OK;
}

}  // namespace
}  // namespace dgemma

size_t dgemma_cpu_paged_attention_workspace(const dgemma_paged_attention* op) {
  return op != nullptr ? dgemma::workspace_of(dgemma::extents_of(*op)) : 0;
}

dgemma_status dgemma_cpu_paged_attention(const dgemma_paged_attention* op, dgemma_cpu* cpu) {
  if (const auto status = dgemma::check_call(op, cpu)) return status;
  if (const auto status = dgemma::check(*op, cpu)) return status;
  return dgemma::run_attention(
      *op, dgemma::call_of(*op), [&](int64_t b) { return dgemma::request_of(*op, b); }, cpu);
}
