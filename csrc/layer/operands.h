// The tensors of layer.h's structs.
#pragma once

#include "common/operands.h"
#include "dgemma/layer.h"

namespace dgemma {

inline OperandList operands_of(const dgemma_token_embedding& op) {
  OperandList list(op.dtype);
  list.add("ids", op.ids, {op.tokens});
  list.add("embedding", op.embedding, {op.vocabulary, op.hidden_size});
  list.add("conditioning", op.conditioning, {op.tokens, op.hidden_size}).optional();
  list.add("output", op.output, {op.tokens, op.hidden_size});
  return list;
}

inline OperandList operands_of(const dgemma_rms_norm& op) {
  OperandList list(op.dtype);
  list.add("input", op.input, {op.tokens, op.hidden_size});
  list.add("weight", op.weight, {op.hidden_size}).optional();
  list.add("output", op.output, {op.tokens, op.hidden_size});
  return list;
}

// The kernel for a GPU reads these one value at a time.
inline OperandList operands_of(const dgemma_normalise_heads& op) {
  const size_t element = op.dtype == DGEMMA_BFLOAT16 ? 2 : 4;
  OperandList list(op.dtype);
  const auto add = [&](const char* name, auto* pointer, int64_t heads) -> Operand& {
    return list.add(name, pointer, {op.tokens, heads, op.head_dim}).aligned_on_gpu_to(element);
  };
  add("raw_query", op.raw_query, op.query_heads);
  add("raw_key", op.raw_key, op.key_heads);
  add("raw_value", op.raw_value, op.key_heads).optional();
  list.add("query_norm", op.query_norm, {op.head_dim}).aligned_on_gpu_to(element);
  list.add("key_norm", op.key_norm, {op.head_dim}).aligned_on_gpu_to(element);
  add("cosine", op.cosine, 1);
  add("sine", op.sine, 1);
  add("query", op.query, op.query_heads);
  add("key", op.key, op.key_heads);
  add("value", op.value, op.key_heads);
  return list;
}

inline OperandList operands_of(const dgemma_attention_residual& op) {
  OperandList list(op.dtype);
  list.add("hidden", op.hidden, {op.tokens, op.hidden_size});
  list.add("attended", op.attended, {op.tokens, op.hidden_size});
  list.add("attended_norm", op.attended_norm, {op.hidden_size});
  list.add("dense_norm", op.dense_norm, {op.hidden_size});
  list.add("sparse_norm", op.sparse_norm, {op.hidden_size});
  list.add("residual", op.residual, {op.tokens, op.hidden_size});
  list.add("dense_input", op.dense_input, {op.tokens, op.hidden_size});
  list.add("sparse_input", op.sparse_input, {op.tokens, op.hidden_size});
  return list;
}

inline OperandList operands_of(const dgemma_gelu_product& op) {
  OperandList list(op.dtype);
  list.add("gate", op.gate, {op.values});
  list.add("up", op.up, {op.values});
  list.add("output", op.output, {op.values});
  return list;
}

inline OperandList operands_of(const dgemma_layer_output& op) {
  OperandList list(op.dtype);
  list.add("residual", op.residual, {op.tokens, op.hidden_size});
  list.add("dense", op.dense, {op.tokens, op.hidden_size});
  list.add("sparse", op.sparse, {op.tokens, op.hidden_size});
  list.add("dense_norm", op.dense_norm, {op.hidden_size});
  list.add("sparse_norm", op.sparse_norm, {op.hidden_size});
  list.add("norm", op.norm, {op.hidden_size});
  list.add("next_norm", op.next_norm, {op.hidden_size}).optional();
  list.add("output", op.output, {op.tokens, op.hidden_size});
  list.add("next_input", op.next_input, {op.tokens, op.hidden_size})
      .only_if(op.next_norm != nullptr);
  return list;
}

}  // namespace dgemma
