// The positions that a query sees are always one contiguous range.
#pragma once

#include <cstdint>

#include "dgemma/block_attention.h"

namespace dgemma {
namespace {

// Positions first .. end - 1.
struct PositionRange {
  int64_t first;
  int64_t end;
};

inline int64_t block_rows(const dgemma_block_attention& op, int64_t request) {
  return op.length != nullptr ? op.length[request] : op.block_length;
}

// The prefix positions that fit in the window beside one later position: the last window - 1.
inline int64_t first_in_window(const dgemma_block_attention& op, int64_t position) {
  const int64_t first = op.window > 0 ? position - (op.window - 1) : 0;
  return first > 0 ? first : 0;
}

// Gives the positions that the query at row `row` of a request's block sees. Every span that holds
// the query also holds its position, as the window does, so their union has no gap.
inline PositionRange visible_keys(const dgemma_block_attention& op, bool causal, int64_t request,
                                  int64_t row) {
  const int64_t prefix = op.prefix_length[request];
  const int64_t block_end = prefix + block_rows(op, request);
  if (!causal) return {first_in_window(op, prefix), block_end};

  const int64_t position = prefix + row;
  PositionRange range = {first_in_window(op, position), position + 1};
  if (op.spans == nullptr) return range;
  const int64_t first_stored = prefix > op.capacity ? prefix - op.capacity : 0;
  const int32_t* spans = op.spans + request * op.spans_per_request * 2;
  for (int64_t i = 0; i < op.spans_per_request; ++i) {
    const int64_t start = spans[2 * i];
    const int64_t end = spans[2 * i + 1];
    if (position < start || position >= end) continue;
    const int64_t first = start > first_stored ? start : first_stored;
    const int64_t last_end = end < block_end ? end : block_end;
    if (first < range.first) range.first = first;
    if (last_end > range.end) range.end = last_end;
  }
  return range;
}

}  // namespace
}  // namespace dgemma
