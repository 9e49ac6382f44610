// Tokens rounded to int8 for products with INT8 weights: where their codes lie in a workspace, and
// the tasks that write them. Each token is rounded once, for all tasks that multiply it.
#pragma once

#include <cstdint>

#include "cpu/entry.h"
#include "cpu/variants.h"
#include "dgemma/grouped_gemm.h"

namespace dgemma {

// What a token's products are multiplied by, and what is taken back of them where weights are made
// unsigned: 128 times the sum of the codes.
struct Int8Token {
  float scale;
  int32_t offset;
};

// Token t's codes are int8_stride(columns) values after those of the one before. A code takes one
// byte, or two where an instruction set multiplies 16 bits (cpu/int8_round.h).
struct Int8Tokens {
  void* codes;
  Int8Token* tokens;
};
constexpr int64_t kMostInt8CodeBytes = 2;

// Codes of a token, zeros after its columns among them: whole steps of every instruction set.
constexpr int64_t int8_stride(int64_t columns) { return (columns + 63) / 64 * 64; }

// Adds memory for so many tokens of so many columns; at most kMostQuantizedColumns of these and
// 2^31 tokens, so that nothing overflows.
Int8Tokens take_int8_tokens(Carver* carver, int64_t tokens, int64_t columns);

// False for NULL.
bool is_int8(const dgemma_quantized* matrix);

// Rounds the rows first to end - 1 of a tensor [.., columns].
typedef void (*Int8RoundTask)(const void* rows, int64_t first, int64_t end, int64_t columns,
                              const Int8Tokens& to);

// Indexed by dgemma_dtype.
DGEMMA_DECLARE_PER_VARIANT(Int8RoundTask int8_round_tasks[2])

// Rounds a tensor [count, columns] on the host's threads.
void round_rows(dgemma_cpu* cpu, Int8RoundTask task, const void* rows, int64_t count,
                int64_t columns, const Int8Tokens& to);

}  // namespace dgemma
