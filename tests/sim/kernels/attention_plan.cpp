// The plan of the CUDA attention kernels and how it splits a request's keys, callable from Python.
#include <cstdio>
#include <sstream>

#include "block_attention/cuda/attention.h"
#include "block_attention/sm90/schedule.h"
#include "entry.h"

extern "C" void sim_statistics(uint64_t (&out)[6]);

namespace {
constexpr dgemma::Gpu kH200 = {dgemma::CudaPath::kSm90, 90, 132};
}

// Null, or what is wrong with the extents. `text` has room for `bytes`.
SIM_ENTRY attention_plan(const dgemma_block_attention* op, int32_t compute_capability,
                         int32_t multiprocessors, bool by_batch, int64_t (&out)[9], char* text,
                         size_t bytes) {
  using dgemma::CudaPath;
  using dgemma::Filling;
  if (const char* error = dgemma::attention_cuda_error(*op)) return error;
  const CudaPath path = compute_capability == 90 ? CudaPath::kSm90 : CudaPath::kSm80;
  const dgemma::AttentionPlan plan = dgemma::make_attention_plan(
      dgemma::extents_of(*op), {path, compute_capability, multiprocessors},
      by_batch ? Filling::kByBatch : Filling::kByRequest);
  const int64_t numbers[9] = {plan.path == CudaPath::kSm90 ? 90 : 80,
                              plan.rows,
                              plan.keys,
                              plan.row_tiles,
                              plan.splits,
                              plan.partial_tiles,
                              static_cast<int64_t>(plan.partial),
                              static_cast<int64_t>(plan.sums),
                              static_cast<int64_t>(plan.workspace_bytes)};
  for (int i = 0; i < 9; ++i) out[i] = numbers[i];
  std::ostringstream stream;
  print(plan, stream);
  std::snprintf(text, bytes, "%s", stream.str().c_str());
  return nullptr;
}

// Walks over all blocks of the sm90 kernels' grid and writes (request, key head, row tile, split,
// first position, end of the positions, tiles of keys, place among the parts) of each that has
// rows. `count`: what there is room for, then how many there are.
SIM_ENTRY attention_units(const dgemma_block_attention* op, bool causal, int32_t (*out)[8],
                          int32_t* count) {
  using namespace dgemma;
  const AttentionPlan plan = make_attention_plan(extents_of(*op), kH200, Filling::kByRequest);
  const Attention p = make_attention(*op, plan, causal);
  const int32_t group = p.query_heads / p.key_heads, room = *count;
  const int32_t blocks = (plan.row_tiles + kAttentionCluster - 1) / kAttentionCluster * 2;
  *count = 0;
  for (int32_t index = 0; index < op->batch; ++index) {
    const AttentionRequest request = find_request(p, index);
    for (int32_t y = 0; y < p.key_heads * plan.splits; ++y) {
      for (int32_t x = 0; x < blocks; ++x) {
        const int32_t tile = row_tile_of_block(x, request.row_tiles, causal);
        const int32_t head = y % p.key_heads, split = y / p.key_heads;
        if (tile < 0 || split >= request.splits || tile >= request.row_tiles) continue;
        int32_t first = INT32_MAX, end = 0;  // over the rows of the cluster
        const int32_t begin = tile / kAttentionCluster * kAttentionCluster * plan.rows;
        for (int32_t row = begin; row < begin + kAttentionCluster * plan.rows; row += group) {
          if (row >= request.rows * group) break;
          const VisibleKeys keys = visible_keys(p, request, index, row / group);
          first = keys.first < first ? keys.first : first;
          end = keys.end > end ? keys.end : end;
        }
        const KeyTiles keys = keys_of_split(first, end, plan.keys, request.splits, split);
        const int32_t part = static_cast<int32_t>(index * plan.partial_tiles) +
                             (head * request.row_tiles + tile) * request.splits + split;
        const int32_t work_tile[8] = {index, head, tile, split, keys.first, end, keys.tiles, part};
        if (*count < room)
          for (int i = 0; i < 8; ++i) out[*count][i] = work_tile[i];
        ++*count;
      }
    }
  }
  return nullptr;
}

// The place of the tile of keys from position `first` on: 0 and the row in the slot, 1 and the row
// in the block, or 2; then whether the consumers take it for scattered.
SIM_ENTRY attention_run(int32_t first, int32_t keys, int32_t end, int32_t prefix, int32_t capacity,
                        int32_t (&out)[3]) {
  const dgemma::KeyRun run = dgemma::find_run(first, keys, end, prefix, capacity);
  out[0] = static_cast<int32_t>(run.source);
  out[1] = run.row;
  out[2] = dgemma::is_scattered(dgemma::find_run_ends(end, prefix, capacity), first, keys);
  return nullptr;
}

// Runs the sm90 kernel alone and writes the machine's statistics of it.
SIM_ENTRY attention_traffic(const dgemma_block_attention* op, bool causal, uint64_t (&out)[6]) {
  using namespace dgemma;
  const AttentionPlan plan = make_attention_plan(extents_of(*op), kH200, Filling::kByRequest);
  const Attention p = make_attention(*op, plan, causal);
  const auto launch =
      op->head_dim == 512 ? launch_attention_512_sm90_bf16 : launch_attention_256_sm90_bf16;
  if (const char* error = launch(plan, p, static_cast<int32_t>(op->batch), nullptr)) return error;
  sim_statistics(out);
  return nullptr;
}
