// The matrix product of the attention kernel, and how its right-hand side is laid out.
//
// Both products (scores = query x key, output += probability x value) are one routine:
//
//   c[rows, columns] = a[rows, steps] x b[steps, columns]        a and c row-major, b in panels
//
// A panel is kPanelColumns columns of b, [steps, kPanelColumns], contiguous. An element of a or b
// is one 32-bit word: an fp32 number, or (with bf16 dot products) two neighbouring bf16 numbers, so
// that a step covers two values of the summed dimension.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/vector.h"

namespace dgemma {
namespace {

// Register tile: kTileRows x kTileVectors sums, so many that the latency of a multiply-add is
// covered and the sums, one panel row and a broadcast fit the register file.
#if defined(__AVX512F__)
constexpr int kTileRows = 8;
constexpr int kTileVectors = 2;
#elif defined(__AVX2__)
constexpr int kTileRows = 4;
constexpr int kTileVectors = 2;
#else
constexpr int kTileRows = 2;
constexpr int kTileVectors = 4;
#endif
constexpr int64_t kPanelColumns = kTileVectors * kLanes;

// A register tile's sums. Without a fused multiply-add every product would be rounded too: in
// double it is exact, and the scalar kernel is as close to the truth as the others.
#if defined(__FMA__)
typedef Floats Sums;
#else
typedef double Sums __attribute__((vector_size(8 * kLanes)));
#endif

constexpr int64_t round_up(int64_t x, int64_t multiple) {
  return (x + multiple - 1) / multiple * multiple;
}

// Steps that one chain of sums runs over. A panel's part of 64 steps, 8 KiB, stays in L1; one chain
// over a head of 256 failed the bound of twice torch's error. fp32 results show more of it: chains
// of 16 cost 4 % there and halve the error of small heads.
constexpr int64_t kChain = 64;
constexpr int64_t kChainOfFloat32 = 16;

// The word that values stored as T are multiplied in.
template <typename T>
struct Single {
  static constexpr int kValues = 1;
  static constexpr int64_t kChain = sizeof(T) == sizeof(float) ? kChainOfFloat32 : dgemma::kChain;

  static Sums multiply_add(uint32_t a, Floats b, Sums c) {
    float x;
    std::memcpy(&x, &a, sizeof x);
    return __builtin_convertvector(broadcast(x), Sums) * __builtin_convertvector(b, Sums) + c;
  }

  // kLanes words of one row, beginning at word `first`; `count` values of the row are left there.
  static Words load_row(const T* row, int64_t first, int64_t count) {
    return (Words)(count >= kLanes ? load(row + first) : load_partial(row + first, count));
  }

  // Words of two rows for the step that sums over rows: here a row is a step of its own.
  static void store_step(uint32_t* out, int64_t stride, const T* row0, const T* row1, int64_t first,
                         int64_t count) {
    const Words zero = {};
    const Words words0 = load_row(row0, first, count);
    const Words words1 = row1 != nullptr ? load_row(row1, first, count) : zero;
    std::memcpy(out, &words0, sizeof words0);
    std::memcpy(out + stride, &words1, sizeof words1);
  }

  // Probabilities `first` .. `first + kLanes - 1` of a row of words.
  static void store_probabilities(void* row, int64_t first, Floats p) {
    store(static_cast<float*>(row) + first, p);
  }
};

#if defined(__AVX512BF16__)
struct Pair {
  static constexpr int kValues = 2;
  static constexpr int64_t kChain = dgemma::kChain;

  static Floats multiply_add(uint32_t a, Floats b, Floats c) {
    return (Floats)_mm512_dpbf16_ps((__m512)c, (__m512bh)b, (__m512bh)_mm512_set1_epi32(a));
  }

  static Words load_row(const bfloat16* row, int64_t first, int64_t count) {
    Words words = {};
    if (count >= 2 * kLanes)
      std::memcpy(&words, row + 2 * first, sizeof words);
    else
      std::memcpy(&words, row + 2 * first, static_cast<size_t>(count) * sizeof(bfloat16));
    return words;
  }

  // Two rows become one step: row0's value in the low half of the word, row1's in the high half.
  static void store_step(uint32_t* out, int64_t /*stride*/, const bfloat16* row0,
                         const bfloat16* row1, int64_t first, int64_t count) {
    const Words low = bits(row0 + first, count);
    const Words zero = {};
    const Words high = row1 != nullptr ? bits(row1 + first, count) : zero;
    const Words words = low | (high << 16);
    std::memcpy(out, &words, sizeof words);
  }

  static void store_probabilities(void* row, int64_t first, Floats p) {
    store(static_cast<bfloat16*>(row) + first, p);
  }

 private:
  static Words bits(const bfloat16* p, int64_t count) {
    return (Words)(count >= kLanes ? load(p) : load_partial(p, count)) >> 16;
  }
};
#endif

// Columns of a kLanes x kLanes block of words become its rows: at each width the off-diagonal
// blocks change places.
template <int kWidth>
inline void transpose(Words* rows) {
  if constexpr (kWidth > 0) {
    const Words lane = (Words)lane_index();
    const Words upper = (lane & kWidth) != 0;  // all bits set in the upper half of each block
    // Lane i of the first result: first row's i, or the second row's i - kWidth.
    const Words low = (upper & (lane - kWidth + kLanes)) | (~upper & lane);
    const Words high = (upper & (lane + kLanes)) | (~upper & (lane + kWidth));
    for (int base = 0; base < kLanes; base += 2 * kWidth)
      for (int i = base; i < base + kWidth; ++i) {
        const Words a = rows[i];
        const Words b = rows[i + kWidth];
        rows[i] = __builtin_shuffle(a, b, low);
        rows[i + kWidth] = __builtin_shuffle(a, b, high);
      }
    transpose<kWidth / 2>(rows);
  }
}

// Lays `count` rows of `values` values out for a product that sums along the rows: panel column j
// is row j. Rows past `count` are zero up to a whole panel; steps past the values up to a multiple
// of kLanes, which is `steps`.
template <typename Word, typename T>
void pack_rows_as_columns(const T* const* rows, int64_t count, int64_t values, int64_t steps,
                          uint32_t* panels) {
  for (int64_t j = 0; j < round_up(count, kPanelColumns); j += kLanes) {
    uint32_t* out = panels + j / kPanelColumns * kPanelColumns * steps + j % kPanelColumns;
    for (int64_t step = 0; step < steps; step += kLanes) {
      Words block[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const Words zero = {};
        block[i] =
            j + i < count ? Word::load_row(rows[j + i], step, values - step * Word::kValues) : zero;
      }
      transpose<kLanes / 2>(block);
      for (int i = 0; i < kLanes; ++i)
        std::memcpy(out + (step + i) * kPanelColumns, &block[i], sizeof block[i]);
    }
  }
}

// Lays `count` rows of `values` values out for a product that sums over the rows: panel column j is
// value j of every row. An odd count gets a row of zeros; so do the columns up to a whole panel.
template <typename Word, typename T>
void pack_rows_as_steps(const T* const* rows, int64_t count, int64_t values, int64_t steps,
                        uint32_t* panels) {
  for (int64_t row = 0; row < count; row += 2) {
    const T* row1 = row + 1 < count ? rows[row + 1] : nullptr;
    for (int64_t j = 0; j < round_up(values, kPanelColumns); j += kLanes) {
      uint32_t* out = panels + j / kPanelColumns * kPanelColumns * steps + j % kPanelColumns +
                      row / Word::kValues * kPanelColumns;
      Word::store_step(out, kPanelColumns, rows[row], row1, j, values - j > 0 ? values - j : 0);
    }
  }
}

// A register tile starts from zero, or from what c holds.
enum class Held { kDrop, kAdd, kTimesFactorAndAdd };

// One register tile: c = held + a x panel, over `steps` steps. The sums begin at zero, so that
// their rounding does not depend on how large c already is.
template <typename Word, Held kHeld>
inline void multiply_tile(const uint32_t* a, int64_t a_stride, const uint32_t* panel, int64_t steps,
                          float* c, int64_t c_stride, const float* factor) {
  Sums sums[kTileRows][kTileVectors] = {};
  for (int64_t step = 0; step < steps; ++step) {
    Floats b[kTileVectors];
    for (int v = 0; v < kTileVectors; ++v)
      std::memcpy(&b[v], panel + step * kPanelColumns + v * kLanes, sizeof b[v]);
    for (int r = 0; r < kTileRows; ++r)
      for (int v = 0; v < kTileVectors; ++v)
        sums[r][v] = Word::multiply_add(a[r * a_stride + step], b[v], sums[r][v]);
  }
  for (int r = 0; r < kTileRows; ++r)
    for (int v = 0; v < kTileVectors; ++v) {
      float* to = c + r * c_stride + v * kLanes;
      Floats result = __builtin_convertvector(sums[r][v], Floats);
      if constexpr (kHeld == Held::kAdd) result += load(to);
      if constexpr (kHeld == Held::kTimesFactorAndAdd) result += load(to) * factor[r];
      store(to, result);
    }
}

// c = a x b, with kHeld as for a tile. `rows` is a multiple of kTileRows, `columns` is rounded up
// to whole panels.
template <typename Word, Held kHeld>
void multiply(const uint32_t* a, int64_t a_stride, const uint32_t* panels, int64_t panel_steps,
              int64_t steps, int64_t rows, int64_t columns, float* c, int64_t c_stride,
              const float* factor) {
  for (int64_t column = 0; column < columns; column += kPanelColumns) {
    for (int64_t first = 0; first < steps; first += Word::kChain) {
      const int64_t count = steps - first < Word::kChain ? steps - first : Word::kChain;
      const uint32_t* panel = panels + column * panel_steps + first * kPanelColumns;
      for (int64_t row = 0; row < rows; row += kTileRows) {
        const uint32_t* a_tile = a + row * a_stride + first;
        float* c_tile = c + row * c_stride + column;
        if (first == 0)
          multiply_tile<Word, kHeld>(a_tile, a_stride, panel, count, c_tile, c_stride,
                                     factor + row);
        else
          multiply_tile<Word, Held::kAdd>(a_tile, a_stride, panel, count, c_tile, c_stride,
                                          factor + row);
      }
    }
  }
}

}  // namespace
}  // namespace dgemma
