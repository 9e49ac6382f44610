// The tasks of the experts and of a dense projection with weights of 4 and 8 bits: INT8 as
// integers, the others by blocks where they are taken, or by rows decoded before a tile. Compiled
// once per instruction set; see cpu/vector.h for what that forbids.
#pragma once

#include "grouped_gemm/cpu/dense_kernel.h"
#include "grouped_gemm/cpu/int8_kernel.h"
#include "grouped_gemm/cpu/moe_kernel.h"
#include "grouped_gemm/cpu/quantized_blocks.h"

namespace dgemma {
namespace {

template <typename T>
void quantized_gate_up_task(const MoePass& pass, int64_t group, int64_t first_row,
                            int64_t end_row) {
  const int64_t k = pass.hidden_size;
  const int64_t size = pass.expert_size;
  if (pass.quantized_gate_up->format == DGEMMA_WEIGHTS_INT8)
    return int8_gate_up_task<T>(pass, group, first_row, end_row);
#if defined(__AVX512BW__)
  if (takes_blocks<T>(size, k)) return quantized_gate_up_blocks(pass, group, first_row, end_row);
#endif
  const int64_t gate = pass.plan.expert[group] * 2 * size;
  void* const scratch[2] = {DGEMMA_DECODED_SCRATCH(T, k), DGEMMA_DECODED_SCRATCH(T, k)};
  with_format(pass.quantized_gate_up->format, [&](auto format) {
    typedef DecodedRows<T, decltype(format)::value> Rows;
    gate_up_rows<T>(pass, group, first_row, end_row,
                    Rows(*pass.quantized_gate_up, gate, k, scratch[0]),
                    Rows(*pass.quantized_gate_up, gate + size, k, scratch[1]));
  });
}

template <typename T>
void quantized_down_task(const MoePass& pass, int64_t group, int64_t first_row, int64_t end_row) {
  const int64_t k = pass.expert_size;
  if (pass.quantized_down->format == DGEMMA_WEIGHTS_INT8)
    return int8_down_task<T>(pass, group, first_row, end_row);
#if defined(__AVX512BW__)
  if (takes_blocks<T>(pass.hidden_size, k))
    return quantized_down_blocks(pass, group, first_row, end_row);
#endif
  const int64_t row = pass.plan.expert[group] * pass.hidden_size;
  void* const scratch[2] = {DGEMMA_DECODED_SCRATCH(T, k), DGEMMA_DECODED_SCRATCH(T, k)};
  with_format(pass.quantized_down->format, [&](auto format) {
    typedef DecodedRows<T, decltype(format)::value> Rows;
    down_rows<T>(pass, group, first_row, end_row, Rows(*pass.quantized_down, row, k, scratch[0]),
                 Rows(*pass.quantized_down, row, k, scratch[1]));
  });
}

template <typename T>
void quantized_dense_task(const DensePass& pass, int64_t first_row, int64_t end_row) {
  const dgemma_dense& op = pass.op;
  const dgemma_quantized* const weight = pass.weight;
  const int64_t k = op.in_features;
  if (weight->format == DGEMMA_WEIGHTS_INT8) return int8_dense_task<T>(pass, first_row, end_row);
#if defined(__AVX512BW__)
  if (takes_blocks<T>(op.out_features, k))
    return quantized_dense_blocks(op, *weight, first_row, end_row);
#endif
  void* const scratch[2] = {DGEMMA_DECODED_SCRATCH(T, k), DGEMMA_DECODED_SCRATCH(T, k)};
  with_format(weight->format, [&](auto format) {
    typedef DecodedRows<T, decltype(format)::value> Rows;
    dense_rows<T>(op, first_row, end_row, Rows(*weight, 0, k, scratch[0]),
                  Rows(*weight, 0, k, scratch[1]));
  });
}

}  // namespace
}  // namespace dgemma
