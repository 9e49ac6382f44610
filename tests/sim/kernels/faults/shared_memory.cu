// Ordinary accesses to shared memory, and the stack.
#include "fault.h"

namespace faults {
namespace {

void touch_past_the_end(Arguments) {
  volatile uint8_t* tile = shared().tile;
  tile[8192] = 1;
}
struct TooLarge {
  uint8_t bytes[100000];
};
void struct_too_large(Arguments) { shared_memory<TooLarge>().bytes[0] = 0; }
void fill_the_stack(Arguments a) {
  volatile uint8_t room[4096];
  room[0] = 1;
  if (a.global[0] == 0) fill_the_stack(a);
  room[1] = room[0];
}
void write_without_barrier(Arguments a) {
  volatile uint8_t* tile = shared().tile;
  tile[threadIdx.x] = 1;
  a.global[threadIdx.x] = tile[(threadIdx.x + 64) % 128];
}
// Into the barrier, which lies behind the tile.
void index_past_an_array(Arguments) {
  if (threadIdx.x == 7) shared().tile[4096 + threadIdx.x] = 1;
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
void atomic_beside_ordinary(Arguments) {
  auto* counter = reinterpret_cast<uint32_t*>(shared().tile);
  if (threadIdx.x < 32) atomicAdd(counter, 1);
  if (threadIdx.x == 64) *static_cast<volatile uint32_t*>(counter) = 0;
}

}  // namespace

std::vector<Fault> shared_memory_faults() {
  return {
      FAULT(touch_past_the_end),     FAULT(struct_too_large),    FAULT(fill_the_stack),
      FAULT(write_without_barrier),  FAULT(write_within_a_warp), FAULT(write_what_others_read),
      FAULT(atomic_beside_ordinary), FAULT(index_past_an_array),
  };
}

}  // namespace faults
