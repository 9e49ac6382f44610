// What runs beside the products of a tile: its successor's rows, asked for and decoded. Compiled
// once per instruction set; see cpu/vector.h for what that forbids.
//
// Decoding a tile's rows before its products cost a quarter of their time; some columns at every
// step cost a tenth, in units that the products leave idle.
#pragma once

#include "grouped_gemm/cpu_weight_rows.h"

namespace dgemma {
namespace {

struct NothingAhead {
  void step() {}
};

// Decodes kRuns runs at every step: of one half of the next tile, then of the other. Small, so that
// the loop of a tile keeps a copy in registers.
template <typename Making, int kRuns, int64_t kRunBytes>
class DecodeAhead {
 public:
  DecodeAhead(Making& first, Making& second)
      : half_(first.left() > 0 ? &first : &second),
        next_(first.left() > 0 ? &second : nullptr),
        now_(*half_) {}

  __attribute__((always_inline)) void step() {
    if (__builtin_expect(now_.left() < kRuns, 0)) {
      if (next_ == nullptr) return;
      end();
      half_ = next_;
      next_ = nullptr;
      now_ = *half_;
      if (now_.left() < kRuns) return;
    }
    // So far ahead that memory is quicker, rows of a tile farther than its half.
    constexpr int64_t kDistance = 4096;
    __builtin_prefetch(now_.codes + now_.run * kRunBytes + kDistance, 0, 2);
#pragma GCC unroll 4
    for (int i = 0; i < kRuns; ++i) now_.decode_beside(now_.run + i);
    now_.run += kRuns;
  }
  // The rest of a half is decoded when its rows are taken.
  void end() { half_->run = now_.run; }

 private:
  Making* half_;
  Making* next_;
  Making now_;
};

template <typename Rows>
class WorkAhead {
 public:
  typename Rows::Making first, second;

  // Rows that are not decoded beside the products are asked for, so many cache lines a step.
  void ask(const char* first_row, const char* second_row, int64_t lines) {
    ahead_ = {first_row, second_row, lines};
  }
  // The steps of full tiles, kTileTokens tokens each, that `first` and `second` are made in.
  void within(int64_t steps) {
    steps_ = steps;
    beside_ = steps > 0;
  }

  // Calls products(work) for a tile of kTokens and so many steps, with what they are to do.
  template <int kTokens, typename Products>
  __attribute__((always_inline)) void beside(int64_t steps, Products products) {
    if constexpr (!Rows::kDecoded) {
      products(ahead_);
    } else {
      if constexpr (Rows::kInSteps && kTokens == kTileTokens) {
        // As many runs a step as make all rows ready by the last one; fewer tokens than a tile's
        // leave no time for it.
        const int64_t left = first.left() + second.left(), steps_left = steps_;
        steps_ -= steps;
        if (left > 2 * steps_left) return decode_beside<3>(products);
        if (left > steps_left) return decode_beside<2>(products);
        if (left > 0) return decode_beside<1>(products);
      }
      // Too few tokens for a full tile: rows are decoded when they are taken, and asked for here.
      if (!Rows::kInSteps || !beside_) return products(ahead_);
      NothingAhead nothing;
      products(nothing);
    }
  }

 private:
  template <int kRuns, typename Products>
  __attribute__((always_inline)) void decode_beside(Products products) {
    DecodeAhead<typename Rows::Making, kRuns, Rows::kRunBytes> work(first, second);
    products(work);
    work.end();
  }

  Ahead ahead_ = {};
  int64_t steps_ = 0;
  bool beside_ = false;
};

// Asks for the first tile of a task, which no tile before it did.
template <typename Rows>
inline void prefetch_first_tile(const Rows& first, int64_t first_row, const Rows& second,
                                int64_t second_row) {
  Ahead ahead = {first.stored(first_row), second.stored(second_row),
                 (kHalfRows * first.row_bytes() + kLineBytes - 1) / kLineBytes};
  ahead.step();
}

}  // namespace
}  // namespace dgemma
