// mbarriers and asynchronous copies of plain runs of bytes: cp.async, bulk loads and stores,
// clusters.
#include "conformance.h"
#include "device/bulk_copy.h"
#include "device/cluster.h"
#include "device/cp_async.h"
#include "device/fence.h"
#include "device/mbarrier.h"
#include "device/memory.h"
#include "device/shared_memory.h"
#include "device/warp.h"

namespace conformance {
namespace {

using namespace dgemma::device;

struct Shared {
  alignas(128) uint32_t data[256];
  Mbarrier barrier;
};

// One thread walks a barrier for two arrivals through its phases and notes which parities count as
// over.
template <bool kBytes>
__global__ void phases_kernel(const uint32_t* in, uint32_t* out) {
  auto& shared = shared_memory<Shared>();
  if (threadIdx.x != 0) return;
  Mbarrier* barrier = &shared.barrier;
  mbarrier_init(barrier, 2);
  const auto over = [&] {
    const uint32_t even = mbarrier_try_wait(barrier, 0) ? 1 : 0;
    return even + (mbarrier_try_wait(barrier, 1) ? 2u : 0u);
  };
  out[0] = over();
  mbarrier_arrive(barrier);
  out[1] = over();
  mbarrier_arrive(barrier);
  out[2] = over();
  mbarrier_arrive(barrier);
  mbarrier_arrive(barrier);
  out[3] = over();
  if constexpr (kBytes) {  // arrivals alone do not end a phase that waits for bytes
    fence_mbarrier_init();
    mbarrier_expect_bytes(barrier, 16);
    mbarrier_arrive_expect_bytes(barrier, 32);
    mbarrier_arrive(barrier);
    out[4] = over();
    bulk_load(shared.data, in, 16, barrier, evict_first());
    bulk_load(shared.data + 4, in + 4, 32, barrier, evict_first());
    mbarrier_wait(barrier, 0);
    out[5] = over();
    out[6] = shared.data[0] + shared.data[11];
  }
  mbarrier_invalidate(barrier);
}

template <bool kBytes>
std::string phases() {
  std::vector<uint32_t> values(16);
  for (uint32_t i = 0; i < 16; ++i) values[i] = 100 + i;
  Buffer<uint32_t> in(values), out(kBytes ? 7 : 4);
  if (std::string problem =
          run(32, sizeof(Shared), 1, phases_kernel<kBytes>, in.device(), out.device());
      !problem.empty())
    return problem;
  std::vector<uint32_t> wanted = {2, 2, 1, 2};
  if (kBytes) wanted.insert(wanted.end(), {2, 1, 211});
  return compare("phases", out.fetch(), wanted);
}

// Every thread copies 16, 8 and 4 bytes; some read fewer than they write.
__global__ void cp_async_kernel(const uint32_t* in, uint32_t* out) {
  auto& shared = shared_memory<Shared>();
  const uint32_t t = threadIdx.x;
  uint32_t* mine = shared.data + 8 * t;
  mine[7] = 7;
  cp_async_16(mine, in + 8 * t, t % 3 == 0 ? 16 : t % 3 == 1 ? 4 : 0);
  cp_async_commit();
  cp_async_8(mine + 4, in + 8 * t + 4, t % 2 ? 8 : 4);
  cp_async_4(mine + 6, in + 8 * t + 6, t % 5 ? 4 : 0);
  cp_async_commit();
  cp_async_commit();
  cp_async_wait<2>();
  out[8 * t] = mine[0];
  cp_async_wait<0>();
  __syncthreads();
  const uint32_t other = 31 - t;
  for (uint32_t i = 1; i < 8; ++i) out[8 * other + i] = shared.data[8 * other + i];
}

std::string cp_async() {
  std::vector<uint32_t> values(256), wanted(256);
  for (uint32_t i = 0; i < 256; ++i) values[i] = 1000 + i;
  for (uint32_t t = 0; t < 32; ++t) {
    const uint32_t* v = values.data() + 8 * t;
    const uint32_t row[8] = {t % 3 < 2 ? v[0] : 0,
                             t % 3 ? 0 : v[1],
                             t % 3 ? 0 : v[2],
                             t % 3 ? 0 : v[3],
                             v[4],
                             t % 2 ? v[5] : 0,
                             t % 5 ? v[6] : 0,
                             7};
    for (uint32_t i = 0; i < 8; ++i) wanted[8 * t + i] = row[i];
  }
  Buffer<uint32_t> in(values), out(256);
  if (std::string problem = run(32, sizeof(Shared), 1, cp_async_kernel, in.device(), out.device());
      !problem.empty())
    return problem;
  return compare("cp.async", out.fetch(), wanted);
}

// Warp 0 copies and lets the copies arrive; warp 1 waits on the barrier alone.
__global__ void cp_async_arrive_kernel(const uint32_t* in, uint32_t* out) {
  auto& shared = shared_memory<Shared>();
  if (threadIdx.x == 0) mbarrier_init(&shared.barrier, 32);
  __syncthreads();
  const uint32_t lane = lane_index();
  if (warp_index() == 0) {
    cp_async_16(shared.data + 8 * lane, in + 8 * lane);
    cp_async_16(shared.data + 8 * lane + 4, in + 8 * lane + 4);
    cp_async_mbarrier_arrive(&shared.barrier);
    cp_async_wait<0>();
    mbarrier_wait(&shared.barrier, 0);
  } else {
    mbarrier_wait(&shared.barrier, 0);
    for (uint32_t i = lane; i < 256; i += 32) out[i] = shared.data[i];
  }
}

std::string cp_async_arrive() {
  std::vector<uint32_t> values(256);
  for (uint32_t i = 0; i < 256; ++i) values[i] = 3 * i + 1;
  Buffer<uint32_t> in(values), out(256);
  if (std::string problem =
          run(64, sizeof(Shared), 1, cp_async_arrive_kernel, in.device(), out.device());
      !problem.empty())
    return problem;
  return compare("cp_async_mbarrier_arrive", out.fetch(), values);
}

// Copies in, and out in two bulk stores of a group each; the source is overwritten as soon as it
// may be.
__global__ void bulk_kernel(const uint32_t* in, uint32_t* out) {
  auto& shared = shared_memory<Shared>();
  if (threadIdx.x == 0) {
    mbarrier_init(&shared.barrier, 1);
    fence_mbarrier_init();
    bulk_prefetch_to_l2(in, 1024);
    mbarrier_arrive_expect_bytes(&shared.barrier, 1024);
    bulk_load(shared.data, in, 1024, &shared.barrier, evict_last());
  }
  __syncthreads();
  mbarrier_wait(&shared.barrier, 0);
  for (uint32_t i = threadIdx.x; i < 256; i += 32) shared.data[i] += 5;
  fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    bulk_store(out, shared.data, 512);
    bulk_commit();
    bulk_store(out + 128, shared.data + 128, 512);
    bulk_commit();
    bulk_wait_read<1>();
    shared.data[0] = 0;
    bulk_wait_read<0>();
    shared.data[255] = 0;
    bulk_wait<0>();
  }
}

std::string bulk() {
  std::vector<uint32_t> values(256), wanted(256);
  for (uint32_t i = 0; i < 256; ++i) wanted[i] = (values[i] = 7 * i) + 5;
  Buffer<uint32_t> in(values), out(256);
  if (std::string problem = run(32, sizeof(Shared), 1, bulk_kernel, in.device(), out.device());
      !problem.empty())
    return problem;
  return compare("bulk copies", out.fetch(), wanted);
}

// One thread arrives for the warp but itself.
__global__ void arrive_times_kernel(uint32_t* out) {
  auto& shared = shared_memory<Shared>();
  if (threadIdx.x == 0) mbarrier_init(&shared.barrier, 32);
  __syncthreads();
  const uint32_t lane = lane_index();
  if (warp_index() == 0) {
    if (lane == 5) {
      mbarrier_arrive_times(&shared.barrier, 31);
      out[0] = mbarrier_try_wait(&shared.barrier, 0);
      mbarrier_arrive(&shared.barrier);
    }
  } else {
    mbarrier_wait(&shared.barrier, 0);
    if (lane == 0) out[1] = 7;
  }
}

std::string arrive_times() {
  Buffer<uint32_t> out(2);
  if (std::string problem = run(64, sizeof(Shared), 1, arrive_times_kernel, out.device());
      !problem.empty())
    return problem;
  return compare("mbarrier_arrive_times", out.fetch(), {0, 7});
}

// Four blocks: each gives its left neighbour a word by an ordinary store, its right neighbour 64
// bytes by a bulk copy, and arrives at block 0's barrier.
struct ClusterShared {
  alignas(128) uint32_t mine[16];
  alignas(128) uint32_t from_left[16];
  uint32_t from_right;
  Mbarrier barrier, everyone;
};

__global__ void cluster_kernel(uint32_t* out) {
  auto& shared = shared_memory<ClusterShared>();
  const uint32_t rank = cluster_block_rank(), blocks = cluster_blocks();
  if (threadIdx.x == 0) {
    mbarrier_init(&shared.barrier, 1);
    mbarrier_init(&shared.everyone, blocks);
    fence_mbarrier_init();
    mbarrier_arrive_expect_bytes(&shared.barrier, 64);
  }
  if (threadIdx.x < 16) shared.mine[threadIdx.x] = 100 * rank + threadIdx.x;
  fence_proxy_async();
  cluster_sync();
  if (threadIdx.x == 0) {
    *shared_of_block(&shared.from_right, (rank + blocks - 1) % blocks) = rank;
    bulk_copy_to_block(shared.from_left, shared.mine, 64, &shared.barrier, (rank + 1) % blocks);
    mbarrier_arrive_at_block(&shared.everyone, 0);
  }
  mbarrier_wait(&shared.barrier, 0);
  if (rank == 0) mbarrier_wait(&shared.everyone, 0);
  cluster_sync();
  if (threadIdx.x < 16) out[rank * 32 + threadIdx.x] = shared.from_left[threadIdx.x];
  if (threadIdx.x == 16) out[rank * 32 + 16] = shared.from_right;
}

std::string cluster() {
  Buffer<uint32_t> out(4 * 32);
  if (std::string problem = run(32, sizeof(ClusterShared), 4, cluster_kernel, out.device());
      !problem.empty())
    return problem;
  std::vector<uint32_t> wanted(4 * 32);
  for (uint32_t rank = 0; rank < 4; ++rank) {
    for (uint32_t i = 0; i < 16; ++i) wanted[rank * 32 + i] = 100 * ((rank + 3) % 4) + i;
    wanted[rank * 32 + 16] = (rank + 1) % 4;
  }
  return compare("cluster", out.fetch(), wanted);
}

// Blocks add up; the one that comes last sees what all others wrote.
__global__ void last_block_kernel(uint32_t* parts, uint32_t* counter, uint32_t* out) {
  auto& last = shared_memory<uint32_t[1]>()[0];
  if (threadIdx.x == 0) {
    parts[blockIdx.x] = blockIdx.x + 1;
    last = add_acquire_release(counter, 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (last == 0) return;
  const uint32_t lane = lane_index();
  const uint32_t sum =
      __reduce_add_sync(kAllLanes, lane < gridDim.x ? load_acquire(parts + lane) : 0);
  if (lane == 0) {
    out[0] = sum;
    store_release(out + 1, 9);
    store_once(out + 4, load_once(out + 8));
  }
}

std::string last_block() {
  Buffer<uint32_t> parts(8), counter(1),
      out(std::vector<uint32_t>{0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4});
  LaunchShape shape;
  shape.grid = dim3(8);
  shape.threads = 32;
  shape.shared_bytes = 16;
  if (const char* problem =
          launch(shape, nullptr, last_block_kernel, parts.device(), counter.device(), out.device()))
    return problem;
  if (std::string problem = finish(); !problem.empty()) return problem;
  return compare("last block", out.fetch(),
                 std::vector<uint32_t>{36, 9, 0, 0, 1, 2, 3, 4, 1, 2, 3, 4});
}

}  // namespace

std::vector<Case> copy_cases() {
  return {{"mbarrier phases", 80, phases<false>},
          {"mbarrier phases and bytes", 90, phases<true>},
          {"cp_async", 80, cp_async},
          {"cp_async_mbarrier_arrive", 80, cp_async_arrive},
          {"mbarrier_arrive_times", 90, arrive_times},
          {"bulk load and store", 90, bulk},
          {"cluster", 90, cluster},
          {"last block", 80, last_block}};
}

}  // namespace conformance
