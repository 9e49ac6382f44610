// Tiles of a warp and products of a warpgroup.
#include "device/ldmatrix.h"
#include "device/wgmma.h"
#include "fault.h"

namespace faults {
namespace {

void misaligned_ldmatrix(Arguments) {
  uint32_t tile[1];
  load_tiles(tile, shared().tile + 8);
}
void misaligned_stmatrix(Arguments) {
  const uint32_t tile[1] = {};
  store_tiles(shared().tile + 16 * lane_index() + 8, tile);
}
// Each warp loads what the other is about to store, with no barrier between.
void load_tiles_of_another_warp(Arguments) {
  const uint32_t warp = warp_index();
  uint32_t tile[1] = {};
  store_tiles(shared().tile + 512 * warp + 16 * lane_index(), tile);
  load_tiles(tile, shared().tile + 512 * ((warp + 1) % 4) + 16 * lane_index());
}
void load_tiles_transposed_too_early(Arguments) {
  uint32_t tile[1] = {};
  shared().tile[16 * threadIdx.x] = 1;
  load_tiles_transposed(tile, shared().tile + 16 * lane_index());
}
void store_tiles_of_two_warps(Arguments) {
  const uint32_t tile[1] = {};
  store_tiles_transposed(shared().tile + 16 * lane_index(), tile);
}
template <int kFault>
void lanes_of_wgmma(Arguments) {
  float d[4] = {};
  const MatrixDescriptor tile = k_major_descriptor(shared().tile, Swizzle::none);
  if (kFault != 0 || lane_index() != 7) wgmma_fence(d);
  if (kFault != 1 || lane_index() < 16)
    wgmma<8>(d, tile, tile);
  else
    wgmma<8>(d, tile, tile);
  if (kFault != 2 || lane_index() == 0) wgmma_commit();
  if (kFault != 3 || lane_index() != 7) wgmma_wait<0>(d);
}
template <int kFault>
void faulty_wgmma(Arguments) {
  float d[4] = {};
  if (kFault != 0) wgmma_fence(d);
  const uint32_t offset = kFault == 1 ? 4096 : kFault == 2 ? 256 : 0;
  const MatrixDescriptor a = k_major_descriptor(shared().tile, Swizzle::none);
  MatrixDescriptor b = k_major_descriptor(shared().tile + offset, Swizzle::bytes_128);
  if (kFault == 1) b = advanced(b, 1024);
  if (kFault == 5 && threadIdx.x == 77) b = advanced(b, 32);
  if (kFault == 6) b.bits |= uint64_t{1} << 49;
  if (kFault == 4) {
    shared().tile[threadIdx.x] = 0;
    __syncthreads();
  }
  wgmma<8>(d, a, b);
  wgmma_commit();
  if (kFault != 3) wgmma_wait<0>(d);
}
// The next step's A goes into the registers of a product that may still be under way.
void wgmma_registers_changed(Arguments) {
  float d[4] = {};
  uint32_t a[2][4] = {};
  const MatrixDescriptor b = k_major_descriptor(shared().tile, Swizzle::none);
  for (uint32_t step = 0; step < 4; ++step) {
    uint32_t (&own)[4] = a[step % 2];
    wgmma_wait<2>(own);
    for (uint32_t i = 0; i < 4; ++i) own[i] = step + 1;
    wgmma_fence(d);
    wgmma<8>(d, own, b);
    wgmma_commit();
  }
  wgmma_wait<0>(d);
}
void wgmma_e4m3_without_fence(Arguments) {
  float d[4] = {};
  const MatrixDescriptor tile = k_major_descriptor(shared().tile, Swizzle::none);
  wgmma_e4m3<8>(d, tile, tile);
  wgmma_commit();
  wgmma_wait<0>(d);
}
void wgmma_tile_rewritten(Arguments) {
  float d[4] = {};
  const MatrixDescriptor a = k_major_descriptor(shared().tile, Swizzle::none);
  wgmma_fence(d);
  wgmma<8>(d, a, a);
  wgmma_commit();
  volatile uint8_t* tile = shared().tile;
  tile[threadIdx.x] = 0;
  wgmma_wait<0>(d);
}

}  // namespace

std::vector<Fault> matrix_faults() {
  return {
      FAULT(misaligned_ldmatrix),
      FAULT(misaligned_stmatrix),
      FAULT(load_tiles_of_another_warp),
      FAULT(load_tiles_transposed_too_early),
      FAULT(store_tiles_of_two_warps),
      {"wgmma_fence_of_some_lanes", lanes_of_wgmma<0>},
      {"wgmma_in_two_places", lanes_of_wgmma<1>},
      {"wgmma_commit_of_one_lane", lanes_of_wgmma<2>},
      {"wgmma_wait_of_some_lanes", lanes_of_wgmma<3>},
      {"wgmma_without_fence", faulty_wgmma<0>},
      {"wgmma_outside_shared_memory", faulty_wgmma<1>},
      {"wgmma_misaligned_swizzle", faulty_wgmma<2>},
      {"end_before_wgmma", faulty_wgmma<3>},
      {"wgmma_no_proxy_fence", faulty_wgmma<4>},
      {"wgmma_differs_by_thread", faulty_wgmma<5>},
      {"wgmma_descriptor_bits", faulty_wgmma<6>},
      FAULT(wgmma_registers_changed),
      FAULT(wgmma_e4m3_without_fence),
      FAULT(wgmma_tile_rewritten),
  };
}

}  // namespace faults
