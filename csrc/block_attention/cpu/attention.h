// The interface between the C entry points (cpu/attention.cpp, cpu/paged_attention.cpp) and the
// kernels, which are compiled once per instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/variants.h"
#include "dgemma/block_attention.h"

namespace dgemma {

// Keys per step of the online softmax, and rows (query positions x grouped heads) per work tile.
// Rearranging a tile of keys and values costs as much as a dozen rows of products, which many rows
// share; LOG.md has the sizes that were tried.
constexpr int64_t kKeyTile = 128;
constexpr int64_t kWorkTileRows = 256;

// Where the keys, or the values, of all requests lie: in slots and the block behind them, or in
// pages. Strides are of elements.
struct KeyStorage {
  const void* stored;  // slots, or pages
  const void* block;   // null with pages
  int64_t page_stride;
  int64_t row_stride;
  int64_t head_stride;
};

// A call of either form of the operation.
struct AttentionCall {
  // One of its requests.
  struct Request {
    bool causal;
    int64_t rows;          // 0: it is skipped
    int64_t first_row;     // of query, of output and of a block
    int64_t prefix;        // positions in front of its rows
    int64_t first_stored;  // the first position that is stored
    int64_t slot;
    const int32_t* page_table;  // its row of it
    const int32_t* spans;
    int64_t span_count;
  };

  int64_t requests;
  int64_t query_heads;
  int64_t key_heads;
  int64_t head_dim;
  int64_t page_size;  // 0: the keys are in slots
  int64_t capacity;   // of a slot
  int64_t window;
  float scale;
  const void* query;
  void* output;
  KeyStorage keys;
  KeyStorage values;
};

// A work tile: consecutive rows of one request that read the same key head. Row r is query
// position r / group, query head key_head * group + r % group.
struct AttentionWorkTile {
  AttentionCall::Request request;
  int64_t key_head;
  int64_t first_row;
  int64_t rows;
};

// Memory that one work tile works in. Every array is 64-byte aligned and large enough for any
// variant.
struct AttentionScratch {
  void* query;         // the work tile's queries
  void* panels;        // the keys, then the values, of one tile, rearranged for the products
  float* scores;       // [kWorkTileRows, kKeyTile]
  float* accumulator;  // [kWorkTileRows, padded head_dim]
  float* row_state;    // [3, kWorkTileRows]: maximum, sum, factor
  int64_t* ranges;     // [2, kWorkTileRows]: first and end of the positions a row sees
};

struct AttentionKernels {
  // Computes one work tile and writes its rows of the output.
  void (*attend_float32)(const AttentionCall& call, const AttentionWorkTile& work_tile,
                         const AttentionScratch& scratch);
  void (*attend_bfloat16)(const AttentionCall& call, const AttentionWorkTile& work_tile,
                          const AttentionScratch& scratch);
};

DGEMMA_DECLARE_PER_VARIANT(AttentionKernels attention_kernels)

// head_dim rounded up so that every panel of every variant is whole (the widest has 64 columns).
constexpr int64_t padded_head_dim(int64_t head_dim) { return (head_dim + 63) / 64 * 64; }

}  // namespace dgemma
