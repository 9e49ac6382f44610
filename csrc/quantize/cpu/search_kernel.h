// Rows of a matrix to codes and scales: of every group of columns the scale that loses least.
// Compiled once per instruction set; see cpu/vector.h for what that forbids.
#pragma once

#include "quantize/cpu/codes.h"
#include "quantize/cpu/kernels.h"

namespace dgemma {
namespace {

// A group's values, and the factors of their squared errors: NULL stands for 1. The memory of both
// goes on with zeros to a multiple of kBlock.
struct Group {
  const float* values;
  const float* importance;
  int64_t count;
};

// importance * x^2, summed over i's sixteen values.
inline void add_squares(const Group& group, int64_t i, const Floats (&x)[kParts], Sums* sums) {
  for (int p = 0; p < kParts; ++p) {
    const Floats square = x[p] * x[p];
    sums->part[p] +=
        group.importance == nullptr ? square : square * load(group.importance + i + p * kLanes);
  }
}

// The sum over the group of importance * (to_nearest(x / scale) * scale - x)^2. `quotient` gives
// x / scale, or the product with a reciprocal, which takes a fifth of the time.
template <typename Format, typename Quotient>
inline float squared_error(const Group& group, float scale, const Quotient& quotient) {
  Sums sums;
  for (int64_t i = 0; i < group.count; i += kBlock) {
    Floats lost[kParts];
    for (int p = 0; p < kParts; ++p) {
      const Floats x = load(group.values + i + p * kLanes);
      lost[p] = Format::nearest(quotient(x)) * scale - x;
    }
    add_squares(group, i, lost, &sums);
  }
  return sums.total();
}
template <typename Format>
inline float squared_error(const Group& group, float scale) {
  return squared_error<Format>(group, scale, [scale](Floats x) { return x / scale; });
}

inline float squared_size(const Group& group) {
  Sums sums;
  for (int64_t i = 0; i < group.count; i += kBlock) {
    Floats x[kParts];
    for (int p = 0; p < kParts; ++p) x[p] = load(group.values + i + p * kLanes);
    add_squares(group, i, x, &sums);
  }
  return sums.total();
}

inline float largest_magnitude(const Group& group) {
  Floats largest = {};
  for (int64_t i = 0; i < group.count; i += kLanes)
    largest = max(largest, magnitude(load(group.values + i)));
  return maximum(largest);
}

// The number of the scale that loses least by the quotients' estimate, or `usual`.
template <typename Format>
inline int search(const Group& group, float multiplier, int usual, float usual_error) {
  typedef typename Format::Scales Scales;
  // Beyond these bounds a reciprocal, or a square, may be no number.
  const float scale = Scales::value(usual) / multiplier;
  if (!(scale > 0x1p-60f && scale < 0x1p50f)) return usual;
  const int first = Scales::nearest(Scales::value(usual) * Format::kFrom);
  int last = Scales::nearest(Scales::value(usual) * Format::kTo);
  if (last > Scales::kLargest) last = Scales::kLargest;
  int best = usual;
  float least = usual_error;
  const auto attempt = [&](int number) __attribute__((always_inline)) {
    const float tried = Scales::value(number) / multiplier;
    const float inverse = 1.0f / tried;
    const float error =
        squared_error<Format>(group, tried, [inverse](Floats x) { return x * inverse; });
    if (error < least) {
      least = error;
      best = number;
    }
  };
  constexpr int kStep = Format::kStep;
  for (int number = first > 0 ? first : 1; number <= last; number += kStep) attempt(number);
  const int middle = best;
  for (int beside = 1; beside < kStep; ++beside) {
    if (middle > beside) attempt(middle - beside);
    if (middle + beside <= Scales::kLargest) attempt(middle + beside);
  }
  return best;
}

template <typename Format>
inline void write_codes(const Group& group, float scale, int64_t columns, uint8_t* to) {
  for (int64_t i = 0; i < columns; i += kBlock) {
    Ints codes[kParts];
    for (int p = 0; p < kParts; ++p)
      codes[p] = Format::codes(Format::nearest(load(group.values + i + p * kLanes) / scale));
    const int64_t left = columns - i;
    store_codes<Format>(codes, left < kBlock ? left : kBlock,
                        to + (Format::kTwoToAByte ? i / 2 : i));
  }
}

// One group of `columns`: its codes, its scale as it is stored, and what errors[3] gain: squares of
// the values, of the errors under the usual scale, and of those under the one that is taken.
template <typename Format>
inline void quantize_group(const Group& group, int64_t columns, float multiplier, uint8_t* codes,
                           float* stored_scale, double* errors) {
  typedef typename Format::Scales Scales;
  const float largest = largest_magnitude(group);
  const int usual = Scales::nearest(largest / Format::kMost * multiplier);
  float stored = Scales::kOfZeros;
  float before = squared_size(group);
  errors[0] += static_cast<double>(before);
  float after = before;
  if (usual > 0) {
    stored = Scales::value(usual);
    after = before = squared_error<Format>(group, stored / multiplier);
    const int best = search<Format>(group, multiplier, usual, before);
    const float found =
        best == usual ? before : squared_error<Format>(group, Scales::value(best) / multiplier);
    if (found < before) {
      stored = Scales::value(best);
      after = found;
    }
  }
  errors[1] += static_cast<double>(before);
  errors[2] += static_cast<double>(after);
  *stored_scale = stored;
  write_codes<Format>(group, stored / multiplier, columns, codes);
}

constexpr int64_t padded(int64_t columns) { return (columns + kBlock - 1) / kBlock * kBlock; }

template <typename T, typename Format>
void quantize_rows(const dgemma_quantize_weight& op, int64_t first_row, int64_t end_row) {
  const int64_t columns = op.columns, width = padded(columns);
  const int64_t group_columns = columns / op.groups;
  float* const values = static_cast<float*>(
      __builtin_alloca_with_align(static_cast<size_t>(2 * width) * sizeof(float), 512 /* bits */));
  float* const importance = op.importance != nullptr ? values + width : nullptr;
  for (int64_t i = columns; i < width; ++i) values[i] = 0.0f;
  for (int64_t i = 0; importance != nullptr && i < width; ++i)
    importance[i] = i < columns ? op.importance[i] : 0.0f;
  for (int64_t row = first_row; row < end_row; ++row) {
    const T* from = static_cast<const T*>(op.weight) + row * columns;
    for (int64_t i = 0; i < columns; ++i) values[i] = to_float(from[i]);
    double errors[3] = {};
    uint8_t* codes = op.values + row * op.row_bytes;
    for (int64_t g = 0; g < op.groups; ++g) {
      const int64_t at = g * group_columns;
      const Group group = {values + at, importance != nullptr ? importance + at : nullptr,
                           padded(group_columns)};
      quantize_group<Format>(group, group_columns, op.multiplier,
                             codes + (Format::kTwoToAByte ? at / 2 : at),
                             op.scales + row * op.groups + g, errors);
    }
    for (int i = 0; i < 3; ++i) op.errors[row * 3 + i] = errors[i];
  }
}

}  // namespace
}  // namespace dgemma
