// Asynchronous copies: where they may go, and who waits for them.
#include "device/bulk_copy.h"
#include "device/cp_async.h"
#include "device/fence.h"
#include "fault.h"

namespace faults {
namespace {

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
void misaligned_bulk_load(Arguments a) {
  begin_barrier();
  if (!first()) return;
  mbarrier_arrive_expect_bytes(&shared().barrier, 32);
  bulk_load(shared().tile, a.global + 8, 32, &shared().barrier, evict_normal());
  mbarrier_wait(&shared().barrier, 0);
}
void odd_bulk_size(Arguments a) {
  if (first()) bulk_store(a.global, shared().tile, 100);
}
void no_proxy_fence(Arguments a) {
  shared().tile[threadIdx.x] = 1;
  __syncthreads();
  if (!first()) return;
  bulk_store(a.global, shared().tile, 128);
  bulk_commit();
  bulk_wait<0>();
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
void no_proxy_fence_before_tma_store(Arguments a) {
  for (uint32_t i = threadIdx.x; i < 1024; i += 128) shared().tile[i] = 1;
  __syncthreads();
  if (!first()) return;
  tma_store(&a.map, shared().tile, 0, 0);
  bulk_commit();
  bulk_wait<0>();
}
void misaligned_tma_store(Arguments a) {
  if (first()) tma_store(&a.map, shared().tile + 512, 0, 0);
}
// Two boxes that overlap, in no order.
void stored_twice_by_tma(Arguments a) {
  if (!first()) return;
  fence_proxy_async();
  tma_store(&a.map, shared().tile, 0, 0);
  tma_store(&a.map, shared().tile + 1024, 0, 4);
  bulk_commit();
  bulk_wait<0>();
}
void end_before_the_store_is_read(Arguments a) {
  if (!first()) return;
  bulk_store(a.global, shared().tile, 128);
  bulk_commit();
}
void forget_bulk_commit(Arguments a) {
  if (!first()) return;
  fence_proxy_async();
  bulk_store(a.global, shared().tile, 128);
  bulk_wait<0>();
}
// bulk_wait_read() says that the source was read, not that the destination is written.
void read_what_a_bulk_store_writes(Arguments a) {
  if (!first()) return;
  fence_proxy_async();
  bulk_store(a.global, shared().tile, 128);
  bulk_commit();
  bulk_wait_read<0>();
  a.global[200] = a.global[16];
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
void copy_past_the_end(Arguments a) {
  cp_async_16(shared().tile + sizeof(Shared) - 16, a.global);
  cp_async_16(shared().tile + sizeof(Shared), a.global);
}
void misaligned_cp_async(Arguments a) { cp_async_16(shared().tile + 8, a.global); }
void end_before_cp_async(Arguments a) {
  cp_async_16(shared().tile + 16 * threadIdx.x, a.global);
  cp_async_commit();
}
// Every lane of a warp but the first copies with the ordinary instruction, and nobody waits.
void end_before_own_cp_async(Arguments a) {
  begin_barrier(128);
  cp_async_16(shared().tile + 16 * threadIdx.x, a.global);
  cp_async_mbarrier_arrive(&shared().barrier);
  if (threadIdx.x >= 32) return;
  mbarrier_wait(&shared().barrier, 0);
}
// The wait is for committed groups alone.
void forget_cp_async_commit(Arguments a) {
  cp_async_16(shared().tile + 16 * threadIdx.x, a.global);
  cp_async_wait<0>();
  a.global[threadIdx.x] = shared().tile[16 * threadIdx.x];
}
void read_anothers_cp_async(Arguments a) {
  volatile uint8_t* tile = shared().tile;
  cp_async_16(shared().tile + 16 * threadIdx.x, a.global);
  cp_async_commit();
  __syncthreads();
  cp_async_wait<0>();
  a.global[threadIdx.x] = tile[16 * (threadIdx.x ^ 1)];
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

void prefetch_by_too_few_coordinates(Arguments a) { tma_prefetch_to_l2(&a.map, 0, 0, 0); }

}  // namespace

std::vector<Fault> copy_faults() {
  return {
      FAULT(misaligned_tile),
      FAULT(prefetch_by_too_few_coordinates),
      FAULT(misaligned_swizzle),
      FAULT(end_before_the_copy),
      FAULT(misaligned_bulk_load),
      FAULT(odd_bulk_size),
      FAULT(no_proxy_fence),
      FAULT(some_forget_the_proxy_fence),
      FAULT(no_proxy_fence_before_tma_store),
      FAULT(misaligned_tma_store),
      FAULT(stored_twice_by_tma),
      FAULT(end_before_the_store_is_read),
      FAULT(forget_bulk_commit),
      FAULT(read_what_a_bulk_store_writes),
      FAULT(write_before_the_store_is_read),
      FAULT(copy_past_the_end),
      FAULT(misaligned_cp_async),
      FAULT(end_before_cp_async),
      FAULT(end_before_own_cp_async),
      FAULT(forget_cp_async_commit),
      FAULT(read_anothers_cp_async),
      FAULT(copy_over_what_was_read),
      FAULT(read_before_the_copy),
  };
}

}  // namespace faults
