// Sorts the pairs by expert: a counting sort by one block, before the other kernels. Other blocks
// of the same launch may permute the input's columns at the same time.
//
// The pairs are cut into 32 runs, one for each warp. Every warp counts its run's pairs by expert,
// the counts become positions, and every warp goes over its run again and places it. Without
// atomics the pairs of one expert keep their order, so the tables are a function of the ids alone.
#include "common/ceil_divide.h"
#include "device/launch.h"
#include "device/shared_memory.h"
#include "device/warp.h"
#include "grouped_gemm/cuda/moe.h"
#include "grouped_gemm/cuda/permute_rows.h"

namespace dgemma {
namespace {

constexpr int32_t kWarps = kMoeSortThreads / 32;

struct Sort {
  const int32_t* expert_ids;
  int32_t pairs, experts, token_tile;
  int32_t *first, *tiles_before, *pair;
};

struct Shared {
  // Counts, then where the warp's next pair goes. A pass has at most 32,768 pairs, and in 16 bits
  // they fit the 99 KB of a block on 8.6, 8.9 and 12.0.
  uint16_t place[kWarps][kMoeMostExperts];
  int32_t pairs_of_warp[kWarps];  // sums over 32 experts, for the scan
  int32_t tiles_of_warp[kWarps];
};
static_assert(sizeof(Shared) <= kSharedLimit80 && kMoePairsPerPass <= UINT16_MAX);

// Calls visit(index, expert, lanes with the same expert) for the run's pairs in order, 32 at a
// time; expert is -1 for a slot that is skipped. An id that is out of range is skipped too: nothing
// on the device can report it.
template <typename Visit>
DGEMMA_DEVICE void for_each_pair(const Sort& sort, Visit visit) {
  const int32_t warp = static_cast<int32_t>(device::warp_index());
  const int32_t lane = static_cast<int32_t>(device::lane_index());
  const int32_t run = (sort.pairs + 32 * kWarps - 1) / (32 * kWarps) * 32;
  const int32_t begin = warp * run, end = min(sort.pairs, begin + run);
  for (int32_t at = begin; at < end; at += 32) {
    const int32_t index = at + lane;
    int32_t expert = index < end ? sort.expert_ids[index] : -1;
    if (expert < 0 || expert >= sort.experts) expert = -1;
    visit(index, expert, __match_any_sync(device::kAllLanes, expert));
  }
}

// The sum over the lanes up to this one.
DGEMMA_DEVICE int32_t scan_lanes(int32_t value) {
  for (uint32_t by = 1; by < 32; by *= 2) {
    const int32_t below = __shfl_up_sync(device::kAllLanes, value, by);
    if (device::lane_index() >= by) value += below;
  }
  return value;
}

__global__ void __launch_bounds__(kMoeSortThreads, 1)
    sort_pairs(const Sort sort, const PermuteRows rows) {
  device::let_next_kernel_begin();  // it asks for weights while this one sorts
  if (blockIdx.x > 0) {
    permute(rows, static_cast<int64_t>(blockIdx.x - 1) * kMoeSortThreads + threadIdx.x);
    return;
  }
  Shared& shared = device::shared_memory<Shared>();
  const uint32_t warp = device::warp_index(), lane = device::lane_index();
  const uint32_t lanes_below = (1u << lane) - 1;
  for (int32_t e = static_cast<int32_t>(lane); e < sort.experts; e += 32) shared.place[warp][e] = 0;
  __syncwarp();

  // Counts. The lowest lane of those with one expert adds for all of them.
  for_each_pair(sort, [&](int32_t, int32_t expert, uint32_t same) {
    if (expert >= 0 && (same & lanes_below) == 0)
      shared.place[warp][expert] = static_cast<uint16_t>(shared.place[warp][expert] + __popc(same));
    __syncwarp();
  });
  __syncthreads();

  // Positions. Thread e has expert e: the scans run over its warp, then over the warps.
  const int32_t e = static_cast<int32_t>(threadIdx.x);
  int32_t pairs = 0;
  if (e < sort.experts)
    for (int32_t w = 0; w < kWarps; ++w) pairs += shared.place[w][e];
  const int32_t tiles = ceil_divide(pairs, sort.token_tile);
  int32_t pairs_up_to = scan_lanes(pairs), tiles_up_to = scan_lanes(tiles);
  if (lane == 31) {
    shared.pairs_of_warp[warp] = pairs_up_to;
    shared.tiles_of_warp[warp] = tiles_up_to;
  }
  __syncthreads();
  for (uint32_t w = 0; w < warp; ++w) {
    pairs_up_to += shared.pairs_of_warp[w];
    tiles_up_to += shared.tiles_of_warp[w];
  }
  if (e < sort.experts) {
    sort.first[e + 1] = pairs_up_to;
    sort.tiles_before[e + 1] = tiles_up_to;
    if (e == 0) sort.first[0] = sort.tiles_before[0] = 0;
    int32_t next = pairs_up_to - pairs;
    for (int32_t w = 0; w < kWarps; ++w) {
      const int32_t count = shared.place[w][e];
      shared.place[w][e] = static_cast<uint16_t>(next);
      next += count;
    }
  }
  __syncthreads();

  // Places.
  for_each_pair(sort, [&](int32_t index, int32_t expert, uint32_t same) {
    const int32_t place = expert >= 0 ? shared.place[warp][expert] : 0;
    __syncwarp();
    if (expert >= 0) {
      sort.pair[place + __popc(same & lanes_below)] = index;
      if ((same & lanes_below) == 0)
        shared.place[warp][expert] = static_cast<uint16_t>(place + __popc(same));
    }
    __syncwarp();
  });
}

}  // namespace

const char* launch_sort_pairs(const MoeCudaPlan& plan, const MoeCudaPass& pass, void* stream) {
  const MoeTables& tables = pass.tables;
  const Sort sort = {.expert_ids = pass.expert_ids,
                     .pairs = pass.tokens * pass.top_k,
                     .experts = tables.experts,
                     .token_tile = plan.token_tile,
                     .first = const_cast<int32_t*>(tables.first),
                     .tiles_before = const_cast<int32_t*>(tables.tiles_before),
                     .pair = const_cast<int32_t*>(tables.pair)};
  const PermuteRows rows = {.from = pass.input,
                            .to = pass.permuted_input,
                            .rows = pass.tokens,
                            .columns = pass.hidden_size};
  // This kernel does not begin before the previous one ends, which may still read this workspace.
  const device::LaunchShape shape = {.grid = dim3(static_cast<unsigned>(1 + plan.permuting_blocks)),
                                     .threads = kMoeSortThreads,
                                     .shared_bytes = sizeof(Shared)};
  return device::launch(shape, stream, sort_pairs, sort, rows);
}

}  // namespace dgemma
