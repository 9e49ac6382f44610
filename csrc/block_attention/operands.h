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
