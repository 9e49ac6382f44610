// One small kernel per mistake that the test bed must report: tests/test_sim_faults.py names them
// and what is said.
#include <algorithm>
#include <cstring>
#include <iterator>
#include <string_view>

#include "device/barrier.h"
#include "device/bfloat16.h"
#include "device/bulk_copy.h"
#include "device/cluster.h"
#include "device/cp_async.h"
#include "device/fence.h"
#include "device/launch.h"
#include "device/ldmatrix.h"
#include "device/mbarrier.h"
#include "device/memory.h"
#include "device/mma.h"
#include "device/shared_memory.h"
#include "device/tma.h"
#include "device/warp.h"
#include "device/wgmma.h"
#include "entry.h"

namespace {

using namespace dgemma::device;

struct Shared {
  alignas(1024) uint8_t tile[4096];
  Mbarrier barrier;
};

struct Arguments {
  uint8_t* global;  // 8,192 bytes
  TensorMap map;    // 64x64 bfloat16 of it, boxes of 64x8, 128-byte swizzle
  TensorMap plain;  // the same with boxes of 8x8, no swizzle
};

using Kernel = void (*)(Arguments);

DGEMMA_DEVICE Shared& shared() { return shared_memory<Shared>(); }
DGEMMA_DEVICE bool first() { return threadIdx.x == 0; }

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
void arrive_too_often(Arguments) {
  if (!first()) return;
  mbarrier_init(&shared().barrier, 1);
  mbarrier_arrive_expect_bytes(&shared().barrier, 16);
  mbarrier_arrive(&shared().barrier);
}
void too_many_bytes(Arguments a) {
  if (!first()) return;
  mbarrier_init(&shared().barrier, 1);
  fence_mbarrier_init();
  mbarrier_arrive_expect_bytes(&shared().barrier, 16);
  bulk_load(shared().tile, a.global, 32, &shared().barrier, evict_first());
  mbarrier_wait(&shared().barrier, 0);
}
void too_few_bytes(Arguments a) {
  if (!first()) return;
  mbarrier_init(&shared().barrier, 1);
  fence_mbarrier_init();
  mbarrier_arrive_expect_bytes(&shared().barrier, 48);
  bulk_load(shared().tile, a.global, 32, &shared().barrier, evict_first());
  mbarrier_wait(&shared().barrier, 0);
}
void initialise_twice(Arguments) {
  if (!first()) return;
  mbarrier_init(&shared().barrier, 1);
  mbarrier_init(&shared().barrier, 1);
}
void never_initialise(Arguments) { mbarrier_wait(&shared().barrier, 0); }
void overwrite_mbarrier(Arguments) {
  if (!first()) return;
  mbarrier_init(&shared().barrier, 1);
  shared().barrier.state = 1;
  mbarrier_arrive(&shared().barrier);
}
void no_mbarrier_fence(Arguments a) {
  if (!first()) return;
  mbarrier_init(&shared().barrier, 1);
  mbarrier_arrive_expect_bytes(&shared().barrier, 32);
  bulk_load(shared().tile, a.global, 32, &shared().barrier, evict_first());
  mbarrier_wait(&shared().barrier, 0);
}
void wait_for_nobody(Arguments) {
  if (first()) mbarrier_init(&shared().barrier, 2);
  __syncthreads();
  if (first()) mbarrier_arrive(&shared().barrier);
  mbarrier_wait(&shared().barrier, 0);
}
void load(Arguments& a, const TensorMap* map, uint32_t offset, uint32_t bytes) {
  if (!first()) return;
  mbarrier_init(&shared().barrier, 1);
  fence_mbarrier_init();
  mbarrier_arrive_expect_bytes(&shared().barrier, bytes);
  tma_load(shared().tile + offset, map, &shared().barrier, evict_first(), 0, 0);
  if (a.global) mbarrier_wait(&shared().barrier, 0);
}
void misaligned_tile(Arguments a) { load(a, &a.plain, 64, 128); }
void misaligned_swizzle(Arguments a) { load(a, &a.map, 128, 1024); }
void end_before_the_copy(Arguments a) {
  a.global = nullptr;
  load(a, &a.map, 0, 1024);
}
void no_proxy_fence(Arguments a) {
  shared().tile[threadIdx.x] = 1;
  __syncthreads();
  if (!first()) return;
  bulk_store(a.global, shared().tile, 128);
  bulk_commit();
  bulk_wait<0>();
}
void end_before_the_store_is_read(Arguments a) {
  if (!first()) return;
  bulk_store(a.global, shared().tile, 128);
  bulk_commit();
}
void odd_bulk_size(Arguments a) {
  if (first()) bulk_store(a.global, shared().tile, 100);
}
void touch_past_the_end(Arguments) {
  volatile uint8_t* tile = shared().tile;
  tile[8192] = 1;
}
void copy_past_the_end(Arguments a) {
  cp_async_16(shared().tile + sizeof(Shared) - 16, a.global);
  cp_async_16(shared().tile + sizeof(Shared), a.global);
}
void misaligned_cp_async(Arguments a) { cp_async_16(shared().tile + 8, a.global); }
void misaligned_ldmatrix(Arguments) {
  uint32_t tile[1];
  load_tiles(tile, shared().tile + 8);
}
void end_before_cp_async(Arguments a) {
  cp_async_16(shared().tile + 16 * threadIdx.x, a.global);
  cp_async_commit();
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
void barrier_counts_differ(Arguments) { named_barrier_sync(1, threadIdx.x < 64 ? 64 : 96); }
void barrier_twice(Arguments) {
  if (threadIdx.x < 32) named_barrier_arrive(1, 128);
  if (threadIdx.x < 32) named_barrier_arrive(1, 128);
  named_barrier_sync(2, 128);
  named_barrier_sync(1, 128);
}
void barrier_of_odd_count(Arguments) { named_barrier_sync(1, 100); }
void wait_for_a_flag(Arguments a) {
  while (load_acquire(reinterpret_cast<uint32_t*>(a.global)) != 7) {
  }
}
void cluster_arrive_twice(Arguments) {
  cluster_arrive();
  cluster_arrive();
}
void fill_the_stack(Arguments a) {
  volatile uint8_t room[4096];
  room[0] = 1;
  if (a.global[0] == 0) fill_the_stack(a);
  room[1] = room[0];
}
struct TooLarge {
  uint8_t bytes[100000];
};
void struct_too_large(Arguments) { shared_memory<TooLarge>().bytes[0] = 0; }

// Faults of memory and of copies.
void begin_barrier(uint32_t arrivals = 1) {
  if (first()) {
    mbarrier_init(&shared().barrier, arrivals);
    fence_mbarrier_init();
  }
  __syncthreads();
}
// Every lane of a warp but the first copies with the ordinary instruction, and nobody waits.
void end_before_own_cp_async(Arguments a) {
  begin_barrier(128);
  cp_async_16(shared().tile + 16 * threadIdx.x, a.global);
  cp_async_mbarrier_arrive(&shared().barrier);
  if (threadIdx.x >= 32) return;
  mbarrier_wait(&shared().barrier, 0);
}
void two_phases_behind(Arguments a) {
  begin_barrier();
  auto* flag = reinterpret_cast<uint32_t*>(a.global);
  if (first()) {
    mbarrier_arrive(&shared().barrier);
    while (load_acquire(flag) != 1) {
    }
    mbarrier_wait(&shared().barrier, 0);
    for (uint32_t phase = 1; phase < 3; ++phase) {
      mbarrier_arrive(&shared().barrier);
      mbarrier_wait(&shared().barrier, phase % 2);
    }
    store_release(flag, 2);
  } else if (threadIdx.x == 32) {
    mbarrier_wait(&shared().barrier, 0);
    store_release(flag, 1);
    while (load_acquire(flag) != 2) {
    }
    mbarrier_wait(&shared().barrier, 1);
  }
}
void initialise_unseen(Arguments) {
  if (first()) mbarrier_init(&shared().barrier, 1);
  if (threadIdx.x == 32) {
    while (shared().barrier.state == ~uint64_t{0}) __nanosleep(1);
    mbarrier_arrive(&shared().barrier);
  }
}
// Each warp writes its part, but only the first warp's lanes call the fence.
void some_forget_the_proxy_fence(Arguments a) {
  shared().tile[threadIdx.x] = 1;
  if (threadIdx.x < 32) fence_proxy_async();
  __syncthreads();
  if (!first()) return;
  bulk_store(a.global, shared().tile, 128);
  bulk_commit();
  bulk_wait<0>();
}
void copy_over_what_was_read(Arguments a) {
  begin_barrier();
  volatile uint8_t* tile = shared().tile;
  const uint8_t seen = tile[threadIdx.x];
  __syncthreads();
  if (first()) {
    mbarrier_arrive_expect_bytes(&shared().barrier, 128 + 0 * seen);
    bulk_load(shared().tile, a.global, 128, &shared().barrier, evict_first());
  }
  mbarrier_wait(&shared().barrier, 0);
}
void write_without_barrier(Arguments a) {
  volatile uint8_t* tile = shared().tile;
  tile[threadIdx.x] = 1;
  a.global[threadIdx.x] = tile[(threadIdx.x + 64) % 128];
}
void write_within_a_warp(Arguments a) {
  volatile uint8_t* tile = shared().tile;
  tile[threadIdx.x] = 1;
  a.global[threadIdx.x] = tile[threadIdx.x ^ 1];
}
void write_what_others_read(Arguments) {
  volatile uint8_t* tile = shared().tile;
  if (first()) tile[0] = 1;
  __syncthreads();
  const uint8_t seen = tile[0];
  if (threadIdx.x == 64) tile[0] = seen + 1;
}
void read_before_the_copy(Arguments a) {
  begin_barrier();
  if (first()) {
    mbarrier_arrive_expect_bytes(&shared().barrier, 128);
    bulk_load(shared().tile, a.global, 128, &shared().barrier, evict_first());
  }
  volatile uint8_t* tile = shared().tile;
  if (threadIdx.x == 32) a.global[200] = tile[5];
  mbarrier_wait(&shared().barrier, 0);
}
void write_before_the_store_is_read(Arguments a) {
  if (!first()) return;
  fence_proxy_async();
  bulk_store(a.global, shared().tile, 128);
  bulk_commit();
  volatile uint8_t* tile = shared().tile;
  tile[3] = 1;
  bulk_wait<0>();
}
void read_anothers_cp_async(Arguments a) {
  volatile uint8_t* tile = shared().tile;
  cp_async_16(shared().tile + 16 * threadIdx.x, a.global);
  cp_async_commit();
  __syncthreads();
  cp_async_wait<0>();
  a.global[threadIdx.x] = tile[16 * (threadIdx.x ^ 1)];
}
void atomic_beside_ordinary(Arguments) {
  auto* counter = reinterpret_cast<uint32_t*>(shared().tile);
  if (threadIdx.x < 32) atomicAdd(counter, 1);
  if (threadIdx.x == 64) *static_cast<volatile uint32_t*>(counter) = 0;
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
void read_before_the_wait(Arguments a) {
  volatile uint8_t* global = a.global + 4096;
  if (global[threadIdx.x] == 77) global[threadIdx.x] = 1;
  wait_for_previous_kernel();
}
void noncoherent_after_the_wait(Arguments a) {
  wait_for_previous_kernel();
  if (__ldg(a.global + 4096) == 77) shared().tile[0] = 1;
}
void copy_before_the_wait(Arguments a) {
  cp_async_16(shared().tile + 16 * threadIdx.x, a.global + 4096);
  cp_async_wait<0>();
  wait_for_previous_kernel();
}
// As down of the experts once read the tables: the kernel in front has waited for their writer.
void read_two_kernels_back(Arguments a) { read_before_the_wait(a); }
// Runs in front of each of these.
void front_kernel(Arguments a) { a.global[4096 + threadIdx.x] = 1; }
// Runs between the two where a fault asks for it.
void kernel_that_waits(Arguments) {
  wait_for_previous_kernel();
  let_next_kernel_begin();
}
void prefetch_by_too_few_coordinates(Arguments a) { tma_prefetch_to_l2(&a.map, 0, 0, 0); }

struct Fault {
  const char* name;
  Kernel kernel;
  uint32_t threads = 128;
  bool behind_two = false;
};
#define FAULT(name) {#name, name}
constexpr Fault kFaults[] = {
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
    FAULT(barrier_of_some_lanes),
    FAULT(barriers_of_two_numbers),
    FAULT(syncthreads_in_two_places),
    FAULT(cluster_arrive_of_some_lanes),
    {"wgmma_fence_of_some_lanes", lanes_of_wgmma<0>},
    {"wgmma_in_two_places", lanes_of_wgmma<1>},
    {"wgmma_commit_of_one_lane", lanes_of_wgmma<2>},
    {"wgmma_wait_of_some_lanes", lanes_of_wgmma<3>},
    {"more_registers_than_the_block_has", more_registers_than_the_block_has, 384},
    {"registers_of_some_lanes", registers_of_some_lanes, 384},
    {"registers_of_some_warps", registers_of_some_warps, 384},
    {"registers_of_two_counts", registers_of_two_counts, 384},
    {"increase_to_fewer_registers", increase_to_fewer_registers, 384},
    FAULT(arrive_too_often),
    FAULT(too_many_bytes),
    FAULT(too_few_bytes),
    FAULT(initialise_twice),
    FAULT(never_initialise),
    FAULT(overwrite_mbarrier),
    FAULT(no_mbarrier_fence),
    FAULT(wait_for_nobody),
    FAULT(misaligned_tile),
    FAULT(misaligned_swizzle),
    FAULT(end_before_the_copy),
    FAULT(no_proxy_fence),
    FAULT(end_before_the_store_is_read),
    FAULT(odd_bulk_size),
    FAULT(touch_past_the_end),
    FAULT(copy_past_the_end),
    FAULT(misaligned_cp_async),
    FAULT(misaligned_ldmatrix),
    FAULT(end_before_cp_async),
    {"wgmma_without_fence", faulty_wgmma<0>},
    {"wgmma_outside_shared_memory", faulty_wgmma<1>},
    {"wgmma_misaligned_swizzle", faulty_wgmma<2>},
    {"end_before_wgmma", faulty_wgmma<3>},
    {"wgmma_no_proxy_fence", faulty_wgmma<4>},
    {"wgmma_differs_by_thread", faulty_wgmma<5>},
    {"wgmma_descriptor_bits", faulty_wgmma<6>},
    FAULT(wgmma_registers_changed),
    FAULT(barrier_counts_differ),
    FAULT(barrier_twice),
    FAULT(barrier_of_odd_count),
    FAULT(wait_for_a_flag),
    FAULT(cluster_arrive_twice),
    FAULT(fill_the_stack),
    FAULT(struct_too_large),
    FAULT(end_before_own_cp_async),
    FAULT(two_phases_behind),
    FAULT(initialise_unseen),
    FAULT(some_forget_the_proxy_fence),
    FAULT(copy_over_what_was_read),
    FAULT(write_without_barrier),
    FAULT(write_within_a_warp),
    FAULT(write_what_others_read),
    FAULT(read_before_the_copy),
    FAULT(write_before_the_store_is_read),
    FAULT(read_anothers_cp_async),
    FAULT(atomic_beside_ordinary),
    FAULT(wgmma_tile_rewritten),
    FAULT(read_before_the_wait),
    FAULT(noncoherent_after_the_wait),
    FAULT(copy_before_the_wait),
    {"read_two_kernels_back", read_two_kernels_back, 128, true},
    FAULT(prefetch_by_too_few_coordinates),
};

}  // namespace

extern "C" __attribute__((visibility("default"))) int fault_count() { return std::size(kFaults); }
SIM_ENTRY fault_name(int fault) { return kFaults[fault].name; }

SIM_ENTRY run_fault(int fault) {
  alignas(16) static uint8_t global[8192];
  std::memset(global, 0, sizeof global);
  Arguments arguments{};
  arguments.global = global;
  TensorLayout layout{ElementType::bfloat16, 2, global, {64, 64}, {0, 128}, {64, 8},
                      Swizzle::bytes_128};
  if (const char* error = encode_tensor_map(&arguments.map, layout)) return error;
  layout.box[0] = 8;
  layout.swizzle = Swizzle::none;
  if (const char* error = encode_tensor_map(&arguments.plain, layout)) return error;
  LaunchShape shape;
  shape.threads = kFaults[fault].threads;
  shape.shared_bytes = sizeof(Shared);
  if (const char* error = launch(shape, nullptr, front_kernel, arguments)) return error;
  shape.overlaps_previous_kernel = true;
  if (kFaults[fault].behind_two)
    if (const char* error = launch(shape, nullptr, kernel_that_waits, arguments)) return error;
  return launch(shape, nullptr, kFaults[fault].kernel, arguments);
}

// A launch with so much shared memory.
SIM_ENTRY launch_with(uint32_t shared_bytes) {
  LaunchShape shape;
  shape.threads = 32;
  shape.shared_bytes = shared_bytes;
  return launch(shape, nullptr, +[](Arguments) {}, Arguments{});
}

// A TMA load on the GPU that is played.
SIM_ENTRY load_by_tma() {
  const int number = static_cast<int>(
      std::find_if(std::begin(kFaults), std::end(kFaults),
                   [](const Fault& fault) { return !std::strcmp(fault.name, "misaligned_tile"); }) -
      std::begin(kFaults));
  return run_fault(number);
}

// One tensor map out of the ordinary: which number of a layout is changed, and to what.
SIM_ENTRY encode(const char* what, uint64_t value) {
  alignas(128) static uint8_t global[1024];
  TensorLayout layout{ElementType::bfloat16, 2, global, {64, 64}, {0, 128}, {64, 8},
                      Swizzle::bytes_128};
  const std::string_view name = what;
  if (name == "base") layout.base = global + value;
  if (name == "rank") layout.rank = static_cast<int>(value);
  if (name == "size") layout.size[1] = value;
  if (name == "stride") layout.stride[1] = value;
  if (name == "box") layout.box[1] = static_cast<uint32_t>(value);
  if (name == "inner box") layout.box[0] = static_cast<uint32_t>(value);
  if (name == "swizzle") layout.swizzle = static_cast<Swizzle>(value);
  TensorMap map;
  return encode_tensor_map(&map, layout);
}
