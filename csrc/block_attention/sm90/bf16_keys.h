// The producer side of the sm90 kernels: which rows and keys a block has, and how queries, keys and
// values come into shared memory.
//
// Two blocks of a cluster have neighbouring tiles of rows and go over the same keys, those that any
// row of the two sees. Keys and values come through a ring of stages, each of which holds
// kStageColumns columns of a tile. A tile of keys that is one run of rows in memory is brought by
// TMA multicast: either block loads half of a stage's columns for both, so the L2 is read once for
// the two. Where a tile crosses the end of the cache's ring or of the prefix, or reaches past the
// last key, each block copies its rows by itself with cp.async, rows past the last as zeros. So it
// does with all tiles of keys in pages: they begin anywhere in a page, and no box of TMA has a part
// of the swizzle's eight rows. A stage is full when it has an arrival of each producer thread and
// all bytes have come, and empty again when the warps that read it have released it in both blocks.
#pragma once

#include "block_attention/cuda/attention.h"
#include "block_attention/sm90/schedule.h"
#include "common/ceil_divide.h"
#include "cuda/sm90_pipeline.h"
#include "device/cluster.h"
#include "device/cp_async.h"
#include "device/fence.h"
#include "device/launch.h"
#include "device/mbarrier.h"
#include "device/shared_memory.h"
#include "device/swizzle.h"
#include "device/tma.h"
#include "device/warp.h"

namespace dgemma::attention_sm90 {

using device::bfloat16;
using device::Swizzle;

constexpr float kLog2E = 1.44269504088896341f;
// Columns that lie together: 128 bytes, a row of the widest swizzle.
constexpr int32_t kGroup = 64;
constexpr uint32_t kGroupBytes = kGroup * sizeof(bfloat16);
// Warps 0-7 are the consumers, two warpgroups; warps 8-11 are the producers.
using sm90::kConsumerWarps;
using sm90::Registers;
static_assert(Registers::kThreads == kAttentionThreads90);
constexpr int32_t kProducerWarps = 4;
constexpr uint32_t kProducerThreads = 32 * kProducerWarps;

// kStageColumns: of the keys or values in one stage. kUsers: warps of a block that read a stage.
template <int kHeadDim>
struct Tile;

// 80 keys: with 128 rows of queries, and keys and values twice, they fill shared memory. And 1,023
// + 256 keys of a sliding layer are 16 such tiles less one key.
template <>
struct Tile<256> {
  static constexpr int kRows = 128, kKeys = 80, kStageColumns = 256, kStages = 4;
  static constexpr uint32_t kUsers = 8;
};

// A row's output of 512 columns is 256 registers of a thread, so the two warpgroups share 64 rows.
// A stage has a quarter of the columns, so that it is free as soon as it has been multiplied.
template <>
struct Tile<512> {
  static constexpr int kRows = 64, kKeys = 64, kStageColumns = 128, kStages = 9;
  static constexpr uint32_t kUsers = 4;
};

// Groups of columns, each of rows of 128 bytes, swizzled.
template <int kHeadDim>
struct Shared {
  using T = Tile<kHeadDim>;
  static constexpr int kGroups = T::kStageColumns / kGroup;  // of a stage
  static constexpr int kStagesPerTile =
      kHeadDim / T::kStageColumns;  // of a tile of keys, or of values
  using Stage = bfloat16[kGroups][T::kKeys][kGroup];

  alignas(1024) bfloat16 query[kHeadDim / kGroup][T::kRows][kGroup];
  alignas(1024) Stage stage[T::kStages];
  VisibleKeys seen[kAttentionCluster * T::kRows];  // by each row of the cluster
  sm90::Pipeline<T::kStages> pipeline;
  device::Mbarrier query_full;
};

template <int kHeadDim>
using State = sm90::PipelineState<Tile<kHeadDim>::kStages>;

// Keys and values as (column of a group, row, group of columns).
struct KeyMaps {
  device::TensorMap prefix_key, prefix_value, key, value;
};

// One thread calls this, before the previous kernel has ended; fence_mbarrier_init and a barrier of
// the cluster follow.
template <int kHeadDim>
DGEMMA_DEVICE void initialise(Shared<kHeadDim>& shared, const KeyMaps& maps, const Attention& p) {
  if (p.page_table == nullptr)
    for (const auto* map : {&maps.prefix_key, &maps.prefix_value, &maps.key, &maps.value})
      device::prefetch_tensor_map(map);
  shared.pipeline.initialise(kProducerThreads, kAttentionCluster * Tile<kHeadDim>::kUsers);
  device::mbarrier_init(&shared.query_full, kProducerThreads);
}

// Keys or values are there, and seen by wgmma. What cp.async wrote, of a scattered tile, is not
// before a fence.
template <int kHeadDim>
DGEMMA_DEVICE const void* wait_for_stage(Shared<kHeadDim>& shared, State<kHeadDim> at,
                                         bool scattered) {
  shared.pipeline.consumer_wait(at);
  if (scattered) device::fence_proxy_async();
  return shared.stage[at.stage];
}

// The same for the queries, which cp.async wrote.
template <int kHeadDim>
DGEMMA_DEVICE void wait_for_queries(Shared<kHeadDim>& shared) {
  device::mbarrier_wait(&shared.query_full, 0);
  device::fence_proxy_async();
}

// This warp has waited for its products of the stage. Both blocks fill the stage of either.
template <int kHeadDim>
DGEMMA_DEVICE void release(Shared<kHeadDim>& shared, State<kHeadDim> at) {
  shared.pipeline.template consumer_release_in_cluster<kAttentionCluster>(at);
}

// The coordinates of this block. Splits come after heads in the grid, so that the splits that a
// request does not have are the last blocks to begin.
struct BlockCoordinates {
  int32_t request, head, split;
  int32_t row_tile;  // see row_tile_of_block
};

DGEMMA_DEVICE BlockCoordinates find_coordinates(const Attention& p,
                                                const AttentionRequest& request) {
  return {static_cast<int32_t>(blockIdx.z), static_cast<int32_t>(blockIdx.y) % p.key_heads,
          static_cast<int32_t>(blockIdx.y) / p.key_heads,
          row_tile_of_block(static_cast<int32_t>(blockIdx.x), request.row_tiles, request.causal)};
}

// The cluster goes over the positions `first` .. `end` - 1 by tiles of keys. Every row of this
// block sees those from `common_first` to before `common_end`.
struct KeyRange {
  int32_t first, end, tiles;
  int32_t common_first, common_end;
  RunEnds run_ends;
};

template <int kHeadDim>
DGEMMA_DEVICE bool is_scattered_tile(const KeyRange& keys, int32_t tile) {
  constexpr int32_t kKeys = Tile<kHeadDim>::kKeys;
  return is_scattered(keys.run_ends, keys.first + tile * kKeys, kKeys);
}

// This also writes the keys that each row sees; a row past the request's last one sees none.
template <int kHeadDim>
DGEMMA_DEVICE KeyRange find_keys(const Attention& p, const AttentionRequest& request,
                                 const BlockCoordinates& at, Shared<kHeadDim>& shared) {
  constexpr int32_t kRows = Tile<kHeadDim>::kRows, kKeys = Tile<kHeadDim>::kKeys;
  constexpr int32_t kAll = kAttentionCluster * kRows;
  VisibleKeys* const seen = shared.seen;
  const int32_t group = p.query_heads / p.key_heads;
  const int32_t own = at.row_tile % kAttentionCluster;
  const int32_t first_row = (at.row_tile - own) * kRows;
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < kAll; i += kAttentionThreads90) {
    seen[i] = {0, 0};
    if (first_row + i < request.rows * group)
      seen[i] = visible_keys(p, request, at.request, (first_row + i) / group);
  }
  __syncthreads();
  KeyRange keys = {INT32_MAX, 0, 0, 0, INT32_MAX, {}};
  for (int32_t i = static_cast<int32_t>(device::lane_index()); i < kAll; i += 32) {
    if (seen[i].end == 0) continue;
    keys.first = min(keys.first, seen[i].first);
    keys.end = max(keys.end, seen[i].end);
    if (i / kRows != own) continue;
    keys.common_first = max(keys.common_first, seen[i].first);
    keys.common_end = min(keys.common_end, seen[i].end);
  }
  keys.first = __reduce_min_sync(device::kAllLanes, keys.first);
  keys.end = __reduce_max_sync(device::kAllLanes, keys.end);
  keys.common_first = __reduce_max_sync(device::kAllLanes, keys.common_first);
  keys.common_end = __reduce_min_sync(device::kAllLanes, keys.common_end);
  keys.run_ends = p.page_table != nullptr ? all_scattered()
                                          : find_run_ends(keys.end, request.prefix, p.capacity);
  const KeyTiles own_tiles = keys_of_split(keys.first, keys.end, kKeys, request.splits, at.split);
  keys.first = own_tiles.first;
  keys.tiles = own_tiles.tiles;
  return keys;
}

// The producer warps.
template <int kHeadDim>
class KeyProducer {
  using T = Tile<kHeadDim>;
  using S = Shared<kHeadDim>;

 public:
  DGEMMA_DEVICE KeyProducer(const Attention& p, const AttentionRequest& request,
                            const BlockCoordinates& at, const KeyRange& keys, S& shared)
      : p_(p), request_(request), block_(at), keys_(keys), shared_(shared) {
    warp_ = static_cast<int32_t>(device::warp_index() - kConsumerWarps);
    lane_ = static_cast<int32_t>(device::lane_index());
    rank_ = static_cast<int32_t>(device::cluster_block_rank());
  }

  // The block's rows of queries, those past the last as zeros: a row is query r / group of head r %
  // group.
  DGEMMA_DEVICE void load_queries() {
    constexpr int32_t kRowsOfWarp = T::kRows / kProducerWarps;
    static_assert(kRowsOfWarp <= 32);
    const int32_t group = p_.query_heads / p_.key_heads;
    const int32_t packed = block_.row_tile * T::kRows + row_of_warp(lane_);
    const int64_t token = first_row_of(p_, block_.request) + packed / group;
    const bfloat16* const from =
        packed < request_.rows * group
            ? p_.query + (token * p_.query_heads + block_.head * group + packed % group) * kHeadDim
            : nullptr;
#pragma unroll 4
    for (int32_t i = 0; i < kRowsOfWarp; ++i) {
      const bfloat16* const row = pointer_of_lane(from, i);
#pragma unroll
      for (int32_t piece = lane_; piece < kHeadDim / 8; piece += 32)
        copy_piece(shared_.query[piece / 8][0], row_of_warp(i), piece % 8, row, 8 * piece);
    }
    device::cp_async_mbarrier_arrive(&shared_.query_full);
  }

  DGEMMA_DEVICE void load_keys(const KeyMaps& maps, int32_t tile) {
    load(maps.prefix_key, maps.key, p_.keys, keys_.first + tile * T::kKeys);
  }
  DGEMMA_DEVICE void load_values(const KeyMaps& maps, int32_t tile) {
    load(maps.prefix_value, maps.value, p_.values, keys_.first + tile * T::kKeys);
  }

 private:
  // The warps take rows in turn.
  DGEMMA_DEVICE int32_t row_of_warp(int32_t i) const { return warp_ + kProducerWarps * i; }

  DGEMMA_DEVICE static const bfloat16* pointer_of_lane(const bfloat16* pointer, int32_t lane) {
    return reinterpret_cast<const bfloat16*>(
        __shfl_sync(device::kAllLanes, reinterpret_cast<uint64_t>(pointer), lane));
  }

  // 16 bytes of a row, or zeros where there is none; `first` is the row's column that they begin
  // at.
  DGEMMA_DEVICE void copy_piece(bfloat16* group, int32_t row, int32_t piece, const bfloat16* from,
                                int32_t first) {
    const uint32_t place = device::swizzled(
        static_cast<uint32_t>(row) * kGroupBytes + static_cast<uint32_t>(piece) * 16,
        Swizzle::bytes_128);
    device::cp_async_16(reinterpret_cast<char*>(group) + place,
                        from != nullptr ? from + first : p_.query, from != nullptr ? 16 : 0);
  }

  DGEMMA_DEVICE void load(const device::TensorMap& prefix_map, const device::TensorMap& block_map,
                          const KeyStorage& storage, int32_t first) {
    KeyRun run = {KeySource::kScattered, 0};
    if (p_.page_table == nullptr)
      run = find_run(first, T::kKeys, keys_.end, request_.prefix, p_.capacity);
    if (run.source == KeySource::kPrefix)
      load_whole(prefix_map, request_.slot * p_.capacity + run.row);
    else if (run.source == KeySource::kBlock)
      load_whole(block_map, block_.request * p_.block_length + run.row);
    else
      load_rows(storage, first);
  }

  // One run of rows in memory, `row` being the first.
  DGEMMA_DEVICE void load_whole(const device::TensorMap& map, int32_t row) {
    constexpr int32_t kShare = S::kGroups / kAttentionCluster;  // groups that a block brings
    constexpr uint16_t kBlocks = (1 << kAttentionCluster) - 1;
#pragma unroll 1
    for (int32_t part = 0; part < S::kStagesPerTile; ++part, at_.advance()) {
      device::Mbarrier* const full = shared_.pipeline.producer_acquire(at_);
      __syncwarp();  // no lane is left behind by two rounds
      if (lane_ != 0) continue;
      if (warp_ == 0) {
        device::mbarrier_arrive_expect_bytes(full, sizeof(typename S::Stage));
        const int32_t group = rank_ * kShare;
        device::tma_load_multicast(shared_.stage[at_.stage][group], &map, full,
                                   device::evict_normal(), kBlocks, 0, row,
                                   block_.head * (kHeadDim / kGroup) + part * S::kGroups + group);
      }
      device::mbarrier_arrive_times(full, warp_ == 0 ? 31 : 32);  // for the warp
    }
  }

  // Where the row of a position is, of this block's key head; null where there is none.
  DGEMMA_DEVICE const bfloat16* find_key(const KeyStorage& storage, int32_t position) const {
    if (position >= keys_.end) return nullptr;
    const int64_t head = block_.head * storage.head_stride;
    if (p_.page_table != nullptr) {
      const int64_t element = element_in_page(p_, storage, block_.request, position);
      return element >= 0 ? storage.stored + element + head : nullptr;
    }
    if (position < request_.prefix)
      return storage.stored + element_in_slot(p_, storage, request_, position) + head;
    return storage.block +
           (first_row_of(p_, block_.request) + position - request_.prefix) * storage.row_stride +
           head;
  }

  // Row by row, a lane knowing where one of its warp's rows is.
  DGEMMA_DEVICE void load_rows(const KeyStorage& storage, int32_t first) {
    constexpr int32_t kRowsOfWarp = T::kKeys / kProducerWarps;
    static_assert(T::kKeys % kProducerWarps == 0 && kRowsOfWarp <= 32);
    constexpr int32_t kPieces = T::kStageColumns / 8;  // of 16 bytes, in a row of a stage
    constexpr int32_t kTogether = 32 / kPieces;        // rows that a warp copies at once
    static_assert(kRowsOfWarp % kTogether == 0);
    const int32_t position = first + row_of_warp(lane_);
    const bfloat16* const from = find_key(storage, position);
    const int32_t piece = lane_ % kPieces;
#pragma unroll 1
    for (int32_t part = 0; part < S::kStagesPerTile; ++part, at_.advance()) {
      device::Mbarrier* const full = shared_.pipeline.producer_acquire(at_);
      bfloat16* const group = shared_.stage[at_.stage][piece / 8][0];
      const int32_t column = part * T::kStageColumns + 8 * piece;
#pragma unroll 4
      for (int32_t i = 0; i < kRowsOfWarp; i += kTogether) {
        const int32_t mine = i + lane_ / kPieces;
        copy_piece(group, row_of_warp(mine), piece % 8, pointer_of_lane(from, mine), column);
      }
      device::cp_async_mbarrier_arrive(full);
    }
  }

  const Attention& p_;
  const AttentionRequest& request_;
  const BlockCoordinates& block_;
  const KeyRange& keys_;
  S& shared_;
  State<kHeadDim> at_;
  int32_t warp_, lane_, rank_;
};

// Loads all keys and values of the block in the order in which they are multiplied: the scores of a
// tile begin before the values of the previous tile are used.
template <int kHeadDim>
DGEMMA_DEVICE void produce_all(KeyProducer<kHeadDim>& producer, const KeyMaps& maps,
                               int32_t tiles) {
  if (tiles == 0) return;
  producer.load_keys(maps, 0);
  producer.load_queries();
  for (int32_t tile = 0; tile < tiles; ++tile) {
    if (tile + 1 < tiles) producer.load_keys(maps, tile + 1);
    producer.load_values(maps, tile);
  }
  device::cp_async_commit();  // a thread may not end while its copies are under way
  device::cp_async_wait<0>();
}

// Host: [rows, key_heads, head_dim] as (column of a group, row, group of columns), a copy being a
// tile of keys by a block's share of a stage.
template <int kHeadDim>
const char* encode_keys(device::TensorMap* map, const Attention& p, const bfloat16* base,
                        int64_t rows) {
  using T = Tile<kHeadDim>;
  const uint64_t row_values = static_cast<uint64_t>(p.key_heads) * kHeadDim;
  return device::encode_tensor_map(
      map, {.type = device::ElementType::bfloat16,
            .rank = 3,
            .base = base,
            .size = {kGroup, static_cast<uint64_t>(rows), row_values / kGroup},
            .stride = {0, row_values * sizeof(bfloat16), kGroupBytes},
            .box = {kGroup, T::kKeys, T::kStageColumns / kGroup / kAttentionCluster},
            .swizzle = Swizzle::bytes_128});
}

// Host: the maps of keys in slots; pages have none.
template <int kHeadDim>
const char* encode_maps(KeyMaps* maps, const Attention& p, int32_t batch) {
  if (p.page_table != nullptr) return nullptr;
  const int64_t stored = static_cast<int64_t>(p.slots) * p.capacity;
  const int64_t rows = static_cast<int64_t>(batch) * p.block_length;
  if (const char* error = encode_keys<kHeadDim>(&maps->key, p, p.keys.block, rows)) return error;
  if (const char* error = encode_keys<kHeadDim>(&maps->value, p, p.values.block, rows))
    return error;
  maps->prefix_key = maps->key;  // where there is no cache: never copied from
  maps->prefix_value = maps->value;
  if (stored == 0) return nullptr;
  if (const char* error = encode_keys<kHeadDim>(&maps->prefix_key, p, p.keys.stored, stored))
    return error;
  return encode_keys<kHeadDim>(&maps->prefix_value, p, p.values.stored, stored);
}

// Host: starts a kernel of these on all rows, key heads, splits and requests.
template <int kHeadDim, typename Layout>
const char* launch(const AttentionPlan& plan, const Attention& p, int32_t batch, void* stream,
                   void (*kernel)(const KeyMaps, const Attention)) {
  static_assert(sizeof(Layout) <= kSharedLimit90);
  KeyMaps maps = {};
  if (const char* error = encode_maps<kHeadDim>(&maps, p, batch)) return error;
  const int32_t clusters = ceil_divide(plan.row_tiles, kAttentionCluster);
  const device::LaunchShape shape = {
      .grid = dim3(static_cast<unsigned>(clusters * kAttentionCluster),
                   static_cast<unsigned>(p.key_heads * plan.splits), static_cast<unsigned>(batch)),
      .threads = kAttentionThreads90,
      .shared_bytes = sizeof(Layout),
      .cluster_blocks = kAttentionCluster,
      .overlaps_previous_kernel = true};
  return device::launch(shape, stream, kernel, maps, p);
}

}  // namespace dgemma::attention_sm90
