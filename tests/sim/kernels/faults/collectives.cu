// Lanes that do not come together, and registers that are not there.
#include "device/barrier.h"
#include "device/cluster.h"
#include "device/ldmatrix.h"
#include "device/mma.h"
#include "fault.h"

namespace faults {
namespace {

void part_at_syncthreads(Arguments) {
  if (threadIdx.x < 64) __syncthreads();
}
void shuffle_with_ended_lane(Arguments) {
  if (lane_index() == 5) return;
  __shfl_xor_sync(kAllLanes, 1, 1);
}
void lanes_part(Arguments) {
  if (lane_index() < 16)
    __ballot_sync(kAllLanes, 1);
  else
    __any_sync(kAllLanes, 1);
}
void lane_outside_its_mask(Arguments) { __shfl_sync(0xffffu, 1, 0); }
void shuffle_from_outside_the_mask(Arguments) {
  if (lane_index() < 16) __shfl_xor_sync(0xffffu, 1, 16);
}
// The sum of a row as csrc/layer once had it, and the last lines of csrc/denoise's soft_finish.cu:
// warp_index() is a shuffle of all lanes, which only one of them reaches.
void warp_index_of_one_lane(Arguments a) {
  auto* sum = reinterpret_cast<float*>(a.global);
  float value = 1.0f;
  for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(kAllLanes, value, lanes);
  if (lane_index() == 0) sum[warp_index()] = value;
  __syncthreads();
  float total = 0.0f;
  for (uint32_t warp = 0; warp < blockDim.x / 32; ++warp) total += sum[warp];
  __syncthreads();
}
void warpgroup_index_of_one_lane(Arguments a) {
  if (lane_index() == 0) a.global[warpgroup_index()] = 1;
  __syncthreads();
  if (threadIdx.x != 0) return;
}
void elect_in_a_branch(Arguments) {
  if (lane_index() < 16 && elect_one()) mbarrier_init(&shared().barrier, 1);
  __syncthreads();
}
// Two instructions: a lane waits at the one for lanes that wait at the other.
void same_shuffle_in_two_places(Arguments) {
  if (lane_index() < 16)
    __shfl_xor_sync(kAllLanes, 1, 1);
  else
    __shfl_xor_sync(kAllLanes, 1, 1);
}
void load_tiles_in_two_places(Arguments) {
  uint32_t tile[1];
  const void* row = shared().tile + 16 * lane_index();
  if (lane_index() < 16)
    load_tiles(tile, row);
  else
    load_tiles(tile, row);
}
void mma_of_some_lanes(Arguments) {
  float d[4] = {};
  const uint32_t a[4] = {}, b[2] = {};
  if (lane_index() < 31) mma_m16n8k16(d, a, b);
  __syncwarp();
}
void mma_e4m3_of_some_lanes(Arguments) {
  float d[4] = {};
  const uint32_t a[4] = {}, b[2] = {};
  if (lane_index() < 31) mma_m16n8k32_e4m3(d, a, b);
  __syncwarp();
}
void mma_int8_of_some_lanes(Arguments) {
  int32_t d[4] = {};
  const uint32_t a[4] = {}, b[2] = {};
  if (lane_index() < 31) mma_m16n8k32_int8(d, a, b);
  __syncwarp();
}
void barrier_of_some_lanes(Arguments) {
  if (lane_index() < 16) named_barrier_sync(1, 64);
  __syncwarp();
}
void barriers_of_two_numbers(Arguments) { named_barrier_sync(1 + lane_index() / 16, 64); }
void syncthreads_in_two_places(Arguments) {
  if (lane_index() < 16)
    __syncthreads();
  else
    __syncthreads();
}
void cluster_arrive_of_some_lanes(Arguments) {
  if (lane_index() != 3) cluster_arrive();
  cluster_wait();
}
// The head once asked for 65,536 registers with a block of 384 threads, which owns 384 x 168.
void more_registers_than_the_block_has(Arguments) {
  if (warpgroup_index() < 2)
    increase_registers<192>();
  else
    decrease_registers<128>();
}
void registers_of_some_lanes(Arguments) {
  if (lane_index() < 31) decrease_registers<40>();
}
void registers_of_some_warps(Arguments) {
  if (warp_index() != 2) decrease_registers<40>();
}
void registers_of_two_counts(Arguments) {
  if (warp_index() != 2)
    decrease_registers<40>();
  else
    decrease_registers<48>();
}
void increase_to_fewer_registers(Arguments) { increase_registers<160>(); }

}  // namespace

std::vector<Fault> collective_faults() {
  return {
      FAULT(part_at_syncthreads),
      FAULT(shuffle_with_ended_lane),
      FAULT(lanes_part),
      FAULT(lane_outside_its_mask),
      FAULT(shuffle_from_outside_the_mask),
      FAULT(warp_index_of_one_lane),
      FAULT(warpgroup_index_of_one_lane),
      FAULT(elect_in_a_branch),
      FAULT(same_shuffle_in_two_places),
      FAULT(load_tiles_in_two_places),
      FAULT(mma_of_some_lanes),
      FAULT(mma_e4m3_of_some_lanes),
      FAULT(mma_int8_of_some_lanes),
      FAULT(barrier_of_some_lanes),
      FAULT(barriers_of_two_numbers),
      FAULT(syncthreads_in_two_places),
      FAULT(cluster_arrive_of_some_lanes),
      {"more_registers_than_the_block_has", more_registers_than_the_block_has, 384},
      {"registers_of_some_lanes", registers_of_some_lanes, 384},
      {"registers_of_some_warps", registers_of_some_warps, 384},
      {"registers_of_two_counts", registers_of_two_counts, 384},
      {"increase_to_fewer_registers", increase_to_fewer_registers, 384},
  };
}

}  // namespace faults
