// How a call of either form of attention is cut into work tiles and spread over the host's threads.
#pragma once

#include <atomic>
#include <cstdint>

#include "block_attention/cpu/attention.h"
#include "block_attention/cpu/checks.h"
#include "block_attention/extents.h"
#include "cpu/dispatch.h"
#include "cpu/entry.h"

namespace dgemma {

// A worker takes work tiles until none is left, so that one that is held up does not hold up the
// call. The number of workers, and with it the workspace, cannot depend on the host's threads,
// which the interface does not know; workers that no thread runs touch no memory.
constexpr int64_t kMaxWorkers = 64;

inline int64_t work_tiles_of(int64_t query_heads, int64_t key_heads, int64_t rows) {
  return (rows * (query_heads / key_heads) + kWorkTileRows - 1) / kWorkTileRows;
}

inline int64_t workers_of(const AttentionExtents& extents) {
  // Requests and heads first: they alone may reach the limit, and the product of all may overflow.
  const int64_t heads = extents.requests * extents.key_heads;
  const int64_t per_head = work_tiles_of(extents.query_heads, extents.key_heads, extents.rows);
  if (heads >= kMaxWorkers || per_head >= kMaxWorkers)
    return heads > 0 && per_head > 0 ? kMaxWorkers : 0;
  return heads * per_head < kMaxWorkers ? heads * per_head : kMaxWorkers;
}

inline size_t carve(int64_t head_dim, char* base, AttentionScratch* scratch) {
  const int64_t columns = padded_head_dim(head_dim);
  Carver carver = {base};
  scratch->query = carver.take<float>(kWorkTileRows * columns);
  scratch->panels = carver.take<float>(kKeyTile * columns);
  scratch->scores = carver.take<float>(kWorkTileRows * kKeyTile);
  scratch->accumulator = carver.take<float>(kWorkTileRows * columns);
  scratch->row_state = carver.take<float>(3 * kWorkTileRows);
  scratch->ranges = carver.take<int64_t>(2 * kWorkTileRows);
  return carver.used;
}

// 0 for extents that the call itself refuses.
inline size_t workspace_of(const AttentionExtents& extents) {
  for (const int64_t extent :
       {extents.requests, extents.rows, extents.query_heads, extents.key_heads, extents.head_dim})
    if (extent <= 0 || extent > kMaxExtent) return 0;
  AttentionScratch scratch;
  const size_t each = carve(extents.head_dim, nullptr, &scratch);
  return static_cast<size_t>(workers_of(extents)) * each + kAlignment;
}

// request_of(b) gives request b.
template <typename RequestOf>
struct AttentionWork {
  const AttentionCall& call;
  const RequestOf& request_of;
  void (*attend)(const AttentionCall&, const AttentionWorkTile&, const AttentionScratch&);
  char* workspace;
  std::atomic<int64_t> next_work_tile{0};

  void work(int64_t worker) {
    AttentionScratch scratch;
    const size_t bytes = carve(call.head_dim, nullptr, &scratch);
    carve(call.head_dim, workspace + static_cast<size_t>(worker) * bytes, &scratch);
    AttentionWorkTile work_tile;
    while (find(next_work_tile++, &work_tile)) attend(call, work_tile, scratch);
  }

  // The work tile with this number, counted over requests, key heads and rows. How a request is cut
  // depends on its own length alone.
  bool find(int64_t index, AttentionWorkTile* work_tile) const {
    for (int64_t b = 0; b < call.requests; ++b) {
      const AttentionCall::Request request = request_of(b);
      const int64_t per_head = work_tiles_of(call.query_heads, call.key_heads, request.rows);
      if (index >= call.key_heads * per_head) {
        index -= call.key_heads * per_head;
        continue;
      }
      const int64_t rows = request.rows * (call.query_heads / call.key_heads);
      const int64_t first = index % per_head * kWorkTileRows;
      *work_tile = {request, index / per_head, first,
                    rows - first < kWorkTileRows ? rows - first : kWorkTileRows};
      return true;
    }
    return false;
  }
};

// Runs a call that was checked. `Operation` is either struct of block_attention.h.
template <typename Operation, typename RequestOf>
dgemma_status run_attention(const Operation& op, const AttentionCall& call,
                            const RequestOf& request_of, dgemma_cpu* cpu) {
  dgemma_cpu_variant variant;
  if (const auto status = resolve_cpu_variant(cpu, &variant)) return status;
  const AttentionKernels& kernels = DGEMMA_TABLE_OF(variant, attention_kernels);
  const int64_t workers = workers_of(extents_of(op));
  if (workers == 0) return DGEMMA_OK;
  const auto misaligned = reinterpret_cast<uintptr_t>(op.workspace) % kAlignment;
  AttentionWork<RequestOf> state = {
      call, request_of,
      op.dtype == DGEMMA_BFLOAT16 ? kernels.attend_bfloat16 : kernels.attend_float32,
      static_cast<char*>(op.workspace) + (misaligned != 0 ? kAlignment - misaligned : 0)};
  run_tasks(cpu, workers, [&](int64_t worker) { state.work(worker); });
  return DGEMMA_OK;
}

}  // namespace dgemma
