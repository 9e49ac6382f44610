/* Attention of a block of new positions over a cached prefix and over the block itself. */
#ifndef DGEMMA_BLOCK_ATTENTION_H_
#define DGEMMA_BLOCK_ATTENTION_H_

#include "dgemma/base.h"

#ifdef __cplusplus
extern "C" {
#endif

/* The block of request b covers positions P .. P + n - 1, where P = prefix_length[b] and n =
 * length[b]. Position p < P of the prefix lies in row p % capacity of the request's cache slot, so
 * one layout serves a full layer (capacity >= context) and a ring of the last capacity positions.
 *
 *   canvas:  every query sees the same keys: the last window - 1 prefix positions (all of them when
 *            window is 0) and the whole block.
 *   causal:  query q sees positions max(0, q - window + 1) .. q. A query inside a span [start, end)
 *            of absolute positions also sees the rest of that span, as far as it is in the cache or
 *            in the block.
 *
 * Softmax and sums in fp32. Rows of the cache that no query may see are never read. Output rows
 * at and after length[b] are not written. A request's result does not depend on the others.
 */
typedef struct dgemma_block_attention {
  int64_t batch;
  int64_t block_length; /* rows per request in query, key, value and output */
  int64_t query_heads;
  int64_t key_heads; /* divides query_heads; query head h reads key head h / (query_heads /
                        key_heads) */
  int64_t head_dim;
  int64_t slots;
  int64_t capacity;
  int64_t window; /* 0: no window */
  float scale;    /* of the scores; 1 for this model, whose queries and keys are normalised */
  dgemma_dtype dtype;
  const void* query;            /* [batch, block_length, query_heads, head_dim] */
  const void* key;              /* [batch, block_length, key_heads, head_dim] */
  const void* value;            /* the same */
  const void* prefix_key;       /* [slots, capacity, key_heads, head_dim] */
  const void* prefix_value;     /* the same */
  const int32_t* slot;          /* [batch]; -1: the request is skipped */
  const int32_t* prefix_length; /* [batch] */
  const int32_t* length;        /* [batch], or NULL: block_length for all */
  const int32_t* spans; /* causal only: [batch, spans_per_request, 2] as [start, end), or NULL */
  int64_t spans_per_request;
  void* output; /* [batch, block_length, query_heads, head_dim] */
  void* workspace;
  size_t workspace_bytes;
} dgemma_block_attention;

DGEMMA_API size_t dgemma_cpu_block_attention_workspace(const dgemma_block_attention* op);
DGEMMA_API dgemma_status dgemma_cpu_canvas_attention(const dgemma_block_attention* op,
                                                     dgemma_cpu* cpu);
DGEMMA_API dgemma_status dgemma_cpu_causal_attention(const dgemma_block_attention* op,
                                                     dgemma_cpu* cpu);

/* Stores the block's keys and values at rows (P + i) % capacity of their slots; of a block longer
 * than the capacity only the last capacity rows. prefix_length itself is the caller's to advance.
 */
typedef struct dgemma_append_to_cache {
  int64_t batch;
  int64_t block_length;
  int64_t key_heads;
  int64_t head_dim;
  int64_t slots;
  int64_t capacity;
  dgemma_dtype dtype;
  const void* key;   /* [batch, block_length, key_heads, head_dim] */
  const void* value; /* the same */
  void* prefix_key;  /* [slots, capacity, key_heads, head_dim] */
  void* prefix_value;
  const int32_t* slot;          /* [batch]; -1: the request is skipped */
  const int32_t* prefix_length; /* [batch] */
  const int32_t* length;        /* [batch], or NULL: block_length for all */
} dgemma_append_to_cache;

DGEMMA_API dgemma_status dgemma_cpu_append_to_cache(const dgemma_append_to_cache* op,
                                                    dgemma_cpu* cpu);

/* The same attention over pages, as engines with a block table keep their cache: keys and values of
 * all positions, the block's too, lie in pages of a pool, and requests that encode and requests
 * with a canvas may be in one call.
 *
 * Request b has rows query_start[b] .. query_start[b + 1] - 1 of query and output, its last
 * positions of sequence_length[b]. With n rows, P = sequence_length[b] - n is its prefix, and what
 * its queries see is said above: canvas where causal[b] is 0, else causal. Position p lies in row
 * p % page_size of page page_table[b, p / page_size]; that row, of key head h, begins
 * page * page_stride + row * row_stride + h * head_stride elements after key_pages, and its
 * head_dim elements are contiguous; value_pages likewise, with its strides.
 *
 * Entries of the page table for positions that no query sees are never read, nor are the pages'
 * rows. Output rows of no request are not written. A request's result depends neither on the others
 * nor on where its pages are, and has the bits of the contiguous form's.
 */
typedef struct dgemma_paged_attention {
  int64_t requests;
  int64_t tokens;           /* rows of query and output */
  int64_t max_query_length; /* at least the rows of the request that has most */
  int64_t query_heads;
  int64_t key_heads; /* divides query_heads */
  int64_t head_dim;
  int64_t pages;             /* of the pool */
  int64_t page_size;         /* positions of a page */
  int64_t pages_per_request; /* columns of the page table */
  int64_t key_page_stride;
  int64_t key_row_stride;
  int64_t key_head_stride;
  int64_t value_page_stride;
  int64_t value_row_stride;
  int64_t value_head_stride;
  int64_t window; /* 0: no window */
  float scale;    /* of the scores */
  dgemma_dtype dtype;
  const void* query;              /* [tokens, query_heads, head_dim] */
  const void* key_pages;          /* [pages, page_size, key_heads, head_dim], with strides */
  const void* value_pages;        /* the same */
  const int32_t* page_table;      /* [requests, pages_per_request] */
  const int32_t* query_start;     /* [requests + 1], never less than the one before */
  const int32_t* sequence_length; /* [requests] */
  const int32_t* causal;          /* [requests]; 0: a canvas */
  const int32_t* spans; /* of causal requests: [requests, spans_per_request, 2], or NULL */
  int64_t spans_per_request;
  void* output; /* [tokens, query_heads, head_dim] */
  void* workspace;
  size_t workspace_bytes;
} dgemma_paged_attention;

DGEMMA_API size_t dgemma_cpu_paged_attention_workspace(const dgemma_paged_attention* op);
DGEMMA_API dgemma_status dgemma_cpu_paged_attention(const dgemma_paged_attention* op,
                                                    dgemma_cpu* cpu);

/* Stores keys and values of rows in pages: row i in row slot[i] % page_size of page slot[i] /
 * page_size, and nowhere where slot[i] is negative. No two rows may have one slot. Rows of pages
 * may not overlap; key_pages and value_pages may take turns in memory. */
typedef struct dgemma_append_to_pages {
  int64_t tokens;
  int64_t key_heads;
  int64_t head_dim;
  int64_t pages;
  int64_t page_size;
  int64_t key_page_stride;
  int64_t key_row_stride;
  int64_t key_head_stride;
  int64_t value_page_stride;
  int64_t value_row_stride;
  int64_t value_head_stride;
  dgemma_dtype dtype;
  const void* key;     /* [tokens, key_heads, head_dim] */
  const void* value;   /* the same */
  void* key_pages;     /* [pages, page_size, key_heads, head_dim], with strides */
  void* value_pages;   /* the same */
  const int64_t* slot; /* [tokens] */
} dgemma_append_to_pages;

DGEMMA_API dgemma_status dgemma_cpu_append_to_pages(const dgemma_append_to_pages* op,
                                                    dgemma_cpu* cpu);

/* The same on a GPU; all pointers but the structs' are to its memory. In builds with CUDA kernels
 * alone. Attention takes bfloat16, head dimensions 16, 32, 64, 128, 256 and 512, and tensors
 * aligned to 16 bytes. Slots, lengths and spans are on the device and are not checked; a request
 * whose slot does not exist is skipped.
 */
DGEMMA_API size_t dgemma_cuda_block_attention_workspace(const dgemma_block_attention* op);
DGEMMA_API dgemma_status dgemma_cuda_canvas_attention(const dgemma_block_attention* op,
                                                      dgemma_cuda* cuda);
/* dgemma_cuda_canvas_attention but for its last sentence: how a request's keys are split among
 * blocks, and so the bits of its result, also depends on `batch`, though not on the other requests.
 * Faster where the batch fills the GPU. */
DGEMMA_API dgemma_status dgemma_cuda_batched_canvas_attention(const dgemma_block_attention* op,
                                                              dgemma_cuda* cuda);
DGEMMA_API dgemma_status dgemma_cuda_causal_attention(const dgemma_block_attention* op,
                                                      dgemma_cuda* cuda);
DGEMMA_API dgemma_status dgemma_cuda_append_to_cache(const dgemma_append_to_cache* op,
                                                     dgemma_cuda* cuda);

/* Strides and the addresses of pages are multiples of 16 bytes. A request whose lengths do not fit
 * is skipped, one with more rows than max_query_length has the first of them alone, and a page that
 * does not exist reads as zeros. */
DGEMMA_API size_t dgemma_cuda_paged_attention_workspace(const dgemma_paged_attention* op);
DGEMMA_API dgemma_status dgemma_cuda_paged_attention(const dgemma_paged_attention* op,
                                                     dgemma_cuda* cuda);
DGEMMA_API dgemma_status dgemma_cuda_append_to_pages(const dgemma_append_to_pages* op,
                                                     dgemma_cuda* cuda);

#ifdef __cplusplus
}
#endif
#endif /* DGEMMA_BLOCK_ATTENTION_H_ */
