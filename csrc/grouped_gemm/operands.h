// The tensors of grouped_gemm.h's structs.
#pragma once

#include "common/ceil_divide.h"
#include "common/operands.h"
#include "dgemma/grouped_gemm.h"
#include "grouped_gemm/weight_format.h"

namespace dgemma {

// How messages name the parts of a quantized matrix.
struct MatrixNames {
  const char *values, *scales, *factors;
};
constexpr MatrixNames kWeightNames = {"weight.values", "weight.scales", "weight.factors"};
constexpr MatrixNames kGateUpNames = {"gate_up.values", "gate_up.scales", "gate_up.factors"};
constexpr MatrixNames kDownNames = {"down.values", "down.scales", "down.factors"};

// A matrix of so many matrices of rows, whose format, group and rows_per_factor were checked.
inline void add_matrix(OperandList* list, const MatrixNames& names, const dgemma_quantized& matrix,
                       int64_t matrices, int64_t rows, int64_t columns) {
  const WeightFormat format = describe(matrix.format);
  const int64_t groups = format.scale_bytes > 0 ? ceil_divide(columns, int64_t{matrix.group}) : 0;
  list->add_part(names.values, matrix.values, 1,
                 {matrices, rows, row_bytes(matrix.format, columns)}, 16);
  list->add_part(names.scales, matrix.scales, static_cast<size_t>(format.scale_bytes),
                 {matrices, rows, groups}, 4)
      .only_if(format.scale_bytes > 0);
  // NULL, or one for each rows_per_factor rows of all matrices.
  const int64_t factors = matrix.factors != nullptr ? matrices * rows / matrix.rows_per_factor : 0;
  list->add(names.factors, matrix.factors, {factors}).optional();
}

// `weight` is NULL where op has its weight itself.
inline OperandList operands_of(const dgemma_dense& op, const dgemma_quantized* weight = nullptr) {
  OperandList list(op.dtype);
  list.add("input", op.input, {op.rows, op.in_features});
  if (weight == nullptr) {
    list.add("weight", op.weight, {op.out_features, op.in_features});
  } else {
    list.add_absent("weight", op.weight);
    add_matrix(&list, kWeightNames, *weight, 1, op.out_features, op.in_features);
  }
  list.add("output", op.output, {op.rows, op.out_features});
  return list;
}

// `gate_up` and `down` are NULL where op has its weights itself.
inline OperandList operands_of(const dgemma_moe_ffn& op, const dgemma_quantized* gate_up = nullptr,
                               const dgemma_quantized* down = nullptr) {
  OperandList list(op.dtype);
  list.add("input", op.input, {op.tokens, op.hidden_size});
  list.add("expert_ids", op.expert_ids, {op.tokens, op.top_k});
  list.add("expert_weights", op.expert_weights, {op.tokens, op.top_k});
  if (gate_up == nullptr) {
    list.add("gate_up", op.gate_up, {op.experts, 2, op.expert_size, op.hidden_size});
    list.add("down", op.down, {op.experts, op.hidden_size, op.expert_size});
  } else {
    list.add_absent("gate_up", op.gate_up);
    list.add_absent("down", op.down);
    add_matrix(&list, kGateUpNames, *gate_up, op.experts, 2 * op.expert_size, op.hidden_size);
    add_matrix(&list, kDownNames, *down, op.experts, op.hidden_size, op.expert_size);
  }
  list.add("output", op.output, {op.tokens, op.hidden_size});
  return list;
}

inline OperandList operands_of(const dgemma_dense_quantized& op) {
  return operands_of(op.dense, &op.weight);
}

inline OperandList operands_of(const dgemma_moe_ffn_quantized& op) {
  return operands_of(op.ffn, &op.gate_up, &op.down);
}

inline OperandList operands_of(const dgemma_router_input& op) {
  OperandList list(op.dtype);
  list.add("input", op.input, {op.tokens, op.hidden_size});
  list.add("scale", op.scale, {op.hidden_size});
  list.add("output", op.output, {op.tokens, op.hidden_size});
  return list;
}

inline OperandList operands_of(const dgemma_router_choice& op) {
  OperandList list(op.dtype);
  list.add("probabilities", op.probabilities, {op.tokens, op.experts});
  list.add("per_expert_scale", op.per_expert_scale, {op.experts});
  list.add("expert_ids", op.expert_ids, {op.tokens, op.top_k});
  list.add("expert_weights", op.expert_weights, {op.tokens, op.top_k});
  return list;
}

inline OperandList operands_of(const dgemma_route& op) {
  OperandList list(op.dtype);
  list.add("input", op.input, {op.tokens, op.hidden_size});
  list.add("scale", op.scale, {op.hidden_size});
  list.add("projection", op.projection, {op.experts, op.hidden_size});
  // The kernel for a GPU reads these one by one.
  list.add("per_expert_scale", op.per_expert_scale, {op.experts}).aligned_on_gpu_to(2);
  list.add("expert_ids", op.expert_ids, {op.tokens, op.top_k});
  list.add("expert_weights", op.expert_weights, {op.tokens, op.top_k});
  return list;
}

}  // namespace dgemma
