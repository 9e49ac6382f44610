// Blocks of a cluster, and their shared memory.
#include "device/bulk_copy.h"
#include "device/cluster.h"
#include "device/fence.h"
#include "fault.h"

namespace faults {
namespace {

void cluster_arrive_twice(Arguments) {
  cluster_arrive();
  cluster_arrive();
}
void cluster_wait_alone(Arguments) { cluster_wait(); }
// The other block's threads have ended, so that the barrier never completes.
void cluster_sync_of_one_block(Arguments) {
  if (cluster_block_rank() == 1) return;
  sleep_long();
  cluster_sync();
}
void leave_between_arrive_and_wait(Arguments) { cluster_arrive(); }
void touch_a_block_that_left(Arguments) {
  if (cluster_block_rank() == 1) return;
  sleep_long();
  if (first()) *shared_of_block(&shared().tile[0], 1) = 1;
}
// The block's last thread does not know that the other block is done with its memory.
void leave_while_others_touch(Arguments) {
  if (cluster_block_rank() == 1 && threadIdx.x == 0) sleep_long();
  if (cluster_block_rank() == 0 && first()) *shared_of_block(&shared().tile[0], 1) = 1;
}
void block_outside_the_cluster(Arguments) {
  if (first()) *shared_of_block(&shared().tile[0], cluster_blocks()) = 1;
}
void arrive_at_a_block_that_left(Arguments) {
  if (cluster_block_rank() == 1) return;
  sleep_long();
  if (first()) mbarrier_arrive_at_block(&shared().barrier, 1);
}
// The arrival tells the other block that this one has read, and not what it has written.
void write_and_arrive_at_another_block(Arguments) {
  begin_barrier();
  cluster_sync();
  if (cluster_block_rank() == 1 && first()) {
    *shared_of_block(&shared().tile[0], 0) = 1;
    mbarrier_arrive_at_block(&shared().barrier, 0);
  }
  if (cluster_block_rank() == 0 && first()) {
    mbarrier_wait(&shared().barrier, 0);
    shared().tile[1] = shared().tile[0];
  }
  cluster_sync();
}
void leave_before_the_copy_to_a_block(Arguments) {
  begin_barrier();
  fence_proxy_async();
  cluster_sync();
  if (cluster_block_rank() == 1) {
    if (first()) mbarrier_arrive_expect_bytes(&shared().barrier, 64);
    mbarrier_wait(&shared().barrier, 0);
  } else if (first()) {
    bulk_copy_to_block(shared().tile, shared().tile + 64, 64, &shared().barrier, 1);
  }
}
void multicast_outside_the_cluster(Arguments a) {
  begin_barrier();
  if (!first()) return;
  mbarrier_arrive_expect_bytes(&shared().barrier, 1024);
  tma_load_multicast(shared().tile, &a.map, &shared().barrier, evict_first(), 0b101, 0, 0);
  mbarrier_wait(&shared().barrier, 0);
}
void multicast_to_a_block_that_left(Arguments a) {
  begin_barrier();
  if (cluster_block_rank() == 1) return;
  sleep_long();
  if (!first()) return;
  mbarrier_arrive_expect_bytes(&shared().barrier, 1024);
  tma_load_multicast(shared().tile, &a.map, &shared().barrier, evict_first(), 0b11, 0, 0);
  mbarrier_wait(&shared().barrier, 0);
}

}  // namespace

std::vector<Fault> cluster_faults() {
  return {
      FAULT(cluster_arrive_twice),
      FAULT(cluster_wait_alone),
      {"cluster_sync_of_one_block", cluster_sync_of_one_block, 128, 2, 2},
      {"leave_between_arrive_and_wait", leave_between_arrive_and_wait, 128, 2, 2},
      {"touch_a_block_that_left", touch_a_block_that_left, 128, 2, 2},
      {"leave_while_others_touch", leave_while_others_touch, 128, 2, 2},
      {"block_outside_the_cluster", block_outside_the_cluster, 128, 2, 2},
      {"arrive_at_a_block_that_left", arrive_at_a_block_that_left, 128, 2, 2},
      {"write_and_arrive_at_another_block", write_and_arrive_at_another_block, 128, 2, 2},
      {"leave_before_the_copy_to_a_block", leave_before_the_copy_to_a_block, 128, 2, 2},
      {"multicast_outside_the_cluster", multicast_outside_the_cluster, 128, 2, 2},
      {"multicast_to_a_block_that_left", multicast_to_a_block_that_left, 128, 2, 2},
  };
}

}  // namespace faults
