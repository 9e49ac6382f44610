// Stores a block's keys and values in the rows of their slots: a thread copies 16 bytes of each.
#include "block_attention/cuda/attention.h"
#include "common/ceil_divide.h"
#include "cuda/occupancy.h"
#include "device/launch.h"

namespace dgemma {
namespace {

constexpr int32_t kThreads = 256;
static_assert(fills_multiprocessor(kThreads));

struct Append {
  const uint4 *key, *value;  // [batch, block_length, pieces]
  uint4 *prefix_key, *prefix_value;
  const int32_t *slot, *prefix_length, *length;
  int32_t block_length, slots, capacity, pieces;
};

__global__ void __launch_bounds__(kThreads) append_to_cache(const Append p) {
  device::wait_for_previous_kernel();
  device::let_next_kernel_begin();
  const int32_t request = static_cast<int32_t>(blockIdx.y), slot = p.slot[request];
  if (slot < 0 || slot >= p.slots) return;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int32_t row = static_cast<int32_t>(index / p.pieces);
  const int32_t piece = static_cast<int32_t>(index % p.pieces);
  const int32_t rows =
      p.length != nullptr ? min(p.length[request], p.block_length) : p.block_length;
  // A block longer than the ring keeps its last rows.
  if (row >= rows || row < rows - p.capacity) return;
  const int64_t from = (static_cast<int64_t>(request) * p.block_length + row) * p.pieces + piece;
  const int64_t stored = static_cast<int64_t>(slot) * p.capacity +
                         (static_cast<int64_t>(p.prefix_length[request]) + row) % p.capacity;
  p.prefix_key[stored * p.pieces + piece] = p.key[from];
  p.prefix_value[stored * p.pieces + piece] = p.value[from];
}

}  // namespace

const char* launch_append_to_cache(const dgemma_append_to_cache& op, void* stream) {
  const int64_t bytes = op.key_heads * op.head_dim * (op.dtype == DGEMMA_BFLOAT16 ? 2 : 4);
  const Append p = {.key = static_cast<const uint4*>(op.key),
                    .value = static_cast<const uint4*>(op.value),
                    .prefix_key = static_cast<uint4*>(op.prefix_key),
                    .prefix_value = static_cast<uint4*>(op.prefix_value),
                    .slot = op.slot,
                    .prefix_length = op.prefix_length,
                    .length = op.length,
                    .block_length = static_cast<int32_t>(op.block_length),
                    .slots = static_cast<int32_t>(op.slots),
                    .capacity = static_cast<int32_t>(op.capacity),
                    .pieces = static_cast<int32_t>(bytes / 16)};
  const int64_t threads = op.block_length * p.pieces;
  const device::LaunchShape shape = {
      .grid = dim3(static_cast<unsigned>(ceil_divide(threads, kThreads)),
                   static_cast<unsigned>(op.batch)),
      .threads = kThreads,
      .overlaps_previous_kernel = true};
  return device::launch(shape, stream, append_to_cache, p);
}

}  // namespace dgemma
