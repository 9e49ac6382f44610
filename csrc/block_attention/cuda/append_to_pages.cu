// Stores keys and values of rows in pages: a thread copies 16 bytes of each.
#include "block_attention/cuda/attention.h"
#include "common/ceil_divide.h"
#include "cuda/occupancy.h"
#include "device/launch.h"

namespace dgemma {
namespace {

constexpr int32_t kThreads = 256;
static_assert(fills_multiprocessor(kThreads));

// Strides are of pieces of 16 bytes.
struct Pool {
  uint4* pages;
  int64_t page_stride, row_stride, head_stride;
};

struct Append {
  const uint4 *key, *value;  // [tokens, key_heads, pieces]
  Pool keys, values;
  const int64_t* slot;
  int32_t tokens, key_heads, pages, page_size, pieces;
};

DGEMMA_DEVICE uint4& place_in(const Pool& pool, int32_t page, int32_t row, int32_t head,
                              int32_t piece) {
  return pool
      .pages[page * pool.page_stride + row * pool.row_stride + head * pool.head_stride + piece];
}

__global__ void __launch_bounds__(kThreads) append_to_pages(const Append p) {
  device::wait_for_previous_kernel();
  device::let_next_kernel_begin();
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const auto token = static_cast<int32_t>(index / (p.key_heads * p.pieces));
  if (token >= p.tokens) return;
  const int64_t slot = p.slot[token];
  if (slot < 0 || slot >= static_cast<int64_t>(p.pages) * p.page_size) return;
  const auto page = static_cast<int32_t>(slot / p.page_size);
  const auto row = static_cast<int32_t>(slot % p.page_size);
  const auto within = static_cast<int32_t>(index % (p.key_heads * p.pieces));
  const int32_t head = within / p.pieces, piece = within % p.pieces;
  place_in(p.keys, page, row, head, piece) = p.key[index];
  place_in(p.values, page, row, head, piece) = p.value[index];
}

}  // namespace

const char* launch_append_to_pages(const dgemma_append_to_pages& op, void* stream) {
  const int64_t piece = op.dtype == DGEMMA_BFLOAT16 ? 8 : 4;  // elements
  const Append p = {.key = static_cast<const uint4*>(op.key),
                    .value = static_cast<const uint4*>(op.value),
                    .keys = {static_cast<uint4*>(op.key_pages), op.key_page_stride / piece,
                             op.key_row_stride / piece, op.key_head_stride / piece},
                    .values = {static_cast<uint4*>(op.value_pages), op.value_page_stride / piece,
                               op.value_row_stride / piece, op.value_head_stride / piece},
                    .slot = op.slot,
                    .tokens = static_cast<int32_t>(op.tokens),
                    .key_heads = static_cast<int32_t>(op.key_heads),
                    .pages = static_cast<int32_t>(op.pages),
                    .page_size = static_cast<int32_t>(op.page_size),
                    .pieces = static_cast<int32_t>(op.head_dim / piece)};
  // A grid's first extent, 2^31 - 1 blocks of 4 KB each, is more than any GPU's memory.
  const int64_t threads = op.tokens * p.key_heads * p.pieces;
  const device::LaunchShape shape = {
      .grid = dim3(static_cast<unsigned>(ceil_divide(threads, kThreads))),
      .threads = kThreads,
      .overlaps_previous_kernel = true};
  return device::launch(shape, stream, append_to_pages, p);
}

}  // namespace dgemma
