// weight * (down h) for every pair, weights and activations in e4m3 on sm_90: see
// sm90/bf16_pipeline.h and sm90/fp8_multiply.h.
#include "device/launch.h"
#include "device/shared_memory.h"
#include "grouped_gemm/sm90/down_store.h"
#include "grouped_gemm/sm90/fp8_multiply.h"

namespace dgemma {
namespace {

using namespace moe_sm90;

struct Down {
  MoeTileScheduler scheduler;
  QuantizedMatrix matrix;
  const uint8_t* activations;      // e4m3 [pairs, expert_size], in sorted order
  const float* activation_scales;  // [pairs], likewise
  const float* expert_weights;     // [pairs], in the order of the slots
  float* products;                 // [pairs, hidden_size], in the order of the slots
  int32_t hidden_size, expert_size;
  int32_t likely_steps;  // as in MoeCudaPlan
};

template <int kTokens>
struct Shared {
  Ring<kTokens> ring;
  Target target[2][kTokens];  // by warpgroup
  TileTables tables;
};

template <int kTokens>
__global__ void __launch_bounds__(kMoeThreads, 1)
    down(const __grid_constant__ device::TensorMap weights, const Down p) {
  auto& shared = device::shared_memory<Shared<kTokens>>();
  if (threadIdx.x == 0) {
    device::prefetch_tensor_map(&weights);
    initialise(shared.ring);
    prefetch_weights(p.scheduler, p.likely_steps, [&](const MoeWorkTile& work_tile, int32_t step) {
      device::tma_prefetch_to_l2(&weights, step * kFp8Depth, work_tile.weight_tile * kMoeWeightRows,
                                 work_tile.expert);
    });
  }
  // As in sm90/bf16_down.cu.
  device::wait_for_previous_kernel();
  device::let_next_kernel_begin();
  const MoeTileScheduler scheduler = load_tables(p.scheduler, shared.tables);
  __syncthreads();

  const uint32_t warp = device::warp_index();
  if (warp >= kConsumerWarps) {
    Registers::give_back();
    if (warp == kConsumerWarps) {
      if (device::elect_one()) {
        const auto once = device::evict_first();
        load_weights(
            shared.ring, scheduler,
            [&](void* to, device::Mbarrier* full, const MoeWorkTile& work_tile, int32_t step) {
              device::tma_load(to, &weights, full, once, step * kFp8Depth,
                               work_tile.weight_tile * kMoeWeightRows, work_tile.expert);
            });
      }
    } else {
      gather_rows(shared.ring, scheduler, p.activations, p.expert_size,
                  [](int32_t position) { return position; });
    }
  } else {
    Registers::take();
    Target* target = shared.target[device::warpgroup_index()];
    typename Ring<kTokens>::State at;
    consume_work_tiles<kTokens>(scheduler, [&](auto columns, const MoeWorkTile& work_tile,
                                               bool new_pairs) {
      constexpr int kN = decltype(columns)::value;
      const int32_t row = work_tile.weight_tile * kMoeWeightRows + static_cast<int32_t>(warp) * 16 +
                          static_cast<int32_t>(device::lane_index() / 4);
      const int32_t first = work_tile.expert * p.hidden_size, last = p.hidden_size - 1;
      const float upper = p.matrix.row_scale(first + min(row, last));
      const float lower = p.matrix.row_scale(first + min(row + 8, last));
      if (new_pairs)
        load_targets(scheduler.tables, work_tile, target, [&](int32_t pair, int32_t position) {
          return p.expert_weights[pair] * p.activation_scales[position];
        });
      float sum[kN / 2] = {};
      multiply_e4m3<kN>(shared.ring, at, scheduler.k_steps, sum);
      multiply_rows(sum, upper, lower);
      store_products<kN>(work_tile, sum, target, p.hidden_size, p.products);
    });
  }
}

// (column, row, expert). A tile's rows past an expert's last are zero.
device::TensorLayout make_layout(const MoeQuantizedPass& pass) {
  const uint64_t row = static_cast<uint64_t>(pass.ffn.expert_size);
  const uint64_t rows = static_cast<uint64_t>(pass.ffn.hidden_size);
  return {.type = device::ElementType::uint8,
          .rank = 3,
          .base = pass.down.values,
          .size = {row, rows, static_cast<uint64_t>(pass.ffn.tables.experts)},
          .stride = {0, row, row * rows},
          .box = {kFp8Depth, kMoeWeightRows, 1},
          .swizzle = Swizzle::bytes_128};
}

template <int kTokens>
const char* launch(const MoeCudaPlan& plan, const MoeQuantizedPass& pass, void* stream) {
  static_assert(sizeof(Shared<kTokens>) <= kSharedLimit90);
  device::TensorMap weights;
  if (const char* error = device::encode_tensor_map(&weights, make_layout(pass))) return error;
  const Down p = {.scheduler = {.tables = pass.ffn.tables,
                                .weight_tiles = plan.down.weight_tiles,
                                .k_steps = plan.down.k_steps,
                                .contiguous = plan.contiguous},
                  .matrix = pass.down,
                  .activations = pass.activations.codes,
                  .activation_scales = pass.activations.scales,
                  .expert_weights = pass.ffn.expert_weights,
                  .products = pass.ffn.products,
                  .hidden_size = pass.ffn.hidden_size,
                  .expert_size = pass.ffn.expert_size,
                  .likely_steps = plan.likely_steps};
  const device::LaunchShape shape = {.grid = dim3(static_cast<unsigned>(plan.down.blocks)),
                                     .threads = kMoeThreads,
                                     .shared_bytes = sizeof(Shared<kTokens>),
                                     .overlaps_previous_kernel = true};
  return device::launch(shape, stream, down<kTokens>, weights, p);
}

}  // namespace

const char* launch_down_sm90_fp8(const MoeCudaPlan& plan, const MoeQuantizedPass& pass,
                                 void* stream) {
  return plan.token_tile == 64 ? launch<64>(plan, pass, stream) : launch<128>(plan, pass, stream);
}

}  // namespace dgemma
