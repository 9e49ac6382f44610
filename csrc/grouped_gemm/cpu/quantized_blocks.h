// The tasks of quantized weights by blocks, which are decoded beside the products. AVX-512 and
// tokens in bfloat16 alone. Compiled once per instruction set; see cpu/vector.h for what that
// forbids.
#pragma once

#include "grouped_gemm/cpu/block_kernel.h"
#include "grouped_gemm/cpu/dense.h"
#include "grouped_gemm/cpu/weight_rows.h"

#if defined(__AVX512BW__)
namespace dgemma {
namespace {

// Memory for a task: packed tokens, and a tile's scales.
constexpr int64_t decoded_blocks_bytes(int64_t columns) {
  return packed_bytes(kMostTileTokens, columns) +
         packed_scales<DGEMMA_WEIGHTS_NVFP4>(columns / kNvfp4Group) *
             static_cast<int64_t>(sizeof(ScaleWords));
}
#define DGEMMA_DECODED_BLOCKS_SCRATCH(columns) \
  __builtin_alloca_with_align(static_cast<size_t>(decoded_blocks_bytes(columns)), 512 /* bits */)

// Sixteen rows at a time of a quantized matrix, times packed tokens.
template <dgemma_weight_format kFormat>
class DecodedBlockRows {
 public:
  static constexpr int64_t kPackedTokens = kMostTileTokens;

  // Row 0 stands for `first_row` of the matrix; `scratch` has decoded_blocks_bytes.
  DecodedBlockRows(const dgemma_quantized& matrix, int64_t first_row, int64_t columns,
                   void* scratch)
      : matrix_(matrix),
        first_row_(first_row),
        columns_(columns),
        scale_bytes_(count_scales<kFormat>(columns, matrix.group) * kScaleBytes<kFormat>),
        tokens_(static_cast<TokenValue*>(scratch)),
        scales_(reinterpret_cast<ScaleWords*>(tokens_ + kPackedTokens * columns)) {}

  // Packs up to kPackedTokens tokens, a tile of them, for the products that follow.
  template <typename Token>
  void pack(int64_t tokens, Token token) const {
    pack_tokens<BlockDecoder<kFormat>>(tokens, columns_, tokens_, token);
  }

  // Prefetches a task's first tile, which no tile before it did.
  void ask(int64_t row) const {
    for (int64_t i = 0; i < kTileRows * row_bytes(); i += kLineBytes)
      __builtin_prefetch(codes(row) + i, 0, 2);
    for (int64_t i = 0; i < kTileRows * scale_bytes_; i += kLineBytes)
      __builtin_prefetch(scales(row) + i, 0, 2);
  }

  // sums[t]: rows row to row + 15 times token t of those that are packed, with their row scales.
  void multiply(int64_t row, int64_t tokens, Floats* sums) const {
    if constexpr (kScaleBytes<kFormat> > 0) {
      pack_scales<kFormat>(scales(row), scale_bytes_, matrix_.scale_dtype, scales_);
      for (int64_t i = 0; i < kTileRows * scale_bytes_; i += kLineBytes)
        __builtin_prefetch(scales(row + kTileRows) + i, 0, 2);
    }
    const BlockDecoder<kFormat> decoder(matrix_, first_row_ + row, columns_, scales_);
    multiply_tile(decoder, tokens_, tokens, columns_ / kBlockColumns,
                  reinterpret_cast<const char*>(codes(row + kTileRows)), sums);
    if (matrix_.factors == nullptr) return;
    float factors[kTileRows];
    load_row_scales(matrix_, first_row_ + row, kTileRows, factors);
    for (int64_t t = 0; t < tokens; ++t) sums[t] *= load(factors);
  }

 private:
  int64_t row_bytes() const { return dgemma::row_bytes(kFormat, columns_); }
  const uint8_t* codes(int64_t row) const {
    return static_cast<const uint8_t*>(matrix_.values) + (first_row_ + row) * row_bytes();
  }
  const uint8_t* scales(int64_t row) const {
    return static_cast<const uint8_t*>(matrix_.scales) + (first_row_ + row) * scale_bytes_;
  }

  const dgemma_quantized matrix_;
  const int64_t first_row_;
  const int64_t columns_;
  const int64_t scale_bytes_;  // of a row
  TokenValue* const tokens_;
  ScaleWords* const scales_;
};

inline void quantized_gate_up_blocks(const MoePass& pass, int64_t group, int64_t first_row,
                                     int64_t end_row) {
  const int64_t k = pass.hidden_size, size = pass.expert_size;
  void* const scratch = DGEMMA_DECODED_BLOCKS_SCRATCH(k);
  with_format(pass.quantized_gate_up->format, [&](auto format) {
    typedef DecodedBlockRows<decltype(format)::value> Rows;
    const int64_t row_of_gate = pass.plan.expert[group] * 2 * size;
    gate_up_blocks<bfloat16>(
        pass, group, first_row, end_row, Rows(*pass.quantized_gate_up, row_of_gate, k, scratch),
        Rows(*pass.quantized_gate_up, row_of_gate + size, k, scratch), rows_of(pass.input, k));
  });
}

inline void quantized_down_blocks(const MoePass& pass, int64_t group, int64_t first_row,
                                  int64_t end_row) {
  const int64_t k = pass.expert_size;
  void* const scratch = DGEMMA_DECODED_BLOCKS_SCRATCH(k);
  with_format(pass.quantized_down->format, [&](auto format) {
    typedef DecodedBlockRows<decltype(format)::value> Rows;
    const int64_t row_of_down = pass.plan.expert[group] * pass.hidden_size;
    down_blocks(pass, group, first_row, end_row,
                Rows(*pass.quantized_down, row_of_down, k, scratch), rows_of(pass.activations, k));
  });
}

// output[:, first_row : end_row] of a dense projection.
inline void quantized_dense_blocks(const dgemma_dense& op, const dgemma_quantized& weight,
                                   int64_t first_row, int64_t end_row) {
  bfloat16* output = static_cast<bfloat16*>(op.output);
  void* const scratch = DGEMMA_DECODED_BLOCKS_SCRATCH(op.in_features);
  with_format(weight.format, [&](auto format) {
    typedef DecodedBlockRows<decltype(format)::value> Rows;
    multiply_blocks(Rows(weight, 0, op.in_features, scratch), first_row, end_row, op.rows,
                    rows_of(op.input, op.in_features),
                    [&](int64_t t) { return output + t * op.out_features; });
  });
}

}  // namespace
}  // namespace dgemma
#endif
