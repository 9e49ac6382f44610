// Global memory: races, flags, the kernel in front, and what lies outside.
#include "device/bulk_copy.h"
#include "device/cp_async.h"
#include "device/memory.h"
#include "fault.h"

namespace faults {
namespace {

void misaligned_load_once(Arguments a) {
  const uint4 seen = load_once(a.global + 4 * threadIdx.x);
  if (seen.x == 77) shared().tile[0] = 1;
}
void misaligned_store_once(Arguments a) { store_once(a.global + 8 + 16 * threadIdx.x, uint4{}); }
void write_the_same_word(Arguments a) {
  if (threadIdx.x % 64 == 5) *reinterpret_cast<volatile uint32_t*>(a.global) = threadIdx.x;
}
// 16 bytes at once, of zeros and of what the front kernel wrote.
void copy_over_what_others_copied(Arguments a) {
  wait_for_previous_kernel();
  auto* global = reinterpret_cast<uint4*>(a.global);
  if (threadIdx.x % 64 == 5) global[0] = global[1 + threadIdx.x / 64 * 256];
}
void read_what_another_block_writes(Arguments a) {
  volatile uint8_t* global = a.global;
  if (blockIdx.x == 0) global[threadIdx.x] = 1;
  if (blockIdx.x == 1) global[512 + threadIdx.x] = global[threadIdx.x];
}
// In place, where another block still reads the row.
void store_once_over_what_others_read(Arguments a) {
  uint4 row = load_once(a.global + 16 * threadIdx.x);
  row.x += 1;
  if (blockIdx.x == 1) store_once(a.global + 16 * threadIdx.x, row);
}
void wait_for_a_flag(Arguments a) {
  while (load_acquire(reinterpret_cast<uint32_t*>(a.global)) != 7) {
  }
}
void flag_without_release(Arguments a) {
  auto* flag = reinterpret_cast<uint32_t*>(a.global);
  if (blockIdx.x == 0 && first()) *static_cast<volatile uint32_t*>(flag) = 1;
  if (blockIdx.x == 1 && first())
    for (int i = 0; i < 3000 && load_acquire(flag) != 1; ++i) {
    }
}
void flag_before_the_data(Arguments a) {
  auto* flag = reinterpret_cast<uint32_t*>(a.global);
  volatile uint8_t* data = a.global + 64;
  if (blockIdx.x == 0 && first()) {
    store_release(flag, 1);
    data[0] = 1;
  }
  if (blockIdx.x == 1 && first()) {
    while (load_acquire(flag) != 1) {
    }
    data[1] = data[0];
  }
}
// The last block by a counter that orders nothing.
void last_block_by_a_plain_atomic(Arguments a) {
  auto* counter = reinterpret_cast<uint32_t*>(a.global);
  volatile uint8_t* parts = a.global + 64;
  if (!first()) return;
  parts[blockIdx.x] = 1;
  if (atomicAdd(counter, 1) != gridDim.x - 1) return;
  for (uint32_t block = 0; block < gridDim.x; ++block) parts[32] = parts[block];
}
// One thread adds for the block without waiting for the others.
void last_block_without_a_barrier(Arguments a) {
  auto* counter = reinterpret_cast<uint32_t*>(a.global);
  volatile uint8_t* parts = a.global + 64;
  parts[blockIdx.x * blockDim.x + threadIdx.x] = 1;
  if (first() && add_acquire_release(counter, 1) == gridDim.x - 1)
    for (uint32_t i = 0; i < gridDim.x * blockDim.x; ++i) parts[1024] = parts[i];
}
void store_past_the_end(Arguments a) {
  volatile uint8_t* global = a.global;
  global[8192 + threadIdx.x] = 1;
}
void copy_from_past_the_end(Arguments a) {
  begin_barrier();
  if (!first()) return;
  mbarrier_arrive_expect_bytes(&shared().barrier, 32);
  bulk_load(shared().tile, a.global + 8192, 32, &shared().barrier, evict_last());
  mbarrier_wait(&shared().barrier, 0);
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
// The kernel in front may still read it.
void write_before_the_wait(Arguments a) {
  a.global[2048 + threadIdx.x] = 1;
  wait_for_previous_kernel();
}
void misaligned_load(Arguments a) {
  const auto seen = *reinterpret_cast<const float2*>(a.global + 4 * threadIdx.x);
  if (seen.x == 77.0f) shared().tile[0] = 1;
}
void misaligned_store(Arguments a) {
  *reinterpret_cast<uint4*>(a.global + 8 + 16 * threadIdx.x) = uint4{};
}
// Rows of 2^30 bytes: the second of eight begins where 32 bits end.
void offset_in_32_bits(Arguments a) {
  const int32_t row = static_cast<int32_t>(gridDim.x + threadIdx.x % 8);
  const int32_t at = row * (1 << 30);
  a.global[static_cast<uint32_t>(at) >> 30] = 1;
}
void divide_by_zero(Arguments a) {
  const auto all = static_cast<int32_t>(threadIdx.x);
  a.global[all / (all / 256)] = 1;
}
void shift_too_far(Arguments a) { a.global[1 << (threadIdx.x + 30)] = 1; }
// Runs between the front kernel and the next.
void kernel_that_waits(Arguments) {
  wait_for_previous_kernel();
  let_next_kernel_begin();
}
// As down of the experts once read the tables: the kernel in front has waited for their writer.
void read_two_kernels_back(Arguments a) {
  volatile uint8_t* global = a.global + 4096;
  if (global[threadIdx.x] == 77) global[threadIdx.x] = 1;
  wait_for_previous_kernel();
}

}  // namespace

std::vector<Fault> global_memory_faults() {
  return {
      FAULT(misaligned_load_once),
      FAULT(misaligned_store_once),
      FAULT(write_the_same_word),
      FAULT(copy_over_what_others_copied),
      {"read_what_another_block_writes", read_what_another_block_writes, 128, 2},
      {"store_once_over_what_others_read", store_once_over_what_others_read, 128, 2},
      FAULT(wait_for_a_flag),
      {"flag_without_release", flag_without_release, 128, 2},
      {"flag_before_the_data", flag_before_the_data, 128, 2},
      {"last_block_by_a_plain_atomic", last_block_by_a_plain_atomic, 128, 4},
      {"last_block_without_a_barrier", last_block_without_a_barrier, 128, 4},
      FAULT(store_past_the_end),
      FAULT(copy_from_past_the_end),
      FAULT(read_before_the_wait),
      FAULT(noncoherent_after_the_wait),
      FAULT(copy_before_the_wait),
      FAULT(write_before_the_wait),
      FAULT(misaligned_load),
      FAULT(misaligned_store),
      FAULT(offset_in_32_bits),
      FAULT(divide_by_zero),
      FAULT(shift_too_far),
      {"read_two_kernels_back", read_two_kernels_back, 128, 1, 1, kernel_that_waits},
  };
}

}  // namespace faults
