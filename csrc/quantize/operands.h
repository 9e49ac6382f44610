// The tensors of quantize.h's struct.
#pragma once

#include "common/operands.h"
#include "dgemma/quantize.h"

namespace dgemma {

inline OperandList operands_of(const dgemma_quantize_weight& op) {
  OperandList list(op.dtype);
  list.add("weight", op.weight, {op.rows, op.columns});
  list.add("importance", op.importance, {op.columns}).optional();
  list.add("values", op.values, {op.rows, op.row_bytes});
  list.add("scales", op.scales, {op.rows, op.groups});
  list.add("errors", op.errors, {op.rows, 3});
  return list;
}

}  // namespace dgemma
