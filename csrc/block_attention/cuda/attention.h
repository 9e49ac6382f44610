// The CUDA kernels of this family share their arguments, the rule for which keys a query sees, and
// the declarations of their launches.
#pragma once

#include "block_attention/cuda/plan.h"
#include "block_attention/cuda/splits.h"
#include "common/ceil_divide.h"
#include "device/bfloat16.h"

namespace dgemma {

// Pointers are to the device's memory; see dgemma_block_attention.
struct Attention {
  const device::bfloat16 *query, *key, *value, *prefix_key, *prefix_value;
  const int32_t *slot, *prefix_length, *length, *spans;
  device::bfloat16* output;
  float *partial, *sums;
  int64_t partial_tiles;
  int32_t block_length, query_heads, key_heads, slots, capacity, window, spans_per_request;
  int32_t head_dim, rows, most_splits, blocks_wanted;
  float scale;
  bool causal;
};

inline Attention make_attention(const dgemma_block_attention& op, const AttentionPlan& plan,
                                bool causal) {
  const auto values = [](const void* p) { return static_cast<const device::bfloat16*>(p); };
  char* const base = static_cast<char*>(op.workspace);
  return {.query = values(op.query),
          .key = values(op.key),
          .value = values(op.value),
          .prefix_key = values(op.prefix_key),
          .prefix_value = values(op.prefix_value),
          .slot = op.slot,
          .prefix_length = op.prefix_length,
          .length = op.length,
          .spans = op.spans,
          .output = static_cast<device::bfloat16*>(op.output),
          .partial = reinterpret_cast<float*>(base + plan.partial),
          .sums = reinterpret_cast<float*>(base + plan.sums),
          .partial_tiles = plan.partial_tiles,
          .block_length = static_cast<int32_t>(op.block_length),
          .query_heads = static_cast<int32_t>(op.query_heads),
          .key_heads = static_cast<int32_t>(op.key_heads),
          .slots = static_cast<int32_t>(op.slots),
          .capacity = static_cast<int32_t>(op.capacity),
          .window = static_cast<int32_t>(op.window),
          .spans_per_request = op.spans != nullptr ? static_cast<int32_t>(op.spans_per_request) : 0,
          .head_dim = static_cast<int32_t>(op.head_dim),
          .rows = plan.rows,
          .most_splits = plan.splits,
          .blocks_wanted = plan.blocks_wanted,
          .scale = op.scale,
          .causal = causal};
}

// Each enqueues one kernel on `stream`, a cudaStream_t, and returns null or the error's text.
const char* launch_attention_sm80_bf16(const AttentionPlan& plan, const Attention& attention,
                                       int32_t batch, void* stream);
const char* launch_attention_256_sm90_bf16(const AttentionPlan& plan, const Attention& attention,
                                           int32_t batch, void* stream);
const char* launch_attention_512_sm90_bf16(const AttentionPlan& plan, const Attention& attention,
                                           int32_t batch, void* stream);
const char* launch_combine_splits(const AttentionPlan& plan, const Attention& attention,
                                  int32_t batch, void* stream);
const char* launch_append_to_cache(const dgemma_append_to_cache& op, void* stream);

// A request as its kernels see it; rows is 0 where it is skipped.
struct AttentionRequest {
  int32_t slot, prefix, rows;
  int32_t row_tiles, splits;
};

DGEMMA_DEVICE int32_t first_in_window(const Attention& p, int32_t position) {
  return p.window > 0 ? max(0, position - (p.window - 1)) : 0;
}

DGEMMA_DEVICE AttentionRequest find_request(const Attention& p, int32_t index) {
  // All three are loaded before any is used: one wait for memory.
  const int32_t slot = p.slot[index], prefix = p.prefix_length[index];
  const int32_t length = p.length != nullptr ? p.length[index] : p.block_length;
  AttentionRequest request = {};
  request.slot = slot;
  if (slot < 0 || slot >= p.slots) return request;
  request.prefix = prefix;
  request.rows = min(length, p.block_length);
  const int32_t packed = request.rows * (p.query_heads / p.key_heads);
  request.row_tiles = ceil_divide(packed, p.rows);
  if (request.row_tiles > 0)
    request.splits =
        attention_splits(p.blocks_wanted, request.row_tiles * p.key_heads,
                         request.prefix - first_in_window(p, request.prefix) + request.rows);
  return request;
}

// The positions first .. end - 1 that the query at row `row` of the block sees. Every span that
// holds the query also holds its position, as the window does, so their union has no gap.
struct VisibleKeys {
  int32_t first, end;
};

DGEMMA_DEVICE VisibleKeys visible_keys(const Attention& p, const AttentionRequest& request,
                                       int32_t index, int32_t row) {
  const int32_t block_end = request.prefix + request.rows;
  if (!p.causal) return {first_in_window(p, request.prefix), block_end};
  const int32_t position = request.prefix + row;
  VisibleKeys keys = {first_in_window(p, position), position + 1};
  const int32_t first_stored = max(0, request.prefix - p.capacity);
  const int32_t* const spans = p.spans + static_cast<int64_t>(index) * p.spans_per_request * 2;
  for (int32_t i = 0; i < p.spans_per_request; ++i) {
    const int32_t start = spans[2 * i], end = spans[2 * i + 1];
    if (position < start || position >= end) continue;
    keys.first = min(keys.first, max(start, first_stored));
    keys.end = max(keys.end, min(end, block_end));
  }
  return keys;
}

}  // namespace dgemma
