// The CUDA kernels of this family share their arguments, the rule for which keys a query sees, and
// the declarations of their launches.
#pragma once

#include "block_attention/cuda/plan.h"
#include "block_attention/cuda/splits.h"
#include "common/ceil_divide.h"
#include "device/bfloat16.h"

namespace dgemma {

// Keys or values in memory: pages of a pool, or (without a page table) slots and the block behind
// them. Strides are of elements.
struct KeyStorage {
  const device::bfloat16 *stored, *block;
  int64_t page_stride, row_stride, head_stride;
};

// Pointers are to the device's memory; see dgemma_block_attention and dgemma_paged_attention.
struct Attention {
  const device::bfloat16* query;
  KeyStorage keys, values;
  const int32_t *slot, *prefix_length, *length, *spans;
  // Of the paged form, where page_table is not null.
  const int32_t *page_table, *query_start, *sequence_length, *causal_flags;
  device::bfloat16* output;
  float *partial, *sums;
  int64_t partial_tiles;
  int32_t block_length, query_heads, key_heads, slots, capacity, window, spans_per_request;
  int32_t tokens, pages, page_size, pages_per_request;
  int32_t head_dim, rows, most_splits, blocks_wanted;
  float scale;
  bool causal;
};

// What both forms have.
template <typename Operation>
Attention make_common(const Operation& op, const AttentionPlan& plan) {
  char* const base = static_cast<char*>(op.workspace);
  Attention p = {};
  p.query = static_cast<const device::bfloat16*>(op.query);
  p.spans = op.spans;
  p.output = static_cast<device::bfloat16*>(op.output);
  p.partial = reinterpret_cast<float*>(base + plan.partial);
  p.sums = reinterpret_cast<float*>(base + plan.sums);
  p.partial_tiles = plan.partial_tiles;
  p.query_heads = static_cast<int32_t>(op.query_heads);
  p.key_heads = static_cast<int32_t>(op.key_heads);
  p.window = static_cast<int32_t>(op.window);
  p.spans_per_request = op.spans != nullptr ? static_cast<int32_t>(op.spans_per_request) : 0;
  p.head_dim = static_cast<int32_t>(op.head_dim);
  p.rows = plan.rows;
  p.most_splits = plan.splits;
  p.blocks_wanted = plan.blocks_wanted;
  p.scale = op.scale;
  return p;
}

inline Attention make_attention(const dgemma_block_attention& op, const AttentionPlan& plan,
                                bool causal) {
  const auto storage = [&](const void* stored, const void* block) {
    return KeyStorage{.stored = static_cast<const device::bfloat16*>(stored),
                      .block = static_cast<const device::bfloat16*>(block),
                      .page_stride = 0,
                      .row_stride = op.key_heads * op.head_dim,
                      .head_stride = op.head_dim};
  };
  Attention p = make_common(op, plan);
  p.keys = storage(op.prefix_key, op.key);
  p.values = storage(op.prefix_value, op.value);
  p.slot = op.slot;
  p.prefix_length = op.prefix_length;
  p.length = op.length;
  p.block_length = static_cast<int32_t>(op.block_length);
  p.slots = static_cast<int32_t>(op.slots);
  p.capacity = static_cast<int32_t>(op.capacity);
  p.causal = causal;
  return p;
}

inline Attention make_attention(const dgemma_paged_attention& op, const AttentionPlan& plan) {
  Attention p = make_common(op, plan);
  p.keys = {.stored = static_cast<const device::bfloat16*>(op.key_pages),
            .block = nullptr,
            .page_stride = op.key_page_stride,
            .row_stride = op.key_row_stride,
            .head_stride = op.key_head_stride};
  p.values = {.stored = static_cast<const device::bfloat16*>(op.value_pages),
              .block = nullptr,
              .page_stride = op.value_page_stride,
              .row_stride = op.value_row_stride,
              .head_stride = op.value_head_stride};
  p.page_table = op.page_table;
  p.query_start = op.query_start;
  p.sequence_length = op.sequence_length;
  p.causal_flags = op.causal;
  p.block_length = static_cast<int32_t>(op.max_query_length);
  p.tokens = static_cast<int32_t>(op.tokens);
  p.pages = static_cast<int32_t>(op.pages);
  p.page_size = static_cast<int32_t>(op.page_size);
  p.pages_per_request = static_cast<int32_t>(op.pages_per_request);
  return p;
}

// Each enqueues one kernel on `stream`, a cudaStream_t, and returns null or the error's text.
const char* launch_attention_sm80_bf16(const AttentionPlan& plan, const Attention& attention,
                                       int32_t batch, void* stream);
const char* launch_paged_attention_sm80_bf16(const AttentionPlan& plan, const Attention& attention,
                                             int32_t batch, void* stream);
const char* launch_attention_256_sm90_bf16(const AttentionPlan& plan, const Attention& attention,
                                           int32_t batch, void* stream);
const char* launch_attention_512_sm90_bf16(const AttentionPlan& plan, const Attention& attention,
                                           int32_t batch, void* stream);
const char* launch_combine_splits(const AttentionPlan& plan, const Attention& attention,
                                  int32_t batch, void* stream);
const char* launch_append_to_cache(const dgemma_append_to_cache& op, void* stream);
const char* launch_append_to_pages(const dgemma_append_to_pages& op, void* stream);

// A request as its kernels see it; rows is 0 where it is skipped.
struct AttentionRequest {
  int32_t slot, prefix, rows;
  bool causal;
  int32_t row_tiles, splits;
};

DGEMMA_DEVICE int32_t first_in_window(const Attention& p, int32_t position) {
  return p.window > 0 ? max(0, position - (p.window - 1)) : 0;
}

DGEMMA_DEVICE void find_request_in_slots(const Attention& p, int32_t index,
                                         AttentionRequest& request) {
  // All three are loaded before any is used: one wait for memory.
  const int32_t slot = p.slot[index], prefix = p.prefix_length[index];
  const int32_t length = p.length != nullptr ? p.length[index] : p.block_length;
  request.slot = slot;
  if (slot < 0 || slot >= p.slots) return;
  request.prefix = prefix;
  request.rows = min(length, p.block_length);
  request.causal = p.causal;
}

DGEMMA_DEVICE void find_request_in_pages(const Attention& p, int32_t index,
                                         AttentionRequest& request) {
  const int32_t first = p.query_start[index], end = p.query_start[index + 1];
  const int32_t length = p.sequence_length[index], causal = p.causal_flags[index];
  const int64_t stored = static_cast<int64_t>(p.pages_per_request) * p.page_size;
  if (first < 0 || end < first || end > p.tokens || length < end - first || length > stored) return;
  request.prefix = length - (end - first);
  request.rows = min(end - first, p.block_length);
  request.causal = causal != 0;
}

DGEMMA_DEVICE AttentionRequest find_request(const Attention& p, int32_t index) {
  AttentionRequest request = {};
  if (p.page_table != nullptr)
    find_request_in_pages(p, index, request);
  else
    find_request_in_slots(p, index, request);
  const int32_t packed = request.rows * (p.query_heads / p.key_heads);
  request.row_tiles = ceil_divide(packed, p.rows);
  if (request.row_tiles > 0)
    request.splits =
        attention_splits(p.blocks_wanted, request.row_tiles * p.key_heads,
                         request.prefix - first_in_window(p, request.prefix) + request.rows);
  return request;
}

// The request's first row in query, output and block, in which the rows of all requests are one
// list. Found where it is used: kept from the beginning it would cost registers that spill.
DGEMMA_DEVICE int64_t first_row_of(const Attention& p, int32_t index) {
  return p.page_table != nullptr ? p.query_start[index]
                                 : static_cast<int64_t>(index) * p.block_length;
}

// The first element of a position of the prefix in its slot, of key head 0.
DGEMMA_DEVICE int64_t element_in_slot(const Attention& p, const KeyStorage& storage,
                                      const AttentionRequest& request, int32_t position) {
  return (static_cast<int64_t>(request.slot) * p.capacity + position % p.capacity) *
         storage.row_stride;
}

// The same in the pages, which hold all positions; -1 for a page that does not exist.
DGEMMA_DEVICE int64_t element_in_page(const Attention& p, const KeyStorage& storage, int32_t index,
                                      int32_t position) {
  const int32_t column = position / p.page_size;
  const int32_t page = p.page_table[static_cast<int64_t>(index) * p.pages_per_request + column];
  if (page < 0 || page >= p.pages) return -1;
  return page * storage.page_stride + (position - column * p.page_size) * storage.row_stride;
}

// The positions first .. end - 1 that the query at row `row` of the block sees. Every span that
// holds the query also holds its position, as the window does, so their union has no gap.
struct VisibleKeys {
  int32_t first, end;
};

DGEMMA_DEVICE VisibleKeys visible_keys(const Attention& p, const AttentionRequest& request,
                                       int32_t index, int32_t row) {
  const int32_t block_end = request.prefix + request.rows;
  if (!request.causal) return {first_in_window(p, request.prefix), block_end};
  const int32_t position = request.prefix + row;
  VisibleKeys keys = {first_in_window(p, position), position + 1};
  // Pages hold all.
  const int32_t first_stored = p.page_table != nullptr ? 0 : max(0, request.prefix - p.capacity);
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
