// The dense soft embedding: probabilities [rows, vocabulary] times embedding [vocabulary, hidden].
//
// The vocabulary is walked in blocks (kProbabilityBlock) and these in depths (kDepth). A strip of
// 64 columns of a depth of the embedding is rearranged once into a panel on the stack and used for
// all rows: register tiles of six rows by the strip. Each depth is summed from zero and then added
// to the row's sum, in vocabulary order, so a row's bits depend on nothing but the row.
#pragma once

#include "denoise/cpu/soft_embedding_kernel.h"

namespace dgemma {
namespace {

constexpr int kTileRows = 6;
// 24 (AVX-512) or 12 (AVX2) accumulators, the strip's vectors and one broadcast fill the registers.
constexpr int kTileVectors = kLanes == 16 ? 4 : 2;
constexpr int kTileColumns = kTileVectors * kLanes;

// Two consecutive probabilities of a row, or of a column of the embedding, in one 32-bit lane: what
// the bf16 dot product takes.
#if defined(__AVX512BF16__)
template <typename T>
constexpr bool kPaired = sizeof(T) == 2;
#else
template <typename T>
constexpr bool kPaired = false;
#endif

// The type in which the panel and the probabilities are stored.
template <bool kPairs>
struct Stored {
  typedef float Type;
};
template <>
struct Stored<true> {
  typedef bfloat16 Type;
};
// A panel's depth: 32 KiB of bfloat16, for an L1 of 48 (NOTES.md), or 64 KiB of fp32.
constexpr int kDepth = 256;

template <typename T>
void probabilities_row(const SoftEmbeddingWork& work, int64_t dense_row) {
  typedef typename Stored<kPaired<T>>::Type P;
  const int64_t row_number = work.dense_rows[work.first_dense + dense_row];
  const SoftEmbeddingRow& state = work.rows[row_number];
  const LogitRow<T> row = logit_row<T>(work.op->logits, row_number);
  P* p = static_cast<P*>(work.probabilities) + dense_row * kProbabilityStride;
  TileLogits tile;
  for (int64_t j = work.first_token / kTile; j * kTile < work.first_token + work.tokens;
       ++j, p += kTile) {
    if (tile_is_empty(row.allowed, row.vocabulary, j)) {
      for (int i = 0; i < kTile; i += kLanes) store(p + i, broadcast(0.0f));
      continue;
    }
    tile_weights(row, j, state.row_max, &tile);
    for (int i = 0; i < kTile; i += kLanes)
      store(p + i, rounded_to<T>(load(tile.z + i) * state.inverse_sum));
  }
}

// Panel of fp32: entry [k][column]. Columns past hidden_size are zero.
template <typename T>
inline void pack_panel(const T* embedding, int64_t hidden, int64_t depth, int64_t columns,
                       float* panel) {
  for (int64_t k = 0; k < depth; ++k, embedding += hidden, panel += kStripColumns)
    for (int64_t c = 0; c < kStripColumns; c += kLanes) {
      const int64_t left = columns - c;
      store(panel + c, left >= kLanes ? load(embedding + c)
                       : left > 0     ? load_partial(embedding + c, left)
                                      : broadcast(0.0f));
    }
}

// sums[i, columns] += p[i, depth] * panel[depth, columns] for kRows rows.
template <int kRows>
inline void multiply_tile(const float* p, const float* panel, int64_t depth, float* const* sums) {
  Floats total[kRows][kTileVectors] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Floats b[kTileVectors];
    for (int v = 0; v < kTileVectors; ++v) b[v] = load(panel + k * kStripColumns + v * kLanes);
    for (int i = 0; i < kRows; ++i) {
      const Floats a = broadcast(p[i * kProbabilityStride + k]);
      for (int v = 0; v < kTileVectors; ++v) total[i][v] = fmadd(a, b[v], total[i][v]);
    }
  }
  for (int i = 0; i < kRows; ++i)
    for (int v = 0; v < kTileVectors; ++v)
      store(sums[i] + v * kLanes, load(sums[i] + v * kLanes) + total[i][v]);
}

#if defined(__AVX512BF16__)
// Panel of pairs: entry [k / 2][column] holds rows k and k + 1 of the embedding; a row past the
// depth is zero.
inline void pack_panel(const bfloat16* embedding, int64_t hidden, int64_t depth, int64_t columns,
                       bfloat16* panel) {
  for (int64_t k = 0; k < depth; k += 2, panel += 2 * kStripColumns) {
    const bfloat16* const low = embedding + k * hidden;
    const bfloat16* const high = low + hidden;
    for (int64_t c = 0; c < kStripColumns; c += kLanes) {
      const int64_t left = columns - c;
      const __mmask16 present = left >= kLanes ? 0xffff : left > 0 ? (1u << left) - 1u : 0;
      const __mmask16 second = k + 1 < depth ? present : 0;
      const Halves l = (Halves)_mm256_maskz_loadu_epi16(present, low + c);
      const Halves h = (Halves)_mm256_maskz_loadu_epi16(second, high + c);
      const Words pairs =
          __builtin_convertvector(l, Words) | (__builtin_convertvector(h, Words) << 16);
      std::memcpy(panel + 2 * c, &pairs, sizeof pairs);
    }
  }
}

template <int kRows>
inline void multiply_tile(const bfloat16* p, const bfloat16* panel, int64_t depth,
                          float* const* sums) {
  __m512 total[kRows][kTileVectors];
  for (int i = 0; i < kRows; ++i)
    for (int v = 0; v < kTileVectors; ++v) total[i][v] = _mm512_setzero_ps();
#pragma GCC unroll 2
  for (int64_t k = 0; k < depth; k += 2) {
    __m512bh b[kTileVectors];
    for (int v = 0; v < kTileVectors; ++v)
      b[v] = (__m512bh)_mm512_loadu_si512(panel + k * kStripColumns + 2 * v * kLanes);
    for (int i = 0; i < kRows; ++i) {
      int32_t pair;
      std::memcpy(&pair, p + i * kProbabilityStride + k, sizeof pair);
      const __m512bh a = (__m512bh)_mm512_set1_epi32(pair);
      for (int v = 0; v < kTileVectors; ++v) total[i][v] = _mm512_dpbf16_ps(total[i][v], a, b[v]);
    }
  }
  for (int i = 0; i < kRows; ++i)
    for (int v = 0; v < kTileVectors; ++v) {
      float* const sum = sums[i] + v * kLanes;
      _mm512_storeu_ps(sum, _mm512_add_ps(_mm512_loadu_ps(sum), total[i][v]));
    }
}
#endif

template <typename P>
inline void multiply_rows(int64_t rows, const P* p, const P* panel, int64_t depth,
                          float* const* sums) {
  switch (rows) {
    case 1:
      return multiply_tile<1>(p, panel, depth, sums);
    case 2:
      return multiply_tile<2>(p, panel, depth, sums);
    case 3:
      return multiply_tile<3>(p, panel, depth, sums);
    case 4:
      return multiply_tile<4>(p, panel, depth, sums);
    case 5:
      return multiply_tile<5>(p, panel, depth, sums);
    default:
      return multiply_tile<kTileRows>(p, panel, depth, sums);
  }
}

// Prefetches rows [first, end) of a strip of the embedding. A row of a strip is a few cache lines
// in a page of its own, which no hardware prefetcher follows: +5 % at the model's width.
template <typename T>
inline void prefetch_strip(const T* embedding, int64_t hidden, int64_t first, int64_t end) {
  for (int64_t row = first; row < end; ++row)
    for (int64_t c = 0; c < kStripColumns; c += 64 / static_cast<int64_t>(sizeof(T)))
      __builtin_prefetch(embedding + row * hidden + c, 0, 2);
}

// One strip of columns of the present vocabulary block, for all dense rows.
template <typename T>
void product_strip(const SoftEmbeddingWork& work, int64_t strip) {
  typedef typename Stored<kPaired<T>>::Type P;
  // Entries of a panel per vocabulary entry and column are one, whether paired or not.
  alignas(64) P panel[kDepth * kStripColumns];
  const dgemma_soft_embedding& op = *work.op;
  const int64_t first_column = strip * kStripColumns;
  const int64_t columns = op.hidden_size - first_column;
  const T* const embedding = static_cast<const T*>(op.embedding) + first_column;
  const P* const probabilities = static_cast<const P*>(work.probabilities);
  for (int64_t k = 0; k < work.tokens; k += kDepth) {
    const int64_t depth = work.tokens - k < kDepth ? work.tokens - k : kDepth;
    pack_panel(embedding + (work.first_token + k) * op.hidden_size, op.hidden_size, depth, columns,
               panel);
    // While this depth is multiplied, the next is fetched, a few rows with each register tile.
    const int64_t next = work.first_token + k + depth;
    const int64_t next_end =
        next + kDepth < op.logits.vocabulary ? next + kDepth : op.logits.vocabulary;
    const int64_t groups = (work.dense_count + kTileRows - 1) / kTileRows;
    const int64_t share = (kDepth + groups - 1) / groups;
    int64_t fetched = next;
    for (int64_t first = 0; first < work.dense_count; first += kTileRows) {
      const int64_t fetch_end = fetched + share < next_end ? fetched + share : next_end;
      prefetch_strip(embedding, op.hidden_size, fetched, fetch_end);
      fetched = fetch_end;
      const int64_t left = work.dense_count - first;
      const int64_t rows = left < kTileRows ? left : kTileRows;
      float* sums[kTileRows];
      for (int64_t c = 0; c < kStripColumns; c += kTileColumns) {
        for (int64_t i = 0; i < rows; ++i)
          sums[i] = work.sums + work.dense_rows[work.first_dense + first + i] * work.padded_hidden +
                    first_column + c;
        multiply_rows(rows, probabilities + first * kProbabilityStride + k,
                      panel + c * static_cast<int64_t>(sizeof(P) == 2 ? 2 : 1), depth, sums);
      }
    }
  }
}

}  // namespace
}  // namespace dgemma
