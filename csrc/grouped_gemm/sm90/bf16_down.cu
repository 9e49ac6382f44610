// weight * (down h) for every pair, bfloat16 to fp32 on sm_90: see sm90/bf16_pipeline.h.
//
// A pair's product goes to the row of its slot, from where combine.cu sums them in that order.
#include "device/launch.h"
#include "device/shared_memory.h"
#include "grouped_gemm/sm90/down_store.h"

namespace dgemma {
namespace {

using namespace moe_sm90;

struct Down {
  MoeTileScheduler scheduler;
  const bfloat16* activations;  // [pairs, expert_size], in sorted order
  const float* expert_weights;  // [pairs], in the order of the slots
  float* products;              // [pairs, hidden_size], in the order of the slots
  int32_t hidden_size, expert_size;
};

template <int kTokens>
struct Shared {
  Ring<kTokens> ring;
  Target target[2][kTokens];  // by warpgroup
};

template <int kTokens>
__global__ void __launch_bounds__(kMoeThreads, 1)
    down(const __grid_constant__ device::TensorMap weights, const Down p) {
  auto& shared = device::shared_memory<Shared<kTokens>>();
  if (threadIdx.x == 0) {
    device::prefetch_tensor_map(&weights);
    initialise(shared.ring);
  }
  __syncthreads();
  device::let_next_kernel_begin();

  // The previous kernel waited for the tables before it let this one begin, so they are complete,
  // and weights are on their way while it ends. Only its activations must be waited for.
  const uint32_t warp = device::warp_index();
  if (warp >= kConsumerWarps) {
    Registers::give_back();
    if (warp == kConsumerWarps) {
      if (device::elect_one()) {
        const auto once = device::evict_first();
        load_weights(
            shared.ring, p.scheduler,
            [&](void* to, device::Mbarrier* full, const MoeWorkTile& work_tile, int32_t step) {
              device::tma_load(to, &weights, full, once, step * kMoeDepth,
                               work_tile.weight_tile * kMoeWeightRows, work_tile.expert);
            });
      }
    } else {
      device::wait_for_previous_kernel();
      gather_rows(shared.ring, p.scheduler, p.activations, bytes_of(p.expert_size),
                  [](int32_t position) { return position; });
    }
  } else {
    Registers::take();
    Target* target = shared.target[device::warpgroup_index()];
    typename Ring<kTokens>::State at;
    consume_work_tiles<kTokens>(p.scheduler, [&](auto columns, const MoeWorkTile& work_tile) {
      constexpr int kN = decltype(columns)::value;
      load_targets(p.scheduler.tables, work_tile, target,
                   [&](int32_t pair, int32_t) { return p.expert_weights[pair]; });
      float sum[kN / 2] = {};
      multiply<kN>(shared.ring, at, p.scheduler.k_steps, sum);
      store_products<kN>(work_tile, sum, target, p.hidden_size, p.products);
    });
  }
}

// (column, row, expert). A tile's rows past an expert's last are zero.
device::TensorLayout make_layout(const MoeCudaPass& pass) {
  const uint64_t row = static_cast<uint64_t>(pass.expert_size) * sizeof(bfloat16);
  const uint64_t rows = static_cast<uint64_t>(pass.hidden_size);
  return {.type = device::ElementType::bfloat16,
          .rank = 3,
          .base = pass.down,
          .size = {static_cast<uint64_t>(pass.expert_size), rows,
                   static_cast<uint64_t>(pass.tables.experts)},
          .stride = {0, row, row * rows},
          .box = {kMoeDepth, kMoeWeightRows, 1},
          .swizzle = Swizzle::bytes_128};
}

template <int kTokens>
const char* launch(const MoeCudaPlan& plan, const MoeCudaPass& pass, void* stream) {
  static_assert(sizeof(Shared<kTokens>) <= kSharedLimit90);
  device::TensorMap weights;
  if (const char* error = device::encode_tensor_map(&weights, make_layout(pass))) return error;
  const Down p = {.scheduler = {.tables = pass.tables,
                                .weight_tiles = plan.down.weight_tiles,
                                .k_steps = plan.down.k_steps},
                  .activations = pass.activations,
                  .expert_weights = pass.expert_weights,
                  .products = pass.products,
                  .hidden_size = pass.hidden_size,
                  .expert_size = pass.expert_size};
  const device::LaunchShape shape = {.grid = dim3(static_cast<unsigned>(plan.down.blocks)),
                                     .threads = kMoeThreads,
                                     .shared_bytes = sizeof(Shared<kTokens>),
                                     .overlaps_previous_kernel = true};
  return device::launch(shape, stream, down<kTokens>, weights, p);
}

}  // namespace

const char* launch_down_sm90_bf16(const MoeCudaPlan& plan, const MoeCudaPass& pass, void* stream) {
  if (plan.token_tile == 64) return launch<64>(plan, pass, stream);
  if (plan.token_tile == 128) return launch<128>(plan, pass, stream);
  return launch<256>(plan, pass, stream);
}

}  // namespace dgemma
