// Named barriers and mbarriers.
#include "device/barrier.h"
#include "device/bulk_copy.h"
#include "device/fence.h"
#include "device/memory.h"
#include "fault.h"

namespace faults {
namespace {

void barrier_counts_differ(Arguments) { named_barrier_sync(1, threadIdx.x < 64 ? 64 : 96); }
void barrier_twice(Arguments) {
  if (threadIdx.x < 32) named_barrier_arrive(1, 128);
  if (threadIdx.x < 32) named_barrier_arrive(1, 128);
  named_barrier_sync(2, 128);
  named_barrier_sync(1, 128);
}
void barrier_of_odd_count(Arguments) { named_barrier_sync(1, 100); }
void arrive_too_often(Arguments) {
  if (!first()) return;
  mbarrier_init(&shared().barrier, 1);
  mbarrier_arrive_expect_bytes(&shared().barrier, 16);
  mbarrier_arrive(&shared().barrier);
}
void arrive_times_too_often(Arguments) {
  if (!first()) return;
  mbarrier_init(&shared().barrier, 3);
  mbarrier_expect_bytes(&shared().barrier, 16);
  mbarrier_arrive_times(&shared().barrier, 4);
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
void expect_too_many_bytes(Arguments) {
  if (!first()) return;
  mbarrier_init(&shared().barrier, 1);
  mbarrier_expect_bytes(&shared().barrier, 1 << 20);
}
void initialise_twice(Arguments) {
  if (!first()) return;
  mbarrier_init(&shared().barrier, 1);
  mbarrier_init(&shared().barrier, 1);
}
void initialise_for_nobody(Arguments) {
  if (first()) mbarrier_init(&shared().barrier, 0);
}
void never_initialise(Arguments) { mbarrier_wait(&shared().barrier, 0); }
void initialise_unseen(Arguments) {
  if (first()) mbarrier_init(&shared().barrier, 1);
  if (threadIdx.x == 32) {
    while (shared().barrier.state == ~uint64_t{0}) __nanosleep(1);
    mbarrier_arrive(&shared().barrier);
  }
}
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
  } else if (threadIdx.x == 32) {
    mbarrier_wait(&shared().barrier, 0);
    store_release(flag, 1);
    sleep_long();
    mbarrier_wait(&shared().barrier, 1);
  }
}
void invalidate_under_a_waiter(Arguments) {
  begin_barrier();
  if (threadIdx.x == 32) mbarrier_wait(&shared().barrier, 0);
  if (!first()) return;
  sleep_long();
  mbarrier_invalidate(&shared().barrier);
}
void use_after_its_end(Arguments) {
  if (!first()) return;
  mbarrier_init(&shared().barrier, 1);
  mbarrier_invalidate(&shared().barrier);
  while (!mbarrier_try_wait(&shared().barrier, 1)) {
  }
}

}  // namespace

std::vector<Fault> barrier_faults() {
  return {
      FAULT(barrier_counts_differ),
      FAULT(barrier_twice),
      FAULT(barrier_of_odd_count),
      FAULT(arrive_too_often),
      FAULT(arrive_times_too_often),
      FAULT(too_many_bytes),
      FAULT(too_few_bytes),
      FAULT(expect_too_many_bytes),
      FAULT(initialise_twice),
      FAULT(initialise_for_nobody),
      FAULT(never_initialise),
      FAULT(initialise_unseen),
      FAULT(overwrite_mbarrier),
      FAULT(no_mbarrier_fence),
      FAULT(wait_for_nobody),
      FAULT(two_phases_behind),
      FAULT(invalidate_under_a_waiter),
      FAULT(use_after_its_end),
  };
}

}  // namespace faults
