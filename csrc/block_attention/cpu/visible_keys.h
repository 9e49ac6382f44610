// The positions that a query sees are always one contiguous range.
#pragma once

#include <cstdint>

#include "block_attention/cpu/attention.h"

namespace dgemma {
namespace {

// Positions first .. end - 1.
struct PositionRange {
  int64_t first;
  int64_t end;
};

// The prefix positions that fit in the window beside one later position: the last window - 1.
inline int64_t first_in_window(int64_t window, int64_t position) {
  const int64_t first = window > 0 ? position - (window - 1) : 0;
  return first > 0 ? first : 0;
}

// Gives the positions that the query at row `row` of a request sees. Every span that holds the
// query also holds its position, as the window does, so their union has no gap.
inline PositionRange visible_keys(int64_t window, const AttentionCall::Request& request,
                                  int64_t row) {
  const int64_t block_end = request.prefix + request.rows;
  if (!request.causal) return {first_in_window(window, request.prefix), block_end};

  const int64_t position = request.prefix + row;
  PositionRange range = {first_in_window(window, position), position + 1};
  for (int64_t i = 0; i < request.span_count; ++i) {
    const int64_t start = request.spans[2 * i];
    const int64_t end = request.spans[2 * i + 1];
    if (position < start || position >= end) continue;
    const int64_t first = start > request.first_stored ? start : request.first_stored;
    const int64_t last_end = end < block_end ? end : block_end;
    if (first < range.first) range.first = first;
    if (last_end > range.end) range.end = last_end;
  }
  return range;
}

}  // namespace
}  // namespace dgemma
