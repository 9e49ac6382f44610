// TMA: where every byte of a box lies in shared memory under each swizzle, what happens at the
// tensor's edges, stores, three and four dimensions, multicast.
#include "conformance.h"
#include "device/cluster.h"
#include "device/fence.h"
#include "device/mbarrier.h"
#include "device/shared_memory.h"
#include "device/tma.h"
#include "device/warp.h"

namespace conformance {
namespace {

using namespace dgemma::device;

constexpr uint32_t kMaxBytes = 8192;

// The swizzles by hand: the first piece of the second line of 128 bytes becomes the second piece
// there, and so on.
static_assert(swizzled(0x080, Swizzle::bytes_128) == 0x090 &&
              swizzled(0x3f0, Swizzle::bytes_128) == 0x380);
static_assert(swizzled(0x080, Swizzle::bytes_64) == 0x090 &&
              swizzled(0x1c0, Swizzle::bytes_64) == 0x1f0);
static_assert(swizzled(0x080, Swizzle::bytes_32) == 0x090 &&
              swizzled(0x1e0, Swizzle::bytes_32) == 0x1f0);
static_assert(swizzled(0x3f0, Swizzle::none) == 0x3f0);

struct Shared {
  alignas(1024) uint8_t tile[kMaxBytes];
  Mbarrier barrier;
};

struct At {
  int32_t x, y, z, w;
};

// Loads a box, hands out shared memory as it lies, and stores the box to another tensor at other
// coordinates.
template <int kRank>
__global__ void box_kernel(const __grid_constant__ TensorMap from,
                           const __grid_constant__ TensorMap to, At read, At write, uint32_t bytes,
                           uint8_t* image) {
  auto& shared = shared_memory<Shared>();
  if (threadIdx.x == 0) {
    prefetch_tensor_map(&from);
    mbarrier_init(&shared.barrier, 1);
    fence_mbarrier_init();
    mbarrier_arrive_expect_bytes(&shared.barrier, bytes);
    const CachePolicy policy = evict_normal();
    if constexpr (kRank == 2) tma_load(shared.tile, &from, &shared.barrier, policy, read.x, read.y);
    if constexpr (kRank == 3)
      tma_load(shared.tile, &from, &shared.barrier, policy, read.x, read.y, read.z);
    if constexpr (kRank == 4)
      tma_load(shared.tile, &from, &shared.barrier, policy, read.x, read.y, read.z, read.w);
  }
  __syncthreads();
  mbarrier_wait(&shared.barrier, 0);
  for (uint32_t i = threadIdx.x; i < bytes; i += 32) image[i] = shared.tile[i];
  if (threadIdx.x == 0) {
    if constexpr (kRank == 2) tma_store(&to, shared.tile, write.x, write.y);
    if constexpr (kRank == 3) tma_store(&to, shared.tile, write.x, write.y, write.z);
    if constexpr (kRank == 4) tma_store(&to, shared.tile, write.x, write.y, write.z, write.w);
    bulk_commit();
    bulk_wait<0>();
  }
}

constexpr uint32_t kSize[4] = {72, 21, 5, 3};  // elements of the tensors, rows padded to 80
constexpr uint32_t kPadded = 80;
constexpr uint16_t kUntouched = 0xeeee;

uint32_t index_of(const uint32_t (&at)[4]) {
  return ((at[3] * kSize[2] + at[2]) * kSize[1] + at[1]) * kPadded + at[0];
}

template <int kRank>
std::string box(Swizzle swizzle, const uint32_t (&extent)[4], At read, At write) {
  const uint32_t count = kPadded * kSize[1] * kSize[2] * kSize[3];
  std::vector<uint16_t> values(count), untouched(count, kUntouched);
  for (uint32_t i = 0; i < count; ++i) values[i] = static_cast<uint16_t>(i % 32749 + 1);
  Buffer<uint16_t> from(values), to(untouched);
  TensorLayout layout{ElementType::bfloat16, kRank, from.device(), {}, {}, {}, swizzle};
  uint64_t stride = 2 * kPadded;
  uint32_t bytes = 2;
  for (int i = 0; i < kRank; ++i) {
    layout.size[i] = kSize[i];
    layout.box[i] = extent[i];
    if (i > 0) layout.stride[i] = stride;
    if (i > 0) stride *= kSize[i];
    bytes *= extent[i];
  }
  TensorMap from_map, to_map;
  if (const char* problem = encode_tensor_map(&from_map, layout)) return problem;
  layout.base = to.device();
  if (const char* problem = encode_tensor_map(&to_map, layout)) return problem;
  Buffer<uint8_t> image(bytes);
  std::string problem = run(32, sizeof(Shared), 1, box_kernel<kRank>, from_map, to_map, read, write,
                            bytes, image.device());
  if (!problem.empty()) return problem;

  const int32_t first[4] = {read.x, read.y, read.z, read.w},
                second[4] = {write.x, write.y, write.z, write.w};
  std::vector<uint8_t> wanted_image(bytes);
  std::vector<uint16_t> wanted = untouched;
  for (uint32_t i = 0; i < bytes / 2; ++i) {
    uint32_t rest = i, source[4] = {}, target[4] = {};
    bool read_inside = true, write_inside = true;
    for (int dimension = 0; dimension < kRank; ++dimension) {
      const auto at = static_cast<int32_t>(rest % extent[dimension]);
      rest /= extent[dimension];
      source[dimension] = static_cast<uint32_t>(first[dimension] + at);
      target[dimension] = static_cast<uint32_t>(second[dimension] + at);
      read_inside = read_inside && source[dimension] < kSize[dimension];
      write_inside = write_inside && target[dimension] < kSize[dimension];
    }
    const uint16_t value = read_inside ? values[index_of(source)] : 0;
    wanted_image[swizzled(2 * i, swizzle)] = static_cast<uint8_t>(value & 0xff);
    wanted_image[swizzled(2 * i, swizzle) + 1] = static_cast<uint8_t>(value >> 8);
    if (write_inside) wanted[index_of(target)] = value;
  }
  problem = compare("image in shared memory", image.fetch(), wanted_image);
  if (problem.empty()) problem = compare("stored tensor", to.fetch(), wanted);
  return problem.empty()
             ? problem
             : "swizzle " + std::to_string(static_cast<unsigned>(swizzle)) + ": " + problem;
}

template <int kRank>
__global__ void load_kernel(const __grid_constant__ TensorMap from, At read, uint32_t bytes,
                            uint8_t* image) {
  auto& shared = shared_memory<Shared>();
  if (threadIdx.x == 0) {
    mbarrier_init(&shared.barrier, 1);
    fence_mbarrier_init();
    mbarrier_arrive_expect_bytes(&shared.barrier, bytes);
    if constexpr (kRank == 3)
      tma_load(shared.tile, &from, &shared.barrier, evict_first(), read.x, read.y, read.z);
    if constexpr (kRank == 4)
      tma_load(shared.tile, &from, &shared.barrier, evict_first(), read.x, read.y, read.z, read.w);
  }
  __syncthreads();
  mbarrier_wait(&shared.barrier, 0);
  for (uint32_t i = threadIdx.x; i < bytes; i += 32) image[i] = shared.tile[i];
}

// Loads a box of bytes that were numbered as they lie.
template <int kRank>
std::string strided_box(TensorLayout layout, uint32_t element_bytes, uint64_t memory_bytes,
                        At read) {
  std::vector<uint8_t> values(memory_bytes);
  for (uint64_t i = 0; i < memory_bytes; ++i) values[i] = static_cast<uint8_t>(i * 7 + i / 251);
  Buffer<uint8_t> from(values);
  layout.base = from.device();
  TensorMap map;
  if (const char* problem = encode_tensor_map(&map, layout)) return problem;
  uint32_t count = 1;
  for (int i = 0; i < kRank; ++i) count *= layout.box[i];
  const uint32_t bytes = count * element_bytes;
  Buffer<uint8_t> image(bytes);
  std::string problem =
      run(32, sizeof(Shared), 1, load_kernel<kRank>, map, read, bytes, image.device());
  if (!problem.empty()) return problem;

  const int32_t first[4] = {read.x, read.y, read.z, read.w};
  std::vector<uint8_t> wanted(bytes);
  for (uint32_t i = 0; i < count; ++i) {
    uint32_t rest = i;
    uint64_t place = 0;
    bool inside = true;
    for (int dimension = 0; dimension < kRank; ++dimension) {
      const uint64_t at = static_cast<uint32_t>(first[dimension]) + rest % layout.box[dimension];
      rest /= layout.box[dimension];
      inside = inside && at < layout.size[dimension];
      place += at * (dimension == 0 ? element_bytes : layout.stride[dimension]);
    }
    for (uint32_t b = 0; b < element_bytes; ++b)
      wanted[swizzled(i * element_bytes + b, layout.swizzle)] = inside ? values[place + b] : 0;
  }
  return compare("image in shared memory", image.fetch(), wanted);
}

// The maps of gate_up: strides that do not grow with the dimension, and rows that two of its
// coordinates reach. The driver's manual describes maps of another form only.
std::string shrinking_strides() {
  // Two experts of 24 gate and 24 up rows: (column, row of eight, gate or up, group of eight).
  constexpr uint64_t kRow = 160, kExpertSize = 24, kGroups = 2 * 2 * kExpertSize / 8;
  const TensorLayout of_rows{ElementType::bfloat16,
                             4,
                             nullptr,
                             {72, 8, 2, kGroups - kExpertSize / 8},
                             {0, kRow, kRow * kExpertSize, kRow * 8},
                             {64, 8, 2, 2},
                             Swizzle::bytes_128};
  // Pairs of rows: (byte, pair, row of the pair).
  constexpr uint64_t kPairs = 2 * kExpertSize;
  const TensorLayout of_pairs{ElementType::uint8,  3,           nullptr,      {kRow, kPairs, 2},
                              {0, 2 * kRow, kRow}, {64, 32, 2}, Swizzle::none};
  for (int32_t group : {0, 2, 6, 8})
    if (std::string problem = strided_box<4>(of_rows, 2, kRow * 8 * kGroups, {8, 0, 0, group});
        !problem.empty())
      return "groups of rows: " + problem;
  for (int32_t pair : {0, 5, 30})
    if (std::string problem = strided_box<3>(of_pairs, 1, kRow * 2 * kPairs, {128, pair, 0, 0});
        !problem.empty())
      return "pairs of rows: " + problem;
  return {};
}

std::string two_dimensions() {
  for (Swizzle swizzle :
       {Swizzle::none, Swizzle::bytes_32, Swizzle::bytes_64, Swizzle::bytes_128}) {
    const uint32_t wide = swizzle == Swizzle::none ? 40 : swizzle_row_bytes(swizzle) / 2;
    const uint32_t extent[4] = {wide, 16, 1, 1};
    // Inside; over the far edges; over the near ones; wholly outside.
    for (At read : {At{8, 3, 0, 0}, At{48, 12, 0, 0}, At{-5, -7, 0, 0}, At{100, 2, 0, 0}})
      for (At write : {At{0, 0, 0, 0}, At{51, 9, 0, 0}, At{-3, -2, 0, 0}})
        if (std::string problem = box<2>(swizzle, extent, read, write); !problem.empty())
          return problem;
  }
  return {};
}

std::string more_dimensions() {
  for (Swizzle swizzle : {Swizzle::none, Swizzle::bytes_64}) {
    const uint32_t extent[4] = {32, 4, 3, 2};
    std::string problem = box<3>(swizzle, extent, {16, 19, 3, 0}, {50, -1, 1, 0});
    if (problem.empty()) problem = box<4>(swizzle, extent, {56, 5, -1, 2}, {3, 2, 3, 1});
    if (!problem.empty()) return problem;
  }
  return {};
}

// Block 0 of four loads one box into blocks 0, 1 and 3, and block 2 another into itself.
__global__ void multicast_kernel(const __grid_constant__ TensorMap map, uint16_t* out) {
  auto& shared = shared_memory<Shared>();
  const uint32_t rank = cluster_block_rank();
  if (threadIdx.x == 0) {
    mbarrier_init(&shared.barrier, 1);
    fence_mbarrier_init();
    mbarrier_arrive_expect_bytes(&shared.barrier, 1024);
  }
  cluster_sync();
  if (threadIdx.x == 0 && rank == 0)
    tma_load_multicast(shared.tile, &map, &shared.barrier, evict_first(), uint16_t{0b1011}, 0, 1);
  if (threadIdx.x == 0 && rank == 2)
    tma_load_multicast(shared.tile, &map, &shared.barrier, evict_first(), uint16_t{0b0100}, 8, 2);
  mbarrier_wait(&shared.barrier, 0);
  for (uint32_t i = threadIdx.x; i < 512; i += 32)
    out[rank * 512 + i] = reinterpret_cast<const uint16_t*>(shared.tile)[i];
  cluster_sync();
}

std::string multicast() {
  std::vector<uint16_t> values(kPadded * kSize[1]), wanted(4 * 512);
  for (uint32_t i = 0; i < values.size(); ++i) values[i] = static_cast<uint16_t>(i);
  Buffer<uint16_t> from(values), out(4 * 512);
  const TensorLayout layout{ElementType::bfloat16, 2,       from.device(), {kSize[0], kSize[1]},
                            {0, 2 * kPadded},      {64, 8}, Swizzle::none};
  TensorMap map;
  if (const char* problem = encode_tensor_map(&map, layout)) return problem;
  if (std::string problem = run(32, sizeof(Shared), 4, multicast_kernel, map, out.device());
      !problem.empty())
    return problem;
  for (uint32_t rank = 0; rank < 4; ++rank)
    for (uint32_t i = 0; i < 512; ++i) {
      const uint32_t x = i % 64 + (rank == 2 ? 8 : 0), y = i / 64 + (rank == 2 ? 2 : 1);
      wanted[rank * 512 + i] = values[y * kPadded + x];
    }
  return compare("multicast", out.fetch(), wanted);
}

}  // namespace

std::vector<Case> tensor_copy_cases() {
  return {{"TMA, two dimensions", 90, two_dimensions},
          {"TMA, three and four dimensions", 90, more_dimensions},
          {"TMA, strides that shrink", 90, shrinking_strides},
          {"TMA, multicast", 90, multicast}};
}

}  // namespace conformance
