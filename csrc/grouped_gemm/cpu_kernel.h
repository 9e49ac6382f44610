// The three tasks of a pass: gate and up with the activation between, down, and the sum over slots.
// Compiled once per instruction set; see cpu/vector.h for what that forbids.
#pragma once

#include "grouped_gemm/cpu.h"
#include "grouped_gemm/cpu_dot_tile.h"

namespace dgemma {
namespace {

// Tokens of one group that are multiplied with all rows of a task before the next ones: 64 rows of
// 2816 bf16 values are 352 KiB, which a second-level cache of 1 MiB keeps beside the weights.
constexpr int64_t kTokensPerBlock = 64;

// gelu_tanh(gate) * up: 0.5 g (1 + tanh(sqrt(2 / pi) (g + 0.044715 g^3))) u. Never inlined, so that
// every tile shape runs the same instructions.
__attribute__((noinline)) Floats activate(Floats gate, Floats up) {
  const Floats inner = 0.79788456080286536f * fmadd(0.044715f * gate * gate, gate, gate);
  return 0.5f * gate * (1.0f + tanh(inner)) * up;
}

// What a row tile needs besides its tokens. Rows start .. start + kHalfRows - 1 are computed (all
// the same row where there are fewer than that), those in [begin, end) are wanted.
struct RowTile {
  int64_t start;
  int64_t begin;
  int64_t end;
  int64_t stride;  // between rows, in values; 0 where one row stands for all
};

// The tile that begins at `row`, of rows [.., task_end) of a matrix of `matrix_rows` rows: moved
// back where it would leave the matrix.
inline RowTile row_tile(int64_t row, int64_t task_end, int64_t matrix_rows, int64_t rows_per_tile,
                        int64_t row_values) {
  if (matrix_rows < rows_per_tile) return {row, row, row + 1, 0};
  const int64_t last_start = matrix_rows - rows_per_tile;
  const int64_t end = row + rows_per_tile;
  return {row < last_start ? row : last_start, row, end < task_end ? end : task_end, row_values};
}

// Cache lines per step so that `bytes` are asked for within `tokens` tokens' tiles along k.
inline int64_t lines_per_step(int64_t bytes, int64_t tokens, int64_t k, int64_t values) {
  const int64_t steps = (tokens + kTileTokens - 1) / kTileTokens * (k / values);
  const int64_t lines = (bytes + kLineBytes - 1) / kLineBytes;
  return steps > 0 ? (lines + steps - 1) / steps : 0;
}

// Calls run(integral constant n) with n = count for count in [1, kTileTokens].
template <int n>
struct Count {
  static constexpr int value = n;
};
template <typename Run>
inline void with_count(int64_t count, Run run) {
  static_assert(kTileTokens <= 4);
  if (count == 1) run(Count<1>{});
  if (count == 2) run(Count<2>{});
  if constexpr (kTileTokens >= 3)
    if (count == 3) run(Count<3>{});
  if constexpr (kTileTokens >= 4)
    if (count == 4) run(Count<4>{});
}

// One half of a tile's results, rounded to T, by token and row.
template <typename T, int kTokens>
struct HalfResults {
  static constexpr int kRegisters = registers_for(kTokens * kHalfRows);
  T lanes[kRegisters * kLanes];
  T at(int token, int row) const {
    const int i = token * kHalfRows + row;
    return lanes[i / kLanes * kLanes + folded_lane(i % kLanes)];
  }
  // to[r - begin] = row r of one token for r in [begin, end). A tile whose rows are all wanted, as
  // nearly every tile's are, takes loops of constant length.
  void write(int token, int64_t begin, int64_t end, T* to) const {
    if (begin == 0 && end >= kHalfRows) {
#pragma GCC unroll 8
      for (int r = 0; r < kHalfRows; ++r) to[r] = at(token, r);
    } else {
      for (int64_t r = begin; r < end && r < kHalfRows; ++r)
        to[r - begin] = at(token, static_cast<int>(r));
    }
  }
};

// Asks for the first tile of a task, which no tile before it did.
template <typename T>
inline void prefetch_first_tile(const T* first, const T* second, int64_t k) {
  Ahead ahead = {reinterpret_cast<const char*>(first), reinterpret_cast<const char*>(second),
                 (kHalfRows * k * static_cast<int64_t>(sizeof(T)) + kLineBytes - 1) / kLineBytes};
  prefetch_step(ahead);
}

template <typename T>
void gate_up_task(const MoePass& pass, int64_t group, int64_t first_row, int64_t end_row) {
  const int64_t k = pass.hidden_size;
  const int64_t size = pass.expert_size;
  const int64_t begin_pair = pass.plan.first[group], end_pair = pass.plan.first[group + 1];
  const T* gate = static_cast<const T*>(pass.gate_up) + pass.plan.expert[group] * 2 * size * k;
  const T* up = gate + size * k;
  const T* input = static_cast<const T*>(pass.input);
  T* activations = static_cast<T*>(pass.activations);
  prefetch_first_tile(gate + first_row * k, up + first_row * k, k);

  for (int64_t block = begin_pair; block < end_pair; block += kTokensPerBlock) {
    const int64_t left = end_pair - block;
    const int64_t tokens = left < kTokensPerBlock ? left : kTokensPerBlock;
    const T* x[kTokensPerBlock];
    for (int64_t t = 0; t < tokens; ++t) x[t] = input + pass.plan.pair[block + t] / pass.top_k * k;

    for (int64_t row = first_row; row < end_row;) {
      const RowTile tile = row_tile(row, end_row, size, kHalfRows, k);
      // The rows after this tile, asked for while this one is computed. Beyond the first block of
      // tokens the weights are in the cache.
      Ahead ahead = {reinterpret_cast<const char*>(gate + tile.end * k),
                     reinterpret_cast<const char*>(up + tile.end * k), 0};
      if (block == begin_pair)
        ahead.lines = lines_per_step(kHalfRows * k * static_cast<int64_t>(sizeof(T)), tokens, k,
                                     Step<T>::kValues);
      for (int64_t t = 0; t < tokens; t += kTileTokens) {
        with_count(tokens - t < kTileTokens ? tokens - t : kTileTokens, [&](auto count) {
          constexpr int kTokens = decltype(count)::value;
          constexpr int kRegisters = registers_for(kTokens * kHalfRows);
          Floats gates[kRegisters], ups[kRegisters];
          dot_tile<T, kTokens>(x + t, gate + tile.start * k, up + tile.start * k, tile.stride, k,
                               ahead, gates, ups);
          HalfResults<T, kTokens> h;
#pragma GCC unroll 8
          for (int i = 0; i < kRegisters; ++i)
            store(h.lanes + i * kLanes, activate(gates[i], ups[i]));
#pragma GCC unroll 8
          for (int token = 0; token < kTokens; ++token)
            h.write(token, tile.begin - tile.start, tile.end - tile.start,
                    activations + (block + t + token) * size + tile.begin);
        });
      }
      row = tile.end;
    }
  }
}

template <typename T>
void down_task(const MoePass& pass, int64_t group, int64_t first_row, int64_t end_row) {
  const int64_t k = pass.expert_size;
  const int64_t hidden = pass.hidden_size;
  const int64_t begin_pair = pass.plan.first[group], end_pair = pass.plan.first[group + 1];
  const T* down = static_cast<const T*>(pass.down) + pass.plan.expert[group] * hidden * k;
  const T* activations = static_cast<const T*>(pass.activations);
  prefetch_first_tile(down + first_row * k, down + (first_row + kHalfRows) * k, k);

  for (int64_t block = begin_pair; block < end_pair; block += kTokensPerBlock) {
    const int64_t left = end_pair - block;
    const int64_t tokens = left < kTokensPerBlock ? left : kTokensPerBlock;
    const T* x[kTokensPerBlock];
    for (int64_t t = 0; t < tokens; ++t) x[t] = activations + (block + t) * k;

    for (int64_t row = first_row; row < end_row;) {
      const RowTile tile = row_tile(row, end_row, hidden, 2 * kHalfRows, k);
      const T* first = down + tile.start * k;
      const int64_t half = kHalfRows * tile.stride;
      const T* next = down + tile.end * k;
      Ahead ahead = {reinterpret_cast<const char*>(next),
                     reinterpret_cast<const char*>(next + half), 0};
      if (block == begin_pair)
        ahead.lines =
            lines_per_step(half * static_cast<int64_t>(sizeof(T)), tokens, k, Step<T>::kValues);
      for (int64_t t = 0; t < tokens; t += kTileTokens) {
        with_count(tokens - t < kTileTokens ? tokens - t : kTileTokens, [&](auto count) {
          constexpr int kTokens = decltype(count)::value;
          constexpr int kRegisters = registers_for(kTokens * kHalfRows);
          Floats sums[2][kRegisters];
          dot_tile<T, kTokens>(x + t, first, first + half, tile.stride, k, ahead, sums[0], sums[1]);
          HalfResults<float, kTokens> y[2];
#pragma GCC unroll 8
          for (int i = 0; i < kRegisters; ++i) {
            store(y[0].lanes + i * kLanes, sums[0][i]);
            store(y[1].lanes + i * kLanes, sums[1][i]);
          }
          const int64_t begin = tile.begin - tile.start, end = tile.end - tile.start;
          const int64_t second_begin = begin > kHalfRows ? begin : kHalfRows;
#pragma GCC unroll 8
          for (int token = 0; token < kTokens; ++token) {
            float* products =
                pass.products + pass.plan.pair[block + t + token] * hidden + tile.start;
            y[0].write(token, begin, end, products + begin);
            y[1].write(token, second_begin - kHalfRows, end - kHalfRows, products + second_begin);
          }
        });
      }
      row = tile.end;
    }
  }
}

// Slots in order, in fp32, rounded once.
template <typename T>
void combine_task(const MoePass& pass, int64_t token) {
  const int64_t hidden = pass.hidden_size;
  const int32_t* ids = pass.expert_ids + token * pass.top_k;
  const float* weights = pass.expert_weights + token * pass.top_k;
  const float* products = pass.products + token * pass.top_k * hidden;
  T* output = static_cast<T*>(pass.output) + token * hidden;
  for (int64_t column = 0; column < hidden; column += kLanes) {
    const int64_t left = hidden - column;
    Floats sum = {};
    for (int64_t slot = 0; slot < pass.top_k; ++slot) {
      if (ids[slot] < 0) continue;
      const float* y = products + slot * hidden + column;
      sum = fmadd(broadcast(weights[slot]), left >= kLanes ? load(y) : load_partial(y, left), sum);
    }
    if (left >= kLanes)
      store(output + column, sum);
    else
      store_partial(output + column, sum, left);
  }
}

}  // namespace
}  // namespace dgemma

// The table that a file named after its instruction set exports.
#define DGEMMA_MOE_KERNELS                                                   \
  {                                                                          \
      {gate_up_task<float>, down_task<float>, combine_task<float>},          \
      {gate_up_task<bfloat16>, down_task<bfloat16>, combine_task<bfloat16>}, \
  }
