// A row of a tensor, read and written vector by vector; and the sum of its values or squares.
//
// Kernels that include this are compiled without contraction of products and sums
// (cmake/CpuVariants.cmake), and the sum has one order for all widths of a vector, which is that of
// torch's sum: so every instruction set gives the same bits, and they are torch's.
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

// What a sum has of each value.
struct Itself {
  template <typename V>
  static V of(V v) {
    return v;
  }
};
struct Squared {
  template <typename V>
  static V of(V v) {
    return v * v;
  }
};

// The sum of eight values or more in the order in which torch adds up a row of fp32 (2.11 to 2.13,
// whatever the processor), so that a norm has its bits: vectors of eight values, and four sums of
// vectors that take turns. Sixteen turns are one block; blocks are summed apart, sixteen of these
// apart again, and so on. What is left of the vectors goes to the first of the four, what is left
// of the values is added up before the eight lanes.
template <typename Term>
class RowSum {
 public:
  template <typename T>
  static float of(const T* row, int64_t n) {
    const int64_t turns = n / kParts;
    Turn levels[kLevels] = {};
    int64_t turn = 0;
    while (turn + kTurnsPerBlock <= turns) {
      Turn block = {};
      for (const int64_t end = turn + kTurnsPerBlock; turn < end; ++turn)
        block.add(row + turn * kParts);
      levels[1].add(block);
      int64_t size = kTurnsPerBlock * kTurnsPerBlock;
      for (int level = 2; level < kLevels && turn % size == 0; ++level, size *= kTurnsPerBlock) {
        levels[level].add(levels[level - 1]);
        levels[level - 1] = {};
      }
    }
    for (; turn < turns; ++turn) levels[0].add(row + turn * kParts);
    for (int level = 1; level < kLevels; ++level) levels[0].add(levels[level]);
    return total(levels[0], row, turns * kParts, n);
  }

 private:
  static constexpr int kParts = 32, kEight = 8;
  static constexpr int kVectors = kParts / kLanes;
  static constexpr int kLevels = 4;
  static constexpr int64_t kTurnsPerBlock = 16;

  // Value i of 32 in sum i.
  struct Turn {
    Floats part[kVectors];
    template <typename T>
    void add(const T* values) {
      for (int i = 0; i < kVectors; ++i) {
        const Floats v = load(values + i * kLanes);
        part[i] += Term::of(v);
      }
    }
    void add(const Turn& other) {
      for (int i = 0; i < kVectors; ++i) part[i] += other.part[i];
    }
  };

  // The sum of a turn's sums and of the values [begin, n).
  template <typename T>
  static float total(const Turn& sums, const T* row, int64_t begin, int64_t n) {
    float parts[kParts];
    for (int i = 0; i < kVectors; ++i) store(parts + i * kLanes, sums.part[i]);
    for (; begin + kEight <= n; begin += kEight)
      for (int i = 0; i < kEight; ++i) parts[i] += Term::of(to_float(row[begin + i]));
    for (int i = kEight; i < kParts; ++i) parts[i % kEight] += parts[i];
    float sum = 0.0f;
    for (; begin < n; ++begin) sum += Term::of(to_float(row[begin]));
    for (int i = 0; i < kEight; ++i) sum += parts[i];
    return sum;
  }
};

// 1 / sqrt(mean of squares + epsilon).
inline float norm_factor(float squares, int64_t n, float epsilon) {
  return 1.0f / __builtin_sqrtf(squares / static_cast<float>(n) + epsilon);
}

template <typename T>
inline float norm_factor(const T* row, int64_t n, float epsilon) {
  return norm_factor(RowSum<Squared>::of(row, n), n, epsilon);
}

}  // namespace
}  // namespace dgemma
