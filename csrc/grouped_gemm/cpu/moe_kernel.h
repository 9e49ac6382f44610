// The three tasks of a pass: gate and up with the activation between, down, and the sum over slots.
// Compiled once per instruction set; see cpu/vector.h for what that forbids.
#pragma once

#include "grouped_gemm/cpu/activate.h"
#include "grouped_gemm/cpu/moe.h"
#include "grouped_gemm/cpu/plain_blocks.h"
#include "grouped_gemm/cpu/rows_kernel.h"

namespace dgemma {
namespace {

// activations[:, first_row : end_row] of one group; `gate` and `up` give its expert's weight rows.
template <typename T, typename Rows>
inline void gate_up_rows(const MoePass& pass, int64_t group, int64_t first_row, int64_t end_row,
                         Rows gate, Rows up) {
  const int64_t k = pass.hidden_size;
  const int64_t size = pass.expert_size;
  const int64_t begin_pair = pass.plan.first[group], end_pair = pass.plan.first[group + 1];
  const T* input = static_cast<const T*>(pass.input);
  T* activations = static_cast<T*>(pass.activations);
  prefetch_first_tile(gate, first_row, up, first_row);

  for (int64_t block = begin_pair; block < end_pair; block += kTokensPerBlock) {
    const int64_t left = end_pair - block;
    const int64_t tokens = left < kTokensPerBlock ? left : kTokensPerBlock;
    const T* x[kTokensPerBlock];
    for (int64_t t = 0; t < tokens; ++t) x[t] = input + pass.plan.pair[block + t] / pass.top_k * k;

    for (int64_t row = first_row; row < end_row;) {
      const RowTile tile = row_tile(row, end_row, size, kHalfRows);
      const HalfRows<T> gates_of = gate.take(tile.start, tile.repeat);
      const HalfRows<T> ups_of = up.take(tile.start, tile.repeat);
      // The rows after this tile are prefetched while this one is computed. Beyond the first block
      // of tokens the weights are in the cache.
      const RowTile next = row_tile(tile.end, end_row, size, kHalfRows);
      const int64_t steps = count_steps<T>(tokens, k);
      const int64_t lines =
          block == begin_pair ? lines_per_step(kHalfRows * gate.row_bytes(), steps) : 0;
      Prefetcher prefetcher = {gate.stored(next.start), up.stored(next.start), lines};
      for (int64_t t = 0; t < tokens; t += kTileTokens) {
        with_count(tokens - t < kTileTokens ? tokens - t : kTileTokens, [&](auto count) {
          constexpr int kTokens = decltype(count)::value;
          constexpr int kRegisters = registers_for(kTokens * kHalfRows);
          Floats gates[kRegisters], ups[kRegisters];
          dot_tile<T, kTokens>(x + t, gates_of.rows, ups_of.rows, gates_of.stride, k, prefetcher,
                               gates, ups);
          gate.multiply_row_scales(gates, kRegisters);
          up.multiply_row_scales(ups, kRegisters);
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
void gate_up_task(const MoePass& pass, int64_t group, int64_t first_row, int64_t end_row) {
  const int64_t k = pass.hidden_size;
  const int64_t size = pass.expert_size;
  const T* gate = static_cast<const T*>(pass.gate_up) + pass.plan.expert[group] * 2 * size * k;
#if defined(__AVX512BF16__)
  if constexpr (sizeof(T) == sizeof(bfloat16))
    if (takes_blocks<T>(size, k) && k <= PlainBlockRows::kMostColumns) {
      void* const scratch = DGEMMA_PACKED_SCRATCH(k);
      return gate_up_blocks<T>(pass, group, first_row, end_row, PlainBlockRows(gate, k, scratch),
                               PlainBlockRows(gate + size * k, k, scratch), rows_of(pass.input, k));
    }
#endif
  gate_up_rows<T>(pass, group, first_row, end_row, PlainRows<T>{gate, k},
                  PlainRows<T>{gate + size * k, k});
}

// products[..., first_row : end_row] of one group's pairs; `first` and `second` give its expert's
// rows of down.
template <typename T, typename Rows>
inline void down_rows(const MoePass& pass, int64_t group, int64_t first_row, int64_t end_row,
                      const Rows& first, const Rows& second) {
  const int64_t k = pass.expert_size;
  const int64_t hidden = pass.hidden_size;
  const int64_t begin_pair = pass.plan.first[group], end_pair = pass.plan.first[group + 1];
  const T* activations = static_cast<const T*>(pass.activations);
  prefetch_first_tile(first, first_row, second, first_row + kHalfRows);

  for (int64_t block = begin_pair; block < end_pair; block += kTokensPerBlock) {
    const int64_t left = end_pair - block;
    const int64_t tokens = left < kTokensPerBlock ? left : kTokensPerBlock;
    const T* x[kTokensPerBlock];
    for (int64_t t = 0; t < tokens; ++t) x[t] = activations + (block + t) * k;
    multiply_rows<T, float>(
        x, tokens, first, second, hidden, k, first_row, end_row, block == begin_pair,
        [&](int64_t t) { return pass.products + pass.plan.pair[block + t] * hidden; });
  }
}

template <typename T>
void down_task(const MoePass& pass, int64_t group, int64_t first_row, int64_t end_row) {
  const int64_t k = pass.expert_size;
  const T* down = static_cast<const T*>(pass.down) + pass.plan.expert[group] * pass.hidden_size * k;
#if defined(__AVX512BF16__)
  if constexpr (sizeof(T) == sizeof(bfloat16))
    if (takes_blocks<T>(pass.hidden_size, k) && k <= PlainBlockRows::kMostColumns)
      return down_blocks(pass, group, first_row, end_row,
                         PlainBlockRows(down, k, DGEMMA_PACKED_SCRATCH(k)),
                         rows_of(pass.activations, k));
#endif
  const PlainRows<T> rows{down, k};
  down_rows<T>(pass, group, first_row, end_row, rows, rows);
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
