// Attention of 64 rows over a part of their keys, bfloat16 on sm_90, for head dimension 512, canvas
// and causal: see sm90/bf16_keys.h for how the rows' keys come, and sm90/bf16_softmax.h.
//
// The output of 64 rows is 256 registers a thread, so each of two warpgroups has half of its
// columns. The first also makes the scores and exponentials, and hands the exponentials, and what
// the sums so far are to be multiplied by, to the second through shared memory. While the second
// uses the values of a tile, the first makes the scores of the next.
#include "block_attention/sm90/bf16_softmax.h"
#include "device/barrier.h"
#include "device/ldmatrix.h"

namespace dgemma {
namespace {

using namespace attention_sm90;

constexpr int kHeadDim = 512;
using T = Tile<kHeadDim>;
constexpr uint32_t kWarps = 4;  // of a warpgroup
constexpr int kStagesPerTile =
    Shared<kHeadDim>::kStagesPerTile / 2;  // of values, that a warpgroup uses
// Tiles of exponentials: the first warpgroup writes one while the second reads the other.
constexpr uint32_t kBuffers = 2;
constexpr uint32_t kSumsBarrier = 1;  // barrier 0 is __syncthreads

struct Layout {
  static_assert(T::kKeys == kGroup);
  alignas(1024) bfloat16 exponentials[kBuffers][T::kRows][T::kKeys];  // 128 bytes a row, swizzled
  Shared<kHeadDim> common;
  float factors[kBuffers][T::kRows];
  float sums[T::kRows];
  sm90::Pipeline<kBuffers> exponentials_pipeline;
};

// A warpgroup's half of the columns.
struct Columns {
  float output[kStagesPerTile][T::kStageColumns / 2] = {};

  DGEMMA_DEVICE void multiply(float factor0, float factor1) {
#pragma unroll
    for (int i = 0; i < kStagesPerTile; ++i) multiply_rows(output[i], factor0, factor1);
  }

  // Adds the products of a tile of exponentials, in registers or in shared memory, and a stage of
  // values.
  DGEMMA_DEVICE void begin(const void* stage, int i,
                           const uint32_t (&exponentials)[T::kKeys / 16][4]) {
    const auto values = describe(stage);
#pragma unroll
    for (uint32_t k = 0; k < T::kKeys; k += 16)  // wgmma's K is 16
      device::wgmma<T::kStageColumns, device::Major::mn>(output[i], exponentials[k / 16],
                                                         device::advanced(values, k * kGroupBytes));
    device::wgmma_commit();
  }
  DGEMMA_DEVICE void begin(const void* stage, int i, device::MatrixDescriptor exponentials) {
    const auto values = describe(stage);
#pragma unroll
    for (uint32_t k = 0; k < T::kKeys; k += 16)
      device::wgmma<T::kStageColumns, device::Major::k, device::Major::mn>(
          output[i], device::advanced(exponentials, k * sizeof(bfloat16)),
          device::advanced(values, k * kGroupBytes));
    device::wgmma_commit();
  }

  DGEMMA_DEVICE static device::MatrixDescriptor describe(const void* values) {
    return device::matrix_descriptor(values, Swizzle::bytes_128, T::kKeys * kGroupBytes,
                                     swizzle_period(Swizzle::bytes_128));
  }

  DGEMMA_DEVICE void store(const Attention& p, const AttentionRequest& request,
                           const BlockCoordinates& at, int32_t row, int which, int32_t column,
                           float sum) const {
#pragma unroll
    for (int i = 0; i < kStagesPerTile; ++i)
      store_row(p, request, at, row, column + i * T::kStageColumns, output[i], which, sum);
  }
};

// The first of the two rows that a thread has of a warpgroup's; the other is eight below.
DGEMMA_DEVICE int32_t first_row() {
  return static_cast<int32_t>(device::warp_index() % kWarps * 16 + device::lane_index() / 4);
}

// The first warpgroup: scores, exponentials and the first half of the columns.
class FirstWarpgroup {
 public:
  DGEMMA_DEVICE FirstWarpgroup(Layout& shared, const Attention& p, const BlockCoordinates& at)
      : shared_(shared),
        softmax_(&shared.common.seen[at.row_tile % kAttentionCluster * T::kRows], p.scale) {}

  DGEMMA_DEVICE void attend(const KeyRange& keys) {
    if (keys.tiles == 0) return;
    wait_for_queries(shared_.common);
    State<kHeadDim> key = begin_scores(keys, 0);
    device::wgmma_wait<0>(softmax_.scores);
    release(shared_.common, key);
    exponentiate(keys, 0);
    softmax_.pack();
#pragma unroll 1
    for (int32_t tile = 1; tile < keys.tiles; ++tile) {
      key = begin_scores(keys, tile);
      const State<kHeadDim> value = begin_output(keys, tile - 1);
      device::wgmma_wait<kStagesPerTile>(softmax_.scores);
      release(shared_.common, key);
      exponentiate(keys, tile);
      end_output(value);
      columns_.multiply(softmax_.factor(0), softmax_.factor(1));
      softmax_.pack();
    }
    end_output(begin_output(keys, keys.tiles - 1));
  }

  // Adds up the rows' sums, for the other warpgroup too.
  DGEMMA_DEVICE void finish() {
    softmax_.finish();
#pragma unroll
    for (int which = 0; which < 2; ++which)
      if (device::lane_index() % 4 == 0) shared_.sums[row_ + 8 * which] = softmax_.sum(which);
    device::named_barrier_arrive(kSumsBarrier, 2 * 32 * kWarps);
  }

  DGEMMA_DEVICE void store(const Attention& p, const AttentionRequest& request,
                           const BlockCoordinates& at) {
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      const int32_t row = row_ + 8 * which;
      if (!has_row(p, request, at, row)) continue;
      store_sums(p, request, at, row, softmax_.max(which), softmax_.sum(which));
      columns_.store(p, request, at, row, which, 0, softmax_.sum(which));
    }
  }

 private:
  // scores = query . key, one stage of the depth after the other; gives the last, which is not yet
  // released.
  DGEMMA_DEVICE State<kHeadDim> begin_scores(const KeyRange& keys, int32_t tile) {
    const bool scattered = is_scattered_tile<kHeadDim>(keys, tile);
    const auto query = device::k_major_descriptor(shared_.common.query, Swizzle::bytes_128);
    State<kHeadDim> before = at_;
#pragma unroll 1  // four copies of it spill
    for (uint32_t part = 0; part < Shared<kHeadDim>::kStagesPerTile; ++part) {
      const auto key = device::k_major_descriptor(wait_for_stage(shared_.common, at_, scattered),
                                                  Swizzle::bytes_128);
      device::wgmma_fence(softmax_.scores);
#pragma unroll
      for (uint32_t k = 0; k < T::kStageColumns; k += 16) {
        const uint32_t depth = part * T::kStageColumns + k;
        const uint32_t within = k % kGroup * sizeof(bfloat16);
        device::wgmma<T::kKeys>(
            softmax_.scores,
            device::advanced(query, depth / kGroup * T::kRows * kGroupBytes + within),
            device::advanced(key, k / kGroup * T::kKeys * kGroupBytes + within), depth > 0);
      }
      device::wgmma_commit();
      if (part > 0) {
        device::wgmma_wait<1>();
        release(shared_.common, before);
      }
      before = at_;
      at_.advance();
    }
    return before;
  }

  // Makes a tile's exponentials and hands them to the other warpgroup.
  DGEMMA_DEVICE void exponentiate(const KeyRange& keys, int32_t tile) {
    const int32_t first = keys.first + tile * T::kKeys;
    softmax_.exponentiate(first, first >= keys.common_first && first + T::kKeys <= keys.common_end);

    const uint32_t lane = device::lane_index(), buffer = buffer_.stage;
    device::Mbarrier* const full = shared_.exponentials_pipeline.producer_acquire(buffer_);
#pragma unroll
    for (int which = 0; which < 2; ++which)
      if (lane % 4 == 0) shared_.factors[buffer][row_ + 8 * which] = softmax_.factor(which);
    // The four tiles of 8 by 8 that wgmma's A has of 16 keys: rows 0-7 and 8-15 of keys 0-7, then
    // those of keys 8-15.
    const uint32_t row = static_cast<uint32_t>(row_) / 16 * 16 + lane % 16;
    char* const tile_of_exponentials = reinterpret_cast<char*>(shared_.exponentials[buffer]);
#pragma unroll
    for (uint32_t k = 0; k < T::kKeys / 16; ++k) {
      uint32_t packed[4];
      softmax_.pack(static_cast<int>(k), packed);
      device::store_tiles(
          tile_of_exponentials +
              device::swizzled(row * kGroupBytes + (2 * k + lane / 16) * 16, Swizzle::bytes_128),
          packed);
    }
    device::fence_proxy_async();  // the other warpgroup's wgmma reads them
    __syncwarp();
    if (lane == 0) device::mbarrier_arrive(full);
    buffer_.advance();
  }

  DGEMMA_DEVICE State<kHeadDim> begin_output(const KeyRange& keys, int32_t tile) {
    const bool scattered = is_scattered_tile<kHeadDim>(keys, tile);
    const State<kHeadDim> first = at_;
#pragma unroll
    for (int i = 0; i < kStagesPerTile; ++i, at_.advance()) {
      const void* const stage = wait_for_stage(shared_.common, at_, scattered);
      device::wgmma_fence(columns_.output[i], softmax_.exponentials);
      columns_.begin(stage, i, softmax_.exponentials);
    }
    at_.advance(kStagesPerTile);  // the other warpgroup's
    return first;
  }

  DGEMMA_DEVICE void end_output(State<kHeadDim> at) {
    static_assert(kStagesPerTile == 2);
    device::wgmma_wait<1>();
    release(shared_.common, at);
    at.advance();
    device::wgmma_wait<0>(columns_.output, softmax_.exponentials);
    release(shared_.common, at);
  }

  Layout& shared_;
  const int32_t row_ = first_row();
  State<kHeadDim> at_;
  sm90::PipelineState<kBuffers> buffer_;
  Softmax<T::kKeys> softmax_;
  Columns columns_;
};

// The second warpgroup: the second half of the columns.
class SecondWarpgroup {
 public:
  DGEMMA_DEVICE explicit SecondWarpgroup(Layout& shared) : shared_(shared) {}

  DGEMMA_DEVICE void attend(const KeyRange& keys) {
    if (keys.tiles == 0) return;
    at_.advance(Shared<kHeadDim>::kStagesPerTile);
#pragma unroll 1
    for (int32_t tile = 0; tile < keys.tiles; ++tile) {
      if (tile + 1 < keys.tiles)
        at_.advance(Shared<kHeadDim>::kStagesPerTile);  // the next tile's keys
      at_.advance(kStagesPerTile);                      // the other's values
      const uint32_t buffer = buffer_.stage;
      shared_.exponentials_pipeline.consumer_wait(buffer_);
      columns_.multiply(shared_.factors[buffer][row_], shared_.factors[buffer][row_ + 8]);
      const auto exponentials =
          device::k_major_descriptor(shared_.exponentials[buffer], Swizzle::bytes_128);
      const bool scattered = is_scattered_tile<kHeadDim>(keys, tile);
      State<kHeadDim> value = at_;
#pragma unroll
      for (int i = 0; i < kStagesPerTile; ++i, at_.advance()) {
        const void* const stage = wait_for_stage(shared_.common, at_, scattered);
        device::wgmma_fence(columns_.output[i]);
        columns_.begin(stage, i, exponentials);
      }
      device::wgmma_wait<1>();
      release(shared_.common, value);
      value.advance();
      device::wgmma_wait<0>(columns_.output);
      release(shared_.common, value);
      shared_.exponentials_pipeline.consumer_release(buffer_);
      buffer_.advance();
    }
  }

  DGEMMA_DEVICE void wait_for_sums() { device::named_barrier_sync(kSumsBarrier, 2 * 32 * kWarps); }

  DGEMMA_DEVICE void store(const Attention& p, const AttentionRequest& request,
                           const BlockCoordinates& at) {
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      const int32_t row = row_ + 8 * which;
      if (has_row(p, request, at, row))
        columns_.store(p, request, at, row, which, kHeadDim / 2, shared_.sums[row]);
    }
  }

 private:
  Layout& shared_;
  const int32_t row_ = first_row();
  State<kHeadDim> at_;
  sm90::PipelineState<kBuffers> buffer_;
  Columns columns_;
};

__global__ void __launch_bounds__(kAttentionThreads90, 1)
    attention(const __grid_constant__ KeyMaps maps, const __grid_constant__ Attention p) {
  auto& shared = device::shared_memory<Layout>();
  if (threadIdx.x == 0) {
    initialise(shared.common, maps, p);
    shared.exponentials_pipeline.initialise(kWarps, kWarps);
    device::fence_mbarrier_init();
  }
  device::wait_for_previous_kernel();
  device::let_next_kernel_begin();
  const AttentionRequest request = find_request(p, static_cast<int32_t>(blockIdx.z));
  const BlockCoordinates at = find_coordinates(p, request);
  if (at.row_tile < 0 || at.split >= request.splits) return;  // with the whole cluster
  const KeyRange keys = find_keys(p, request, at, shared.common);
  device::cluster_sync();  // the barriers of both blocks are there

  const uint32_t warpgroup = device::warpgroup_index();
  if (warpgroup == 0) {
    Registers::take();
    FirstWarpgroup first(shared, p, at);
    first.attend(keys);
    first.finish();
    device::cluster_arrive();
    first.store(p, request, at);
  } else if (warpgroup == 1) {
    Registers::take();
    SecondWarpgroup second(shared);
    second.attend(keys);
    second.wait_for_sums();
    device::cluster_arrive();
    second.store(p, request, at);
  } else {
    Registers::give_back();
    KeyProducer<kHeadDim> producer(p, request, at, keys, shared.common);
    produce_all(producer, maps, keys.tiles);
    device::cluster_arrive();
  }
  device::cluster_wait();  // the other block arrives at this one's barriers until then
}

}  // namespace

const char* launch_attention_512_sm90_bf16(const AttentionPlan& plan, const Attention& p,
                                           int32_t batch, void* stream) {
  return attention_sm90::launch<kHeadDim, Layout>(plan, p, batch, stream, attention);
}

}  // namespace dgemma
