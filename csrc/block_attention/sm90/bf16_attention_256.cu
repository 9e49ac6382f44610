// Attention of 128 rows over a part of their keys, bfloat16 on sm_90, for head dimension 256,
// canvas and causal: see sm90/bf16_keys.h for how the rows' keys come, and sm90/bf16_softmax.h.
//
// Each of two warpgroups has 64 rows, all keys and all columns: scores, exponentials and output
// stay in its registers. The scores of a tile are begun before the values of the tile in front of
// it are used, so that the tensor cores have work while exponentials are made.
#include "block_attention/sm90/bf16_softmax.h"

namespace dgemma {
namespace {

using namespace attention_sm90;

constexpr int kHeadDim = 256;
using T = Tile<kHeadDim>;

// The 64 rows of a warpgroup.
class Rows {
 public:
  DGEMMA_DEVICE Rows(const Attention& p, const BlockCoordinates& at, Shared<kHeadDim>& shared)
      : shared_(shared),
        softmax_(&shared.seen[at.row_tile % kAttentionCluster * T::kRows + first_row()], p.scale),
        query_(device::k_major_descriptor(shared.query[0][first_row()], Swizzle::bytes_128)) {}

  DGEMMA_DEVICE void attend(const KeyRange& keys) {
    if (keys.tiles == 0) return;
    wait_for_queries(shared_);
    begin_scores(keys, 0, at_);
    device::wgmma_wait<0>(softmax_.scores);
    release(shared_, at_);
    at_.advance();
    softmax_.exponentiate(keys.first, sees_all(keys, 0));
    softmax_.pack();
#pragma unroll 1
    for (int32_t tile = 1; tile < keys.tiles; ++tile) {
      const State<kHeadDim> key = at_;
      begin_scores(keys, tile, key);
      at_.advance();
      const State<kHeadDim> value = at_;
      begin_output(keys, tile - 1, value);
      at_.advance();
      device::wgmma_wait<1>(softmax_.scores);
      release(shared_, key);
      softmax_.exponentiate(keys.first + tile * T::kKeys, sees_all(keys, tile));
      device::wgmma_wait<0>(output_, softmax_.exponentials);
      release(shared_, value);
      multiply_rows(output_, softmax_.factor(0), softmax_.factor(1));
      softmax_.pack();
    }
    begin_output(keys, keys.tiles - 1, at_);
    device::wgmma_wait<0>(output_, softmax_.exponentials);
    release(shared_, at_);
  }

  DGEMMA_DEVICE void store(const Attention& p, const AttentionRequest& request,
                           const BlockCoordinates& at) {
    softmax_.finish();
    const int32_t row = first_row() + static_cast<int32_t>(device::warp_index() % 4) * 16 +
                        static_cast<int32_t>(device::lane_index()) / 4;
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      if (!has_row(p, request, at, row + 8 * which)) continue;
      store_row(p, request, at, row + 8 * which, 0, output_, which, softmax_.sum(which));
      store_sums(p, request, at, row + 8 * which, softmax_.max(which), softmax_.sum(which));
    }
  }

 private:
  DGEMMA_DEVICE static int32_t first_row() {
    return 64 * static_cast<int32_t>(device::warpgroup_index());
  }
  DGEMMA_DEVICE static bool sees_all(const KeyRange& keys, int32_t tile) {
    const int32_t first = keys.first + tile * T::kKeys;
    return first >= keys.common_first && first + T::kKeys <= keys.common_end;
  }

  // scores = query . key
  DGEMMA_DEVICE void begin_scores(const KeyRange& keys, int32_t tile, State<kHeadDim> at) {
    const void* const stage = wait_for_stage(shared_, at, is_scattered_tile<kHeadDim>(keys, tile));
    const auto key = device::k_major_descriptor(stage, Swizzle::bytes_128);
    device::wgmma_fence(softmax_.scores);
#pragma unroll
    for (uint32_t k = 0; k < kHeadDim; k += 16) {  // wgmma's K is 16
      const uint32_t group = k / kGroup, within = k % kGroup * sizeof(bfloat16);
      device::wgmma<T::kKeys>(
          softmax_.scores, device::advanced(query_, group * T::kRows * kGroupBytes + within),
          device::advanced(key, group * T::kKeys * kGroupBytes + within), k > 0);
    }
    device::wgmma_commit();
  }

  // output += exponentials . values
  DGEMMA_DEVICE void begin_output(const KeyRange& keys, int32_t tile, State<kHeadDim> at) {
    const void* const stage = wait_for_stage(shared_, at, is_scattered_tile<kHeadDim>(keys, tile));
    const auto value = device::matrix_descriptor(stage, Swizzle::bytes_128, T::kKeys * kGroupBytes,
                                                 swizzle_period(Swizzle::bytes_128));
    device::wgmma_fence(output_, softmax_.exponentials);
#pragma unroll
    for (uint32_t k = 0; k < T::kKeys; k += 16)
      device::wgmma<kHeadDim, device::Major::mn>(output_, softmax_.exponentials[k / 16],
                                                 device::advanced(value, k * kGroupBytes));
    device::wgmma_commit();
  }

  Shared<kHeadDim>& shared_;
  State<kHeadDim> at_;
  Softmax<T::kKeys> softmax_;
  device::MatrixDescriptor query_;
  float output_[kHeadDim / 2] = {};
};

__global__ void __launch_bounds__(kAttentionThreads90, 1)
    attention(const __grid_constant__ KeyMaps maps, const __grid_constant__ Attention p) {
  auto& shared = device::shared_memory<Shared<kHeadDim>>();
  if (threadIdx.x == 0) {
    initialise(shared, maps, p);
    device::fence_mbarrier_init();
  }
  device::wait_for_previous_kernel();
  device::let_next_kernel_begin();
  const AttentionRequest request = find_request(p, static_cast<int32_t>(blockIdx.z));
  const BlockCoordinates at = find_coordinates(p, request);
  if (at.row_tile < 0 || at.split >= request.splits) return;  // with the whole cluster
  const KeyRange keys = find_keys(p, request, at, shared);
  device::cluster_sync();  // the barriers of both blocks are there

  if (device::warp_index() >= kConsumerWarps) {
    Registers::give_back();
    KeyProducer<kHeadDim> producer(p, request, at, keys, shared);
    produce_all(producer, maps, keys.tiles);
    device::cluster_arrive();
  } else {
    Registers::take();
    Rows rows(p, at, shared);
    rows.attend(keys);
    device::cluster_arrive();
    rows.store(p, request, at);
  }
  device::cluster_wait();  // the other block arrives at this one's barriers until then
}

}  // namespace

const char* launch_attention_256_sm90_bf16(const AttentionPlan& plan, const Attention& p,
                                           int32_t batch, void* stream) {
  return attention_sm90::launch<kHeadDim, Shared<kHeadDim>>(plan, p, batch, stream, attention);
}

}  // namespace dgemma
