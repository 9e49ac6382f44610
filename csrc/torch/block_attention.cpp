// The operators of the family block_attention.
#include "dgemma/block_attention.h"

#include "torch/registration.h"

namespace dgemma {
namespace {

// The block's keys and values, and the cache; `Operation` is either struct of the family.
template <typename Operation>
struct Cached {
  using Struct = Operation;
  static constexpr std::initializer_list<Extent> kBlock = {
      AT(batch), AT(block_length), positive(AT(key_heads)), positive(AT(head_dim))};
  static constexpr std::initializer_list<Extent> kPrefix = {AT(slots), AT(capacity), AT(key_heads),
                                                            AT(head_dim)};
  static constexpr std::array kKeys = {tensor("key", AT(key), kBlock),
                                       tensor("value", AT(value), kBlock),
                                       tensor("prefix_key", AT(prefix_key), kPrefix),
                                       tensor("prefix_value", AT(prefix_value), kPrefix)};
  static constexpr std::array kRequests = {tensor("slot", AT(slot), {AT(batch)}),
                                           tensor("prefix_length", AT(prefix_length), {AT(batch)}),
                                           optional("length", AT(length), {AT(batch)})};
};

struct Attention : Cached<dgemma_block_attention> {
  using Struct = dgemma_block_attention;
  static constexpr std::initializer_list<Extent> kQueries = {
      AT(batch), AT(block_length), multiple(AT(query_heads), AT(key_heads)), AT(head_dim)};
  static constexpr std::array kQuery = {tensor("query", AT(query), kQueries)};
  static constexpr std::array kNumbers = {number("window", AT(window), {.least = 0}),
                                          number("scale", AT(scale), {.finite = true})};
  static constexpr std::array kOutputs = {tensor("out", AT(output), kQueries)};

  // Zero where no query is: in padding rows and in skipped requests.
  static constexpr Operator describe(const char* name, std::span<const Argument> arguments,
                                     Entry cpu, Entry cuda) {
    return {.name = name,
            .operation = operation<Struct>(AT(dtype), AT(workspace), AT(workspace_bytes)),
            .arguments = arguments,
            .outputs = kOutputs,
            .form = Form::kNewAndOut,
            .zeroed = true,
            .cpu = cpu,
            .cuda = cuda};
  }
};

struct CanvasAttention : Attention {
  static constexpr auto kArguments = join(kQuery, kKeys, kRequests, kNumbers);
  static constexpr Operator kOperator =
      describe("canvas_attention", kArguments,
               entry<&dgemma_cpu_canvas_attention, &dgemma_cpu_block_attention_workspace>(),
               ON_CUDA(&dgemma_cuda_canvas_attention, &dgemma_cuda_block_attention_workspace));
};

// On a CPU the same operator.
struct BatchedCanvasAttention : Attention {
  static constexpr auto kArguments = CanvasAttention::kArguments;
  static constexpr Operator kOperator = describe(
      "batched_canvas_attention", kArguments,
      entry<&dgemma_cpu_canvas_attention, &dgemma_cpu_block_attention_workspace>(),
      ON_CUDA(&dgemma_cuda_batched_canvas_attention, &dgemma_cuda_block_attention_workspace));
};

struct CausalAttention : Attention {
  static constexpr std::array kSpans = {
      optional("spans", AT(spans), {AT(batch), AT(spans_per_request), 2})};
  static constexpr auto kArguments = join(kQuery, kKeys, kRequests, kSpans, kNumbers);
  static constexpr Operator kOperator =
      describe("causal_attention", kArguments,
               entry<&dgemma_cpu_causal_attention, &dgemma_cpu_block_attention_workspace>(),
               ON_CUDA(&dgemma_cuda_causal_attention, &dgemma_cuda_block_attention_workspace));
};

// The cache is written: its pointers in this struct are not const.
struct AppendToCache : Cached<dgemma_append_to_cache> {
  using Struct = dgemma_append_to_cache;
  static constexpr auto kArguments = join(kKeys, kRequests);
  static constexpr Operator kOperator = {.name = "append_to_cache",
                                         .operation = operation<Struct>(AT(dtype)),
                                         .arguments = kArguments,
                                         .cpu = entry<&dgemma_cpu_append_to_cache>(),
                                         .cuda = ON_CUDA(&dgemma_cuda_append_to_cache)};
};

// The pages of a pool; `Operation` is either struct that has them.
template <typename Operation>
struct Paged {
  using Struct = Operation;
  static constexpr std::initializer_list<Extent> kPages = {
      AT(pages), positive(AT(page_size)), positive(AT(key_heads)), positive(AT(head_dim))};
  static constexpr std::array kPool = {
      strided("key_pages", AT(key_pages), kPages,
              {AT(key_page_stride), AT(key_row_stride), AT(key_head_stride)}),
      strided("value_pages", AT(value_pages), kPages,
              {AT(value_page_stride), AT(value_row_stride), AT(value_head_stride)})};
};

struct PagedAttention : Paged<dgemma_paged_attention> {
  using Struct = dgemma_paged_attention;
  static constexpr std::initializer_list<Extent> kQueries = {
      AT(tokens), multiple(AT(query_heads), AT(key_heads)), AT(head_dim)};
  static constexpr std::array kQuery = {tensor("query", AT(query), kQueries)};
  static constexpr std::array kRequests = {
      tensor("page_table", AT(page_table), {AT(requests), AT(pages_per_request)}),
      tensor("query_start", AT(query_start), {one_more(AT(requests))}),
      tensor("sequence_length", AT(sequence_length), {AT(requests)}),
      tensor("causal", AT(causal), {AT(requests)}),
      optional("spans", AT(spans), {AT(requests), AT(spans_per_request), 2})};
  static constexpr std::array kNumbers = {
      number("max_query_length", AT(max_query_length), {.least = 0}),
      number("window", AT(window), {.least = 0}), number("scale", AT(scale), {.finite = true})};
  static constexpr std::array kOutputs = {tensor("out", AT(output), kQueries)};
  static constexpr auto kArguments = join(kQuery, kPool, kRequests, kNumbers);
  static constexpr Operator kOperator = {
      .name = "paged_attention",
      .operation = operation<Struct>(AT(dtype), AT(workspace), AT(workspace_bytes)),
      .arguments = kArguments,
      .outputs = kOutputs,
      .form = Form::kNewAndOut,
      .zeroed = true,
      .cpu = entry<&dgemma_cpu_paged_attention, &dgemma_cpu_paged_attention_workspace>(),
      .cuda = ON_CUDA(&dgemma_cuda_paged_attention, &dgemma_cuda_paged_attention_workspace)};
};

struct AppendToPages : Paged<dgemma_append_to_pages> {
  using Struct = dgemma_append_to_pages;
  static constexpr std::initializer_list<Extent> kRows = {AT(tokens), positive(AT(key_heads)),
                                                          positive(AT(head_dim))};
  static constexpr std::array kBlock = {tensor("key", AT(key), kRows),
                                        tensor("value", AT(value), kRows)};
  static constexpr std::array kSlots = {tensor("slot", AT(slot), {AT(tokens)})};
  static constexpr auto kArguments = join(kBlock, kPool, kSlots);
  static constexpr Operator kOperator = {.name = "append_to_pages",
                                         .operation = operation<Struct>(AT(dtype)),
                                         .arguments = kArguments,
                                         .cpu = entry<&dgemma_cpu_append_to_pages>(),
                                         .cuda = ON_CUDA(&dgemma_cuda_append_to_pages)};
};

}  // namespace
}  // namespace dgemma

DGEMMA_OPERATORS(dgemma::CanvasAttention, dgemma::BatchedCanvasAttention, dgemma::CausalAttention,
                 dgemma::AppendToCache, dgemma::PagedAttention, dgemma::AppendToPages)
