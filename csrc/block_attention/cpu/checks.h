// Argument checks that the entry points of this family share. Each returns DGEMMA_OK or puts into
// cpu->message which field is wrong, what it got and what it wants.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <initializer_list>

#include "block_attention/operands.h"
#include "cpu/entry.h"
#include "dgemma/block_attention.h"

namespace dgemma {

// Positions are int32 in the interface.
constexpr int64_t kMaxPosition = INT32_MAX;
// Extents beyond this would overflow the products of extents below.
constexpr int64_t kMaxExtent = int64_t{1} << 31;

template <typename... Values>
dgemma_status invalid(dgemma_cpu* cpu, const char* format, Values... values) {
  return fail(cpu, DGEMMA_INVALID_ARGUMENT, format, values...);
}

inline dgemma_status check_extent(dgemma_cpu* cpu, const char* name, int64_t value,
                                  int64_t lowest) {
  if (value >= lowest && value <= kMaxExtent) return DGEMMA_OK;
  return invalid(cpu, "%s: got %lld, wants %lld .. %lld", name, static_cast<long long>(value),
                 static_cast<long long>(lowest), static_cast<long long>(kMaxExtent));
}

struct NamedExtent {
  const char* name;
  int64_t value;
  int64_t lowest;
};

inline dgemma_status check_extents(std::initializer_list<NamedExtent> extents, dgemma_cpu* cpu) {
  for (const auto& extent : extents)
    if (const auto status = check_extent(cpu, extent.name, extent.value, extent.lowest))
      return status;
  return DGEMMA_OK;
}

inline dgemma_status check_type(dgemma_dtype dtype, dgemma_cpu* cpu) {
  if (dtype == DGEMMA_FLOAT32 || dtype == DGEMMA_BFLOAT16) return DGEMMA_OK;
  std::snprintf(cpu->message, sizeof cpu->message,
                "dtype: got %d, wants DGEMMA_FLOAT32 or DGEMMA_BFLOAT16", static_cast<int>(dtype));
  return DGEMMA_UNSUPPORTED;
}

// Extents and data type of either operation on slots.
template <typename Operation>
dgemma_status check_extents(const Operation& op, dgemma_cpu* cpu) {
  const auto status = check_extents({{"batch", op.batch, 0},
                                     {"block_length", op.block_length, 0},
                                     {"key_heads", op.key_heads, 1},
                                     {"head_dim", op.head_dim, 1},
                                     {"slots", op.slots, 0},
                                     {"capacity", op.capacity, 0}},
                                    cpu);
  return status != DGEMMA_OK ? status : check_type(op.dtype, cpu);
}

// What attention has beside its keys.
template <typename Operation>
dgemma_status check_queries(const Operation& op, dgemma_cpu* cpu) {
  if (const auto status = check_extents({{"query_heads", op.query_heads, 1},
                                         {"window", op.window, 0},
                                         {"spans_per_request", op.spans_per_request, 0}},
                                        cpu))
    return status;
  if (op.query_heads % op.key_heads != 0)
    return invalid(cpu, "query_heads: got %lld, wants a multiple of key_heads %lld",
                   static_cast<long long>(op.query_heads), static_cast<long long>(op.key_heads));
  if (!std::isfinite(op.scale))
    return invalid(cpu, "scale: got %g, wants a finite number", op.scale);
  return DGEMMA_OK;
}

// The spans of request b.
template <typename Operation>
dgemma_status check_spans(const Operation& op, int64_t b, dgemma_cpu* cpu) {
  for (int64_t i = 0; op.spans != nullptr && i < op.spans_per_request; ++i) {
    const int32_t* span = op.spans + (b * op.spans_per_request + i) * 2;
    if (span[0] < 0 || span[1] < span[0])
      return invalid(cpu, "spans[%lld, %lld]: got [%d, %d), wants 0 <= start <= end",
                     static_cast<long long>(b), static_cast<long long>(i), span[0], span[1]);
  }
  return DGEMMA_OK;
}

// Its slots, prefixes and lengths.
template <typename Operation>
dgemma_status check_requests(const Operation& op, dgemma_cpu* cpu) {
  for (int64_t b = 0; b < op.batch; ++b) {
    const auto request = static_cast<long long>(b);
    if (op.slot[b] < -1 || op.slot[b] >= op.slots)
      return invalid(cpu, "slot[%lld]: got %d, wants -1 .. %lld", request, op.slot[b],
                     static_cast<long long>(op.slots) - 1);
    if (op.slot[b] < 0) continue;
    const int64_t rows = op.length != nullptr ? op.length[b] : op.block_length;
    if (rows < 0 || rows > op.block_length)
      return invalid(cpu, "length[%lld]: got %lld, wants 0 .. %lld", request,
                     static_cast<long long>(rows), static_cast<long long>(op.block_length));
    if (op.prefix_length[b] < 0 || op.prefix_length[b] + rows > kMaxPosition)
      return invalid(cpu, "prefix_length[%lld]: got %d, wants 0 .. %lld", request,
                     op.prefix_length[b], static_cast<long long>(kMaxPosition - rows));
  }
  return DGEMMA_OK;
}

}  // namespace dgemma
