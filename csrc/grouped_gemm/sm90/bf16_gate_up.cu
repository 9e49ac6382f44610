// h = gelu_tanh(gate x) * (up x) for every pair, bfloat16 on sm_90: see sm90/bf16_pipeline.h.
//
// TMA brings gate's and up's rows in the order of sm90/gate_up_store.h out of the checkpoint's.
#include "device/launch.h"
#include "device/shared_memory.h"
#include "grouped_gemm/sm90/gate_up_store.h"

namespace dgemma {
namespace {

using namespace moe_sm90;

struct GateUp {
  MoeTileScheduler scheduler;
  const bfloat16* input;  // [tokens, hidden_size]
  bfloat16* activations;  // [pairs, expert_size]
  int32_t hidden_size, expert_size, top_k;
  int32_t likely_steps;  // as in MoeCudaPlan
};

// The first group of eight rows of a weight tile: see make_layout.
DGEMMA_DEVICE int32_t first_group(const GateUp& p, const MoeWorkTile& work_tile) {
  return (work_tile.expert * 2 * p.expert_size + work_tile.weight_tile * kColumns) / 8;
}

template <int kTokens>
struct Shared {
  Ring<kTokens> ring;
  Results<kTokens> results;
};

template <int kTokens>
__global__ void __launch_bounds__(kMoeThreads, 1)
    gate_up(const __grid_constant__ device::TensorMap weights, const GateUp p) {
  auto& shared = device::shared_memory<Shared<kTokens>>();
  if (threadIdx.x == 0) {
    device::prefetch_tensor_map(&weights);
    initialise(shared.ring);
    prefetch_weights(p.scheduler, p.likely_steps, [&](const MoeWorkTile& work_tile, int32_t step) {
      device::tma_prefetch_to_l2(&weights, step * kMoeDepth, 0, 0, first_group(p, work_tile));
    });
  }
  __syncthreads();
  device::wait_for_previous_kernel();  // it wrote the tables
  device::let_next_kernel_begin();

  const uint32_t warp = device::warp_index();
  if (warp >= kConsumerWarps) {
    Registers::give_back();
    if (warp == kConsumerWarps) {
      if (device::elect_one()) {
        const auto once = device::evict_first();
        load_weights(
            shared.ring, p.scheduler,
            [&](void* to, device::Mbarrier* full, const MoeWorkTile& work_tile, int32_t step) {
              device::tma_load(to, &weights, full, once, step * kMoeDepth, 0, 0,
                               first_group(p, work_tile));
            });
      }
    } else {
      gather_rows(shared.ring, p.scheduler, p.input, bytes_of(p.hidden_size),
                  [&](int32_t position) { return p.scheduler.tables.pair[position] / p.top_k; });
    }
  } else {
    Registers::take();
    typename Ring<kTokens>::State at;
    consume_work_tiles<kTokens>(p.scheduler, [&](auto columns, const MoeWorkTile& work_tile, bool) {
      constexpr int kN = decltype(columns)::value;
      float sum[kN / 2] = {};
      multiply<kN>(shared.ring, at, p.scheduler.k_steps, sum);
      store_results<kN>(work_tile, sum, shared.results.tile[device::warpgroup_index()],
                        p.expert_size, p.activations);
    });
  }
}

// [experts, 2 * expert_size, hidden_size] as (column, row of a group of eight, gate or up, group).
// A tile that reaches past an expert's last gate row goes on into rows of other matrices: they give
// results that are not stored. Past the tensor it reads zero.
device::TensorLayout make_layout(const MoeCudaPass& pass) {
  const uint64_t row = static_cast<uint64_t>(pass.hidden_size) * sizeof(bfloat16);
  const uint64_t expert_size = static_cast<uint64_t>(pass.expert_size);
  const uint64_t groups = static_cast<uint64_t>(pass.tables.experts) * 2 * expert_size / 8;
  return {.type = device::ElementType::bfloat16,
          .rank = 4,
          .base = pass.gate_up,
          .size = {static_cast<uint64_t>(pass.hidden_size), 8, 2, groups - expert_size / 8},
          .stride = {0, row, row * expert_size, row * 8},
          .box = {kMoeDepth, 8, 2, kColumns / 8},
          .swizzle = Swizzle::bytes_128};
}

template <int kTokens>
const char* launch(const MoeCudaPlan& plan, const MoeCudaPass& pass, void* stream) {
  static_assert(sizeof(Shared<kTokens>) <= kSharedLimit90);
  device::TensorMap weights;
  if (const char* error = device::encode_tensor_map(&weights, make_layout(pass))) return error;
  const GateUp p = {.scheduler = {.tables = pass.tables,
                                  .weight_tiles = plan.gate_up.weight_tiles,
                                  .k_steps = plan.gate_up.k_steps,
                                  .contiguous = plan.contiguous},
                    .input = pass.input,
                    .activations = pass.activations,
                    .hidden_size = pass.hidden_size,
                    .expert_size = pass.expert_size,
                    .top_k = pass.top_k,
                    .likely_steps = plan.likely_steps};
  const device::LaunchShape shape = {.grid = dim3(static_cast<unsigned>(plan.gate_up.blocks)),
                                     .threads = kMoeThreads,
                                     .shared_bytes = sizeof(Shared<kTokens>),
                                     .overlaps_previous_kernel = true};
  return device::launch(shape, stream, gate_up<kTokens>, weights, p);
}

}  // namespace

const char* launch_gate_up_sm90_bf16(const MoeCudaPlan& plan, const MoeCudaPass& pass,
                                     void* stream) {
  if (plan.token_tile == 64) return launch<64>(plan, pass, stream);
  if (plan.token_tile == 128) return launch<128>(plan, pass, stream);
  return launch<256>(plan, pass, stream);
}

}  // namespace dgemma
