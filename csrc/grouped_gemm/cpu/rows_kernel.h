// The products of the experts and of a dense projection share these: tiles of weight rows, their
// prefetch, and the writing of results. Compiled once per instruction set; see cpu/vector.h for
// what that forbids.
#pragma once

#include <type_traits>

#include "grouped_gemm/cpu/weight_rows.h"

namespace dgemma {
namespace {

// Tokens of one group that are multiplied with all rows of a task before the next ones: 64 rows of
// 2816 bf16 values are 352 KiB, which a second-level cache of 1 MiB keeps beside the weights.
constexpr int64_t kTokensPerBlock = 64;

// Rows start .. start + kHalfRows - 1 of a tile's half are computed (all the same row where
// `repeat`, because there are fewer than that), those in [begin, end) are needed.
struct RowTile {
  int64_t start;
  int64_t begin;
  int64_t end;
  bool repeat;
};

// The tile that begins at `row`, of rows [.., task_end) of a matrix of `matrix_rows` rows: moved
// back where it would leave the matrix.
inline RowTile row_tile(int64_t row, int64_t task_end, int64_t matrix_rows, int64_t rows_per_tile) {
  if (matrix_rows < rows_per_tile) return {row, row, row + 1, true};
  const int64_t last_start = matrix_rows - rows_per_tile;
  const int64_t end = row + rows_per_tile;
  return {row < last_start ? row : last_start, row, end < task_end ? end : task_end, false};
}

// Steps of all tiles of so many tokens.
template <typename T>
inline int64_t count_steps(int64_t tokens, int64_t k) {
  return (tokens + kTileTokens - 1) / kTileTokens * (k / Step<T>::kValues);
}

// Cache lines to prefetch per step, so that `bytes` are prefetched within so many steps.
inline int64_t lines_per_step(int64_t bytes, int64_t steps) {
  const int64_t lines = (bytes + kLineBytes - 1) / kLineBytes;
  return steps > 0 ? (lines + steps - 1) / steps : 0;
}

// Prefetches the first tile of a task, which no tile before it did.
template <typename Rows>
inline void prefetch_first_tile(const Rows& first, int64_t first_row, const Rows& second,
                                int64_t second_row) {
  Prefetcher prefetcher = {first.stored(first_row), second.stored(second_row),
                           (kHalfRows * first.row_bytes() + kLineBytes - 1) / kLineBytes};
  prefetcher.step();
}

// Calls run(std::integral_constant of count) for a count in [1, kTileTokens].
template <typename Run>
inline void with_count(int64_t count, Run run) {
  static_assert(kTileTokens <= 4);
  if (count == 1) run(std::integral_constant<int, 1>{});
  if (count == 2) run(std::integral_constant<int, 2>{});
  if constexpr (kTileTokens >= 3)
    if (count == 3) run(std::integral_constant<int, 3>{});
  if constexpr (kTileTokens >= 4)
    if (count == 4) run(std::integral_constant<int, 4>{});
}

// One half of a tile's results, rounded to T, by token and row.
template <typename T, int kTokens>
struct HalfResults {
  static constexpr int kRegisters = registers_for(kTokens * kHalfRows);
  T lanes[kRegisters * kLanes];
  __attribute__((always_inline)) T at(int token, int row) const {
    const int i = token * kHalfRows + row;
    return lanes[i / kLanes * kLanes + folded_lane(i % kLanes)];
  }
  // to[r - begin] = row r of one token for r in [begin, end). A tile whose rows are all needed, as
  // nearly every tile's are, takes loops of constant length.
  __attribute__((always_inline)) void write(int token, int64_t begin, int64_t end, T* to) const {
    if (begin == 0 && end >= kHalfRows) {
#pragma GCC unroll 8
      for (int r = 0; r < kHalfRows; ++r) to[r] = at(token, r);
    } else {
      for (int64_t r = begin; r < end && r < kHalfRows; ++r)
        to[r - begin] = at(token, static_cast<int>(r));
    }
  }
};

// result_row(t)[row] = the product of token t and of one weight row, for the rows [first_row,
// end_row) of the matrix's `matrix_rows` and up to kTokensPerBlock tokens. `first` and `second`
// give the rows of a tile's halves, both of the one matrix. `cold`: the weights are not in a cache
// yet, so the rows after each tile are prefetched while it is computed.
template <typename T, typename Result, typename Rows, typename ResultRow>
inline void multiply_rows(const T* const* x, int64_t tokens, Rows first, Rows second,
                          int64_t matrix_rows, int64_t k, int64_t first_row, int64_t end_row,
                          bool cold, ResultRow result_row) {
  for (int64_t row = first_row; row < end_row;) {
    const RowTile tile = row_tile(row, end_row, matrix_rows, 2 * kHalfRows);
    const int64_t half = tile.repeat ? 0 : kHalfRows;
    const HalfRows<T> a = first.take(tile.start, tile.repeat);
    const HalfRows<T> b = second.take(tile.start + half, tile.repeat);
    const RowTile next = row_tile(tile.end, end_row, matrix_rows, 2 * kHalfRows);
    const int64_t steps = count_steps<T>(tokens, k);
    const int64_t lines = cold ? lines_per_step(half * first.row_bytes(), steps) : 0;
    Prefetcher prefetcher = {first.stored(next.start), first.stored(next.start + half), lines};
    for (int64_t t = 0; t < tokens; t += kTileTokens) {
      with_count(tokens - t < kTileTokens ? tokens - t : kTileTokens, [&](auto count) {
        constexpr int kTokens = decltype(count)::value;
        constexpr int kRegisters = registers_for(kTokens * kHalfRows);
        Floats sums[2][kRegisters];
        dot_tile<T, kTokens>(x + t, a.rows, b.rows, a.stride, k, prefetcher, sums[0], sums[1]);
        first.multiply_row_scales(sums[0], kRegisters);
        second.multiply_row_scales(sums[1], kRegisters);
        HalfResults<Result, kTokens> y[2];
#pragma GCC unroll 8
        for (int i = 0; i < kRegisters; ++i) {
          store(y[0].lanes + i * kLanes, sums[0][i]);
          store(y[1].lanes + i * kLanes, sums[1][i]);
        }
        const int64_t begin = tile.begin - tile.start, end = tile.end - tile.start;
        const int64_t second_begin = begin > kHalfRows ? begin : kHalfRows;
#pragma GCC unroll 8
        for (int token = 0; token < kTokens; ++token) {
          Result* to = result_row(t + token) + tile.start;
          y[0].write(token, begin, end, to + begin);
          y[1].write(token, second_begin - kHalfRows, end - kHalfRows, to + second_begin);
        }
      });
    }
    row = tile.end;
  }
}

}  // namespace
}  // namespace dgemma
