// A row of a tensor, read and written vector by vector; and the sum of its squares.
//
// Kernels that include this are compiled without contraction of products and sums
// (cmake/CpuVariants.cmake), and the sum has one order for all widths of a vector: so every
// instruction set gives the same bits, and torch's where it rounds one by one.
#pragma once

#include "cpu/vector.h"

namespace dgemma {
namespace {

// kLanes values from an index on, or the fewer that are left of a row.
struct WholeVector {
  template <typename T>
  static Floats load(const T* p) {
    return dgemma::load(p);
  }
  template <typename T>
  static void store(T* p, Floats v) {
    dgemma::store(p, v);
  }
};
struct PartOfVector {
  int64_t values;
  template <typename T>
  Floats load(const T* p) const {
    return load_partial(p, values);
  }
  template <typename T>
  void store(T* p, Floats v) const {
    store_partial(p, v, values);
  }
};

// Calls body(i, span) for i = 0, kLanes, ... below n; span loads and stores what is there.
template <typename Body>
inline void for_each_vector(int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) body(i, WholeVector{});
  if (i < n) body(i, PartOfVector{n - i});
}

// 32 sums, value i in sum i % 32, then a tree over them.
class SumOfSquares {
 public:
  void add(int64_t i, Floats v) { part_[i / kLanes % kVectors] += v * v; }
  float total() const {
    float sums[kParts];
    for (int i = 0; i < kVectors; ++i) store(sums + i * kLanes, part_[i]);
    for (int width = kParts / 2; width > 0; width /= 2)
      for (int i = 0; i < width; ++i) sums[i] += sums[i + width];
    return sums[0];
  }

 private:
  static constexpr int kParts = 32;
  static constexpr int kVectors = kParts / kLanes;
  Floats part_[kVectors] = {};
};

// 1 / sqrt(mean of squares + epsilon).
inline float norm_factor(float squares, int64_t n, float epsilon) {
  return 1.0f / __builtin_sqrtf(squares / static_cast<float>(n) + epsilon);
}

template <typename T>
inline float norm_factor(const T* row, int64_t n, float epsilon) {
  SumOfSquares squares;
  for_each_vector(n, [&](int64_t i, auto span) { squares.add(i, span.load(row + i)); });
  return norm_factor(squares.total(), n, epsilon);
}

}  // namespace
}  // namespace dgemma
