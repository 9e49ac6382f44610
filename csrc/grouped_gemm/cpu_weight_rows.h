// Where the weight rows of a tile come from: memory as it is, or codes that are decoded for the
// tile. Compiled once per instruction set; see cpu/vector.h for what that forbids.
//
// A tile takes its rows once for all tokens of a block, so decoding costs a token a sixteenth or
// less of what its products cost, and the decoded rows stay in the first two levels of cache.
#pragma once

#include "grouped_gemm/cpu_decode.h"
#include "grouped_gemm/cpu_dot_tile.h"
#include "grouped_gemm/quantized.h"

namespace dgemma {
namespace {

// Half of a tile's rows: kHalfRows of them, `stride` values apart.
template <typename T>
struct HalfRows {
  const T* rows;
  int64_t stride;
};

template <typename T>
struct PlainRows {
  const T* matrix;
  int64_t columns;

  // Rows first, first + 1, ..., or `first` as each of them.
  HalfRows<T> take(int64_t first, bool repeat) {
    return {matrix + first * columns, repeat ? 0 : columns};
  }
  void multiply_factors(Floats* /*sums*/, int /*registers*/) const {}
  const char* stored(int64_t row) const {
    return reinterpret_cast<const char*>(matrix + row * columns);
  }
  int64_t row_bytes() const { return columns * static_cast<int64_t>(sizeof(T)); }
};

// Values in a decoded row of the scratch memory, so that each begins a cache line.
constexpr int64_t decoded_stride(int64_t columns) { return (columns + 31) / 32 * 32; }

template <typename T>
struct DecodedRows {
  const dgemma_quantized* matrix;
  int64_t first_row;  // of the matrix: what row 0 stands for
  int64_t columns;
  T* scratch;  // [kHalfRows, decoded_stride(columns)]
  Floats factors[registers_for(kTileTokens * kHalfRows)] = {};

  HalfRows<T> take(int64_t first, bool repeat) {
    const int64_t stride = decoded_stride(columns);
    float factor[kHalfRows];
    for (int r = 0; r < kHalfRows; ++r) {
      const int64_t row = first_row + first + (repeat ? 0 : r);
      factor[r] =
          matrix->factors == nullptr ? 1.0f : matrix->factors[row / matrix->rows_per_factor];
      if (r == 0 || !repeat) decode_row(*matrix, row, columns, scratch + r * stride);
    }
    for (int i = 0; i < kTileTokens * kHalfRows; ++i)
      factors[i / kLanes][folded_lane(i % kLanes)] = factor[i % kHalfRows];
    return {scratch, repeat ? 0 : stride};
  }
  void multiply_factors(Floats* sums, int registers) const {
    for (int i = 0; i < registers; ++i) sums[i] *= factors[i];
  }
  const char* stored(int64_t row) const {
    return static_cast<const char*>(matrix->values) + (first_row + row) * row_bytes();
  }
  int64_t row_bytes() const { return stored_row_bytes(*matrix, columns); }
};

// Asks for the first tile of a task, which no tile before it did.
template <typename Rows>
inline void prefetch_first_tile(const Rows& first, int64_t first_row, const Rows& second,
                                int64_t second_row) {
  Ahead ahead = {first.stored(first_row), second.stored(second_row),
                 (kHalfRows * first.row_bytes() + kLineBytes - 1) / kLineBytes};
  prefetch_step(ahead);
}

}  // namespace
}  // namespace dgemma

// Scratch memory of one DecodedRows, in the caller's frame: at most 16,384 columns of 4 bytes in
// three rows, 192 KB.
#define DGEMMA_DECODED_SCRATCH(T, columns)     \
  static_cast<T*>(__builtin_alloca_with_align( \
      static_cast<size_t>(kHalfRows * decoded_stride(columns)) * sizeof(T), 512 /* bits */))
