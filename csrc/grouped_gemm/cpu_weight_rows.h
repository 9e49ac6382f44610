// Where the weight rows of a tile come from: memory as it is, or codes that are decoded. Compiled
// once per instruction set; see cpu/vector.h for what that forbids.
//
// While a tile is multiplied, the rows of the next one are made ready: asked for, and decoded into
// a second buffer, some columns at every step of the products. Decoding all of a tile's rows before
// its products cost a quarter of their time; beside them it runs in units that they leave idle.
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

  // Rows that step() makes ready: nothing is to be done for these.
  struct Making {
    void step() {}
  };
  Making make(int64_t /*first*/, int64_t /*steps*/) { return {}; }
  // Rows first, first + 1, ..., or `first` as each of them.
  HalfRows<T> take(int64_t first, bool repeat, Making& /*made*/) {
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

template <typename T, dgemma_weight_format kFormat>
class DecodedRows {
 public:
  // Row 0 stands for `first_row` of the matrix; scratch is [2, kHalfRows, decoded_stride(columns)].
  DecodedRows(const dgemma_quantized& matrix, int64_t first_row, int64_t columns, T* scratch)
      : matrix_(matrix), first_row_(first_row), columns_(columns), scratch_(scratch) {}

  // Rows on the way into the buffer that is not in use: runs of columns, and how many are done.
  // Their rows lie without a gap, stored and decoded. Small and of one value each, so that the loop
  // of a tile keeps a copy in registers.
  struct Making {
    StoredRow stored = {};
    T* to = nullptr;
    int64_t first = -1;
    int64_t run = 0, runs = 0, runs_per_step = 0;
    int group_shift = 0;
    dgemma_dtype scale_dtype = DGEMMA_BFLOAT16;

    __attribute__((always_inline)) void step() {
      if constexpr (kDecodesInSteps<T>)
        for (int64_t i = runs_per_step; i > 0 && run < runs; --i) decode_some();
    }
    __attribute__((always_inline)) void decode_some() {
      constexpr int64_t kCodeBytes = kFormat == DGEMMA_WEIGHTS_FP8 ? kCodes : kCodes / 2;
      // A group of INT4 is 1, 2 or 4 runs; a run of NVFP4 is two groups; FP8 has no scales here.
      const int64_t scale = kFormat == DGEMMA_WEIGHTS_INT4    ? (run >> group_shift) * 2
                            : kFormat == DGEMMA_WEIGHTS_NVFP4 ? run * 2
                                                              : 0;
      decode_run<kFormat>(stored.codes + run * kCodeBytes, stored.scales + scale, scale_dtype,
                          to + run * kCodes);
      ++run;
    }
  };

  // Begins rows first, first + 1, ..., to be done within so many steps; 0 for none.
  Making make(int64_t first, int64_t steps) {
    Making making;
    // Rows that are no whole runs, or cut a group short, and instruction sets whose registers the
    // products fill, are decoded when they are taken.
    const int64_t whole = matrix_.group > kCodes ? matrix_.group : kCodes;
    if (!kDecodesInSteps<T> || steps == 0 || columns_ % whole != 0) return making;
    making.stored = stored_row<kFormat>(matrix_, first_row_ + first, columns_);
    making.to = buffer(1 - which_);
    making.first = first;
    making.runs = kHalfRows * columns_ / kCodes;
    making.runs_per_step = (making.runs + steps - 1) / steps;
    making.group_shift = whole / kCodes >= 4 ? 2 : whole / kCodes >= 2 ? 1 : 0;
    making.scale_dtype = matrix_.scale_dtype;
    return making;
  }

  HalfRows<T> take(int64_t first, bool repeat, Making& made) {
    const int64_t stride = decoded_stride(columns_);
    if (first == made.first && !repeat) {
      while (made.run < made.runs) made.decode_some();
      which_ = 1 - which_;
    } else {
      for (int r = 0; r < (repeat ? 1 : kHalfRows); ++r)
        decode_row<kFormat>(matrix_, first_row_ + first + r, columns_, buffer(which_) + r * stride);
    }
    take_factors(first, repeat);
    return {buffer(which_), repeat ? 0 : stride};
  }

  void multiply_factors(Floats* sums, int registers) const {
    for (int i = 0; i < registers; ++i) sums[i] *= factors_[i];
  }
  const char* stored(int64_t row) const {
    return static_cast<const char*>(matrix_.values) + (first_row_ + row) * row_bytes();
  }
  int64_t row_bytes() const { return stored_row_bytes(matrix_, columns_); }

 private:
  T* buffer(int which) { return scratch_ + which * kHalfRows * decoded_stride(columns_); }

  void take_factors(int64_t first, bool repeat) {
    float factor[kHalfRows];
    for (int r = 0; r < kHalfRows; ++r) {
      const int64_t row = first_row_ + first + (repeat ? 0 : r);
      factor[r] =
          matrix_.factors == nullptr ? 1.0f : matrix_.factors[row / matrix_.rows_per_factor];
    }
    for (int i = 0; i < kTileTokens * kHalfRows; ++i)
      factors_[i / kLanes][folded_lane(i % kLanes)] = factor[i % kHalfRows];
  }

  const dgemma_quantized matrix_;
  const int64_t first_row_;
  const int64_t columns_;
  T* const scratch_;
  int which_ = 0;  // the half of scratch_ that holds the rows taken last
  Floats factors_[registers_for(kTileTokens * kHalfRows)] = {};
};

// What runs beside the products of a tile: the rows of the next one, asked for and decoded.
template <typename Rows>
struct WorkAhead {
  Ahead ahead = {};
  typename Rows::Making first = {}, second = {};

  __attribute__((always_inline)) void step() {
    ahead.step();
    first.step();
    second.step();
  }
};

// Asks for the first tile of a task, which no tile before it did.
template <typename Rows>
inline void prefetch_first_tile(const Rows& first, int64_t first_row, const Rows& second,
                                int64_t second_row) {
  Ahead ahead = {first.stored(first_row), second.stored(second_row),
                 (kHalfRows * first.row_bytes() + kLineBytes - 1) / kLineBytes};
  ahead.step();
}

template <dgemma_weight_format kFormat>
struct Format {
  static constexpr dgemma_weight_format value = kFormat;
};
template <typename Run>
inline void with_format(dgemma_weight_format format, Run run) {
  switch (format) {
    case DGEMMA_WEIGHTS_FP8:
      return run(Format<DGEMMA_WEIGHTS_FP8>{});
    case DGEMMA_WEIGHTS_INT4:
      return run(Format<DGEMMA_WEIGHTS_INT4>{});
    case DGEMMA_WEIGHTS_NVFP4:
      return run(Format<DGEMMA_WEIGHTS_NVFP4>{});
  }
}

}  // namespace
}  // namespace dgemma

// Scratch memory of one DecodedRows, in the caller's frame.
#define DGEMMA_DECODED_SCRATCH(T, columns)     \
  static_cast<T*>(__builtin_alloca_with_align( \
      static_cast<size_t>(2 * kHalfRows * decoded_stride(columns)) * sizeof(T), 512 /* bits */))
