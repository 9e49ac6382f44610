// The tensors of block_attention.h's structs.
#pragma once

#include "common/operands.h"
#include "dgemma/block_attention.h"

namespace dgemma {

inline OperandList operands_of(const dgemma_block_attention& op) {
  OperandList list(op.dtype);
  list.add("query", op.query, {op.batch, op.block_length, op.query_heads, op.head_dim});
  list.add("key", op.key, {op.batch, op.block_length, op.key_heads, op.head_dim});
  list.add("value", op.value, {op.batch, op.block_length, op.key_heads, op.head_dim});
  list.add("prefix_key", op.prefix_key, {op.slots, op.capacity, op.key_heads, op.head_dim});
  list.add("prefix_value", op.prefix_value, {op.slots, op.capacity, op.key_heads, op.head_dim});
  list.add("slot", op.slot, {op.batch});
  list.add("prefix_length", op.prefix_length, {op.batch});
  list.add("length", op.length, {op.batch}).optional();
  list.add("spans", op.spans, {op.batch, op.spans_per_request, 2}).optional();
  list.add("output", op.output, {op.batch, op.block_length, op.query_heads, op.head_dim});
  return list;
}

// Rows of pages: of keys, or of values.
template <typename Operation, typename T>
Operand& add_pages(OperandList& list, const Operation& op, const char* name, T* pages,
                   int64_t page_stride, int64_t row_stride, int64_t head_stride) {
  return list.add_strided(name, pages, {op.pages, op.page_size, op.key_heads},
                          {page_stride, row_stride, head_stride}, op.head_dim);
}

inline OperandList operands_of(const dgemma_paged_attention& op) {
  OperandList list(op.dtype);
  const std::initializer_list<int64_t> rows = {op.tokens, op.query_heads, op.head_dim};
  list.add("query", op.query, rows);
  add_pages(list, op, "key_pages", op.key_pages, op.key_page_stride, op.key_row_stride,
            op.key_head_stride);
  add_pages(list, op, "value_pages", op.value_pages, op.value_page_stride, op.value_row_stride,
            op.value_head_stride);
  list.add("page_table", op.page_table, {op.requests, op.pages_per_request});
  list.add("query_start", op.query_start, {op.requests + 1}).only_if(op.requests > 0);
  list.add("sequence_length", op.sequence_length, {op.requests});
  list.add("causal", op.causal, {op.requests});
  list.add("spans", op.spans, {op.requests, op.spans_per_request, 2}).optional();
  list.add("output", op.output, rows);
  return list;
}

inline OperandList operands_of(const dgemma_append_to_pages& op) {
  OperandList list(op.dtype);
  list.add("key", op.key, {op.tokens, op.key_heads, op.head_dim});
  list.add("value", op.value, {op.tokens, op.key_heads, op.head_dim});
  const bool stored = op.tokens > 0;
  add_pages(list, op, "key_pages", op.key_pages, op.key_page_stride, op.key_row_stride,
            op.key_head_stride)
      .only_if(stored)
      .may_interleave();
  add_pages(list, op, "value_pages", op.value_pages, op.value_page_stride, op.value_row_stride,
            op.value_head_stride)
      .only_if(stored)
      .may_interleave();
  list.add("slot", op.slot, {op.tokens});
  return list;
}

// A block is not read where there is no row to store it in.
inline OperandList operands_of(const dgemma_append_to_cache& op) {
  const bool stored = op.slots > 0 && op.capacity > 0;
  OperandList list(op.dtype);
  list.add("key", op.key, {op.batch, op.block_length, op.key_heads, op.head_dim}).only_if(stored);
  list.add("value", op.value, {op.batch, op.block_length, op.key_heads, op.head_dim})
      .only_if(stored);
  list.add("prefix_key", op.prefix_key, {op.slots, op.capacity, op.key_heads, op.head_dim})
      .only_if(op.block_length > 0);
  list.add("prefix_value", op.prefix_value, {op.slots, op.capacity, op.key_heads, op.head_dim})
      .only_if(op.block_length > 0);
  list.add("slot", op.slot, {op.batch});
  list.add("prefix_length", op.prefix_length, {op.batch});
  list.add("length", op.length, {op.batch}).optional();
  return list;
}

}  // namespace dgemma
