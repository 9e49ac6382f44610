// Where the weight rows of a tile come from: memory as it is, or codes that are decoded. Compiled
// once per instruction set; see cpu/vector.h for what that forbids.
//
// The rows of a tile's half are taken one half after the other, upwards. Decoded rows lie in one of
// two buffers, so that those of the next tile can be made while a tile is multiplied: see
// cpu_work_ahead.h.
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
  static constexpr bool kDecoded = false;
  static constexpr bool kShuffled = false;
  const T* matrix;
  int64_t columns;

  // Rows that are being made ready: nothing is to be done for these.
  struct Making {};
  void make(int64_t /*first*/, bool /*beside*/, Making& /*making*/) {}

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

// Bytes of scratch memory: two buffers of kHalfRows rows, and their scales, of which there are the
// most in the format NVFP4.
template <typename T>
constexpr int64_t decoded_bytes(int64_t columns) {
  return kHalfRows * (2 * decoded_stride(columns) * static_cast<int64_t>(sizeof(T)) +
                      decoded_stride(columns) / kNvfp4Group * static_cast<int64_t>(sizeof(float)));
}

// shuffled: in the order of shuffled_codes, where decodes_shuffled.
template <typename T, dgemma_weight_format kFormat, bool shuffled = false>
class DecodedRows {
 public:
  static constexpr bool kDecoded = true;
  static constexpr bool kShuffled = shuffled;
  static constexpr bool kInSteps = kDecodesInSteps<T>;
  static constexpr int64_t kRunBytes = dgemma::kRunBytes<kFormat>;

  // Row 0 stands for `first_row` of the matrix; `scratch` has decoded_bytes.
  DecodedRows(const dgemma_quantized& matrix, int64_t first_row, int64_t columns, void* scratch)
      : matrix_(matrix),
        first_row_(first_row),
        columns_(columns),
        scales_per_row_(count_scales<kFormat>(columns, matrix.group)),
        values_(static_cast<T*>(scratch)),
        scales_(reinterpret_cast<float*>(values_ + 2 * kHalfRows * decoded_stride(columns))) {}

  // Rows on the way into the buffer that is not in use, as runs of kCodes columns: the rows lie
  // without a gap, stored and decoded.
  struct Making {
    const uint8_t* codes = nullptr;
    const float* scales = nullptr;
    T* to = nullptr;
    int64_t first = -1;
    int64_t run = 0, runs = 0;  // done, and of all
    int group_shift = 0;        // runs that share a scale of INT4: 1 << group_shift

    int64_t left() const { return runs - run; }
    void finish() {
      for (; run < runs; ++run) decode(run);
    }
    __attribute__((always_inline)) void decode(int64_t i) const {
#if defined(__AVX512BW__)
      if constexpr (kShuffled)
        return Table<T>(kInt4Values, *scale_of(i))
            .look_up_shuffled(codes + i * kRunBytes, to + i * kCodes);
#endif
      decode_run<kFormat>(codes + i * kRunBytes, scale_of(i), to + i * kCodes);
    }
    // The same beside the products of a tile, where multiplications are dear.
    __attribute__((always_inline)) void decode_beside(int64_t i) const {
#if defined(__AVX512BW__)
      if constexpr (kShuffled)
        return int4_table_by_sums(*scale_of(i))
            .look_up_shuffled(codes + i * kRunBytes, to + i * kCodes);
#endif
      decode(i);
    }

   private:
    // A group of INT4 is 1, 2 or 4 runs, a run of NVFP4 two groups.
    __attribute__((always_inline)) const float* scale_of(int64_t i) const {
      if constexpr (kFormat == DGEMMA_WEIGHTS_FP8) return nullptr;
      return scales + (kFormat == DGEMMA_WEIGHTS_INT4 ? i >> group_shift : 2 * i);
    }
  };

  // Begins rows first, first + 1, ...; beside: some of it by decode_beside.
  void make(int64_t first, bool beside, Making& making) {
    // Rows that are no whole runs, or cut a group short, or have scales beyond the usual, and
    // instruction sets whose registers the products fill, are decoded when they are taken.
    const int64_t whole = matrix_.group > kCodes ? matrix_.group : kCodes;
    if (!kInSteps || columns_ % whole != 0) return;
    making.scales = load_scales(first, kHalfRows);
#if defined(__AVX512BW__)
    if (kShuffled && beside &&
        !all_usual(stored_scales(first), kHalfRows * scales_per_row_, matrix_.scale_dtype))
      return;
#else
    (void)beside;
#endif
    making.codes = codes(first);
    making.to = buffer(1 - which_);
    making.first = first;
    making.run = 0;
    making.runs = kHalfRows * columns_ / kCodes;
    making.group_shift = whole / kCodes >= 4 ? 2 : whole / kCodes >= 2 ? 1 : 0;
  }

  HalfRows<T> take(int64_t first, bool repeat, Making& made) {
    const int64_t stride = decoded_stride(columns_);
    if (first == made.first && !repeat) {
      made.finish();
      which_ = 1 - which_;
    } else {
      const int rows = repeat ? 1 : kHalfRows;
      const float* scales = load_scales(first, rows);
      for (int r = 0; r < rows; ++r)
        decode(codes(first + r), scales + r * scales_per_row_, buffer(which_) + r * stride);
    }
    take_factors(first, repeat);
    return {buffer(which_), repeat ? 0 : stride};
  }

  void multiply_factors(Floats* sums, int registers) const {
    if (matrix_.factors == nullptr) return;
    for (int i = 0; i < registers; ++i) sums[i] *= factors_[i];
  }
  const char* stored(int64_t row) const { return reinterpret_cast<const char*>(codes(row)); }
  int64_t row_bytes() const { return stored_row_bytes(matrix_, columns_); }

 private:
  void decode(const uint8_t* codes, const float* scales, T* to) const {
#if defined(__AVX512BW__)
    if constexpr (kShuffled) {
      for (int64_t column = 0; column < columns_; column += kCodes)
        Table<T>(kInt4Values, scales[column / matrix_.group])
            .look_up_shuffled(codes + column / 2, to + column);
      return;
    }
#endif
    decode_row<kFormat>(codes, scales, matrix_.group, columns_, to);
  }

  T* buffer(int which) { return values_ + which * kHalfRows * decoded_stride(columns_); }
  const uint8_t* codes(int64_t row) const {
    return static_cast<const uint8_t*>(matrix_.values) + (first_row_ + row) * row_bytes();
  }

  const uint8_t* stored_scales(int64_t row) const {
    return static_cast<const uint8_t*>(matrix_.scales) +
           (first_row_ + row) * scales_per_row_ * kScaleBytes<kFormat>;
  }
  const float* load_scales(int64_t row, int64_t rows) {
    const uint8_t* stored = stored_scales(row);
    const int64_t count = rows * scales_per_row_;
    convert_scales<kFormat>(stored, count, matrix_.scale_dtype, scales_);
    // Those of rows to come: of down's, whose tiles are short, some tiles ahead.
    constexpr int64_t kDistance = 1024;
    for (int64_t i = 0; i < count * kScaleBytes<kFormat>; i += kLineBytes)
      __builtin_prefetch(stored + kDistance + i, 0, 3);
    return scales_;
  }

  // Factors of a tile's sums. Neighbouring rows share one, or have one each: a division for every
  // row would be felt.
  void take_factors(int64_t first, bool repeat) {
    if (matrix_.factors == nullptr) return;
    float factor[kHalfRows];
    int64_t row = first_row_ + first;
    int64_t index = row / matrix_.rows_per_factor;
    int64_t end = (index + 1) * matrix_.rows_per_factor;
    for (int r = 0; r < kHalfRows; ++r) {
      factor[r] = matrix_.factors[index];
      if (!repeat && r + 1 < kHalfRows && ++row == end) {
        ++index;
        end += matrix_.rows_per_factor;
      }
    }
    for (int i = 0; i < kTileTokens * kHalfRows; ++i)
      factors_[i / kLanes][folded_lane(i % kLanes)] = factor[i % kHalfRows];
  }

  const dgemma_quantized matrix_;
  const int64_t first_row_;
  const int64_t columns_;
  const int64_t scales_per_row_;
  T* const values_;
  float* const scales_;
  int which_ = 0;  // the buffer that holds the rows taken last
  Floats factors_[registers_for(kTileTokens * kHalfRows)] = {};
};

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

// Calls run with the type of a matrix's decoded rows, shuffled where they may be.
template <typename Rows>
struct RowsOf {
  typedef Rows Type;
};
template <typename T, typename Run>
inline void with_moe_rows(const dgemma_quantized& matrix, int64_t columns, Run run) {
  if constexpr (kDecodesInSteps<T>)
    if (decodes_shuffled<T>(matrix.format, columns))
      return run(RowsOf<DecodedRows<T, DGEMMA_WEIGHTS_INT4, true>>{});
  with_format(matrix.format,
              [&](auto format) { run(RowsOf<DecodedRows<T, decltype(format)::value>>{}); });
}

}  // namespace
}  // namespace dgemma

// Scratch memory of one DecodedRows, in the caller's frame.
#define DGEMMA_DECODED_SCRATCH(T, columns) \
  __builtin_alloca_with_align(static_cast<size_t>(decoded_bytes<T>(columns)), 512 /* bits */)
