// canvas_attention and causal_attention on the CPU: checks, work tiles, scratch.
#include "block_attention/cpu/attention.h"

#include <atomic>
#include <cmath>

#include "block_attention/cpu/checks.h"
#include "block_attention/cpu/visible_keys.h"
#include "cpu/dispatch.h"
#include "cpu/entry.h"

namespace dgemma {
namespace {

// A worker takes work tiles until none is left, so that one that is held up does not hold up the
// call. The number of workers, and with it the workspace, cannot depend on the host's threads,
// which the interface does not know; workers that no thread runs touch no memory.
constexpr int64_t kMaxWorkers = 64;

int64_t work_tiles_of(const dgemma_block_attention& op, int64_t rows) {
  return (rows * (op.query_heads / op.key_heads) + kWorkTileRows - 1) / kWorkTileRows;
}

int64_t workers_of(const dgemma_block_attention& op) {
  // Batch and heads first: they alone may reach the limit, and the product of all may overflow.
  const int64_t heads = op.batch * op.key_heads;
  const int64_t per_head = work_tiles_of(op, op.block_length);
  if (heads >= kMaxWorkers || per_head >= kMaxWorkers)
    return heads > 0 && per_head > 0 ? kMaxWorkers : 0;
  return heads * per_head < kMaxWorkers ? heads * per_head : kMaxWorkers;
}

size_t carve(const dgemma_block_attention& op, char* base, AttentionScratch* scratch) {
  const int64_t columns = padded_head_dim(op.head_dim);
  Carver carver = {base};
  scratch->query = carver.take<float>(kWorkTileRows * columns);
  scratch->panels = carver.take<float>(kKeyTile * columns);
  scratch->scores = carver.take<float>(kWorkTileRows * kKeyTile);
  scratch->accumulator = carver.take<float>(kWorkTileRows * columns);
  scratch->row_state = carver.take<float>(3 * kWorkTileRows);
  scratch->ranges = carver.take<int64_t>(2 * kWorkTileRows);
  return carver.used;
}

struct Attention {
  const dgemma_block_attention& op;
  bool causal;
  void (*attend)(const dgemma_block_attention&, bool, const AttentionWorkTile&,
                 const AttentionScratch&);
  char* workspace;
  std::atomic<int64_t> next_work_tile{0};

  void work(int64_t worker) {
    AttentionScratch scratch;
    const size_t bytes = carve(op, nullptr, &scratch);
    carve(op, workspace + static_cast<size_t>(worker) * bytes, &scratch);
    AttentionWorkTile work_tile;
    while (find(next_work_tile++, &work_tile)) attend(op, causal, work_tile, scratch);
  }

  // The work tile with this number, counted over requests, key heads and rows. How a request is cut
  // depends on its own length alone.
  bool find(int64_t index, AttentionWorkTile* work_tile) const {
    for (int64_t b = 0; b < op.batch; ++b) {
      if (op.slot[b] < 0) continue;
      const int64_t per_head = work_tiles_of(op, block_rows(op, b));
      if (index >= op.key_heads * per_head) {
        index -= op.key_heads * per_head;
        continue;
      }
      const int64_t rows = block_rows(op, b) * (op.query_heads / op.key_heads);
      const int64_t first = index % per_head * kWorkTileRows;
      *work_tile = {b, index / per_head, first,
                    rows - first < kWorkTileRows ? rows - first : kWorkTileRows};
      return true;
    }
    return false;
  }
};

dgemma_status check(const dgemma_block_attention& op, bool causal, dgemma_cpu* cpu) {
  if (const auto status = check_extents(op, cpu)) return status;
  if (const auto status = check_extent(cpu, "query_heads", op.query_heads, 1)) return status;
  if (const auto status = check_extent(cpu, "window", op.window, 0)) return status;
  if (op.query_heads % op.key_heads != 0)
    return invalid(cpu, "query_heads: got %lld, wants a multiple of key_heads %lld",
                   static_cast<long long>(op.query_heads), static_cast<long long>(op.key_heads));
  if (!std::isfinite(op.scale))
    return invalid(cpu, "scale: got %g, wants a finite number", op.scale);
  if (op.spans != nullptr && !causal)
    return invalid(cpu, "spans: got a pointer, wants NULL for canvas attention");
  if (const auto status = check_extent(cpu, "spans_per_request", op.spans_per_request, 0))
    return status;
  const OperandList operands = operands_of(op);
  if (const auto status = check_operands(operands, cpu)) return status;
  // The call finds an aligned part by itself.
  if (const auto status = check_workspace(operands, op.workspace, op.workspace_bytes,
                                          dgemma_cpu_block_attention_workspace(&op), 1,
                                          {cpu->message, sizeof cpu->message}))
    return status;
  if (const auto status = check_requests(op, cpu)) return status;
  for (int64_t b = 0; b < op.batch; ++b) {
    if (op.slot[b] < 0) continue;
    const int64_t prefix = op.prefix_length[b];
    const int64_t wanted = prefix - first_in_window(op, prefix);
    if (wanted > op.capacity)
      return invalid(cpu,
                     "prefix_length[%lld]: got %lld, of which a query may see %lld, wants at most "
                     "capacity %lld of them",
                     static_cast<long long>(b), static_cast<long long>(prefix),
                     static_cast<long long>(wanted), static_cast<long long>(op.capacity));
    for (int64_t i = 0; op.spans != nullptr && i < op.spans_per_request; ++i) {
      const int32_t* span = op.spans + (b * op.spans_per_request + i) * 2;
      if (span[0] < 0 || span[1] < span[0])
        return invalid(cpu, "spans[%lld, %lld]: got [%d, %d), wants 0 <= start <= end",
                       static_cast<long long>(b), static_cast<long long>(i), span[0], span[1]);
    }
  }
  return DGEMMA_OK;
}

dgemma_status attention(const dgemma_block_attention& op, bool causal, dgemma_cpu* cpu) {
  if (const auto status = check(op, causal, cpu)) return status;
  dgemma_cpu_variant variant;
  if (const auto status = resolve_cpu_variant(cpu, &variant)) return status;
  const AttentionKernels& kernels = DGEMMA_TABLE_OF(variant, attention_kernels);
  const int64_t workers = workers_of(op);
  if (workers == 0) return DGEMMA_OK;
  const auto misaligned = reinterpret_cast<uintptr_t>(op.workspace) % kAlignment;
  Attention state = {
      op, causal, op.dtype == DGEMMA_BFLOAT16 ? kernels.attend_bfloat16 : kernels.attend_float32,
      static_cast<char*>(op.workspace) + (misaligned != 0 ? kAlignment - misaligned : 0)};
  run_tasks(cpu, workers, [&](int64_t worker) { state.work(worker); });
  return DGEMMA_OK;
}

}  // namespace
}  // namespace dgemma

size_t dgemma_cpu_block_attention_workspace(const dgemma_block_attention* op) {
  if (op == nullptr) return 0;
  const int64_t extents[] = {op->batch, op->block_length, op->query_heads, op->key_heads,
                             op->head_dim};
  for (const int64_t extent : extents)
    if (extent <= 0 || extent > dgemma::kMaxExtent)
      return 0;  // the call itself reports what is wrong
  dgemma::AttentionScratch scratch;
  const size_t each = dgemma::carve(*op, nullptr, &scratch);
  return static_cast<size_t>(dgemma::workers_of(*op)) * each + dgemma::kAlignment;
}

dgemma_status dgemma_cpu_canvas_attention(const dgemma_block_attention* op, dgemma_cpu* cpu) {
  if (const auto status = dgemma::check_call(op, cpu)) return status;
  return dgemma::attention(*op, false, cpu);
}

dgemma_status dgemma_cpu_causal_attention(const dgemma_block_attention* op, dgemma_cpu* cpu) {
  if (const auto status = dgemma::check_call(op, cpu)) return status;
  return dgemma::attention(*op, true, cpu);
}
