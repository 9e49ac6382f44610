// h = gelu_tanh(gate x) * (up x) for every pair, weights and activations in e4m3 on sm_90: see
// sm90/bf16_pipeline.h and sm90/fp8_multiply.h. h is rounded to bfloat16; quantize_rows.cu makes
// e4m3 of its rows.
#include "device/launch.h"
#include "device/shared_memory.h"
#include "grouped_gemm/sm90/fp8_multiply.h"
#include "grouped_gemm/sm90/gate_up_store.h"

namespace dgemma {
namespace {

using namespace moe_sm90;

struct GateUp {
  MoeTileScheduler scheduler;
  QuantizedMatrix matrix;
  const uint8_t* input;       // e4m3 [tokens, hidden_size]
  const float* input_scales;  // [tokens]
  bfloat16* activations;      // [pairs, expert_size]
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
  float scale[2][kTokens];  // of the work tile's tokens, by warpgroup
};

// Called for new pairs alone, and before the products are waited for.
DGEMMA_DEVICE void load_scales(const GateUp& p, const MoeWorkTile& work_tile, float* scale) {
  sync_warpgroup();  // those before have been used
  for (int32_t i = static_cast<int32_t>(threadIdx.x % 128); i < work_tile.rows; i += 128)
    scale[i] = p.input_scales[p.scheduler.tables.pair[work_tile.first + i] / p.top_k];
  sync_warpgroup();
}

// A lane has two tokens of each eight.
template <int kCount>
DGEMMA_DEVICE void multiply_tokens(float (&sum)[kCount], const MoeWorkTile& work_tile,
                                   const float* scale) {
  const int32_t lane = static_cast<int32_t>(device::lane_index());
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) {
    const int32_t token = 8 * (i / 2) + 2 * (lane % 4) + i % 2;
    const float by = token < work_tile.rows ? scale[token] : 0.0f;
    sum[4 * (i / 2) + i % 2] *= by;
    sum[4 * (i / 2) + i % 2 + 2] *= by;
  }
}

template <int kTokens>
__global__ void __launch_bounds__(kMoeThreads, 1)
    gate_up(const __grid_constant__ device::TensorMap weights, const GateUp p) {
  auto& shared = device::shared_memory<Shared<kTokens>>();
  if (threadIdx.x == 0) {
    device::prefetch_tensor_map(&weights);
    initialise(shared.ring);
    prefetch_weights(p.scheduler, p.likely_steps, [&](const MoeWorkTile& work_tile, int32_t step) {
      device::tma_prefetch_to_l2(&weights, step * kFp8Depth, 0, 0, first_group(p, work_tile));
    });
  }
  __syncthreads();
  device::wait_for_previous_kernel();  // it wrote the input
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
              device::tma_load(to, &weights, full, once, step * kFp8Depth, 0, 0,
                               first_group(p, work_tile));
            });
      }
    } else {
      gather_rows(shared.ring, p.scheduler, p.input, p.hidden_size,
                  [&](int32_t position) { return p.scheduler.tables.pair[position] / p.top_k; });
    }
  } else {
    Registers::take();
    float* scale = shared.scale[device::warpgroup_index()];
    typename Ring<kTokens>::State at;
    consume_work_tiles<kTokens>(
        p.scheduler, [&](auto columns, const MoeWorkTile& work_tile, bool new_pairs) {
          constexpr int kN = decltype(columns)::value;
          const int32_t result = work_tile.weight_tile * kColumns + static_cast<int32_t>(warp) * 8 +
                                 static_cast<int32_t>(device::lane_index() / 4);
          const int32_t row = 2 * work_tile.expert * p.expert_size + min(result, p.expert_size - 1);
          const float gate = p.matrix.row_scale(row), up = p.matrix.row_scale(row + p.expert_size);
          if (new_pairs) load_scales(p, work_tile, scale);
          float sum[kN / 2] = {};
          multiply_e4m3<kN>(shared.ring, at, p.scheduler.k_steps, sum);
          multiply_rows(sum, gate, up);
          multiply_tokens(sum, work_tile, scale);
          store_results<kN>(work_tile, sum, shared.results.tile[device::warpgroup_index()],
                            p.expert_size, p.activations);
        });
  }
}

// [experts, 2 * expert_size, hidden_size] as (column, row of a group of eight, gate or up, group),
// as in sm90/bf16_gate_up.cu.
device::TensorLayout make_layout(const MoeQuantizedPass& pass) {
  const uint64_t row = static_cast<uint64_t>(pass.ffn.hidden_size);
  const uint64_t expert_size = static_cast<uint64_t>(pass.ffn.expert_size);
  const uint64_t groups = static_cast<uint64_t>(pass.ffn.tables.experts) * 2 * expert_size / 8;
  return {.type = device::ElementType::uint8,
          .rank = 4,
          .base = pass.gate_up.values,
          .size = {row, 8, 2, groups - expert_size / 8},
          .stride = {0, row, row * expert_size, row * 8},
          .box = {kFp8Depth, 8, 2, kColumns / 8},
          .swizzle = Swizzle::bytes_128};
}

template <int kTokens>
const char* launch(const MoeCudaPlan& plan, const MoeQuantizedPass& pass, void* stream) {
  static_assert(sizeof(Shared<kTokens>) <= kSharedLimit90);
  device::TensorMap weights;
  if (const char* error = device::encode_tensor_map(&weights, make_layout(pass))) return error;
  const GateUp p = {.scheduler = {.tables = pass.ffn.tables,
                                  .weight_tiles = plan.gate_up.weight_tiles,
                                  .k_steps = plan.gate_up.k_steps,
                                  .contiguous = plan.contiguous},
                    .matrix = pass.gate_up,
                    .input = pass.input.codes,
                    .input_scales = pass.input.scales,
                    .activations = pass.ffn.activations,
                    .hidden_size = pass.ffn.hidden_size,
                    .expert_size = pass.ffn.expert_size,
                    .top_k = pass.ffn.top_k,
                    .likely_steps = plan.likely_steps};
  const device::LaunchShape shape = {.grid = dim3(static_cast<unsigned>(plan.gate_up.blocks)),
                                     .threads = kMoeThreads,
                                     .shared_bytes = sizeof(Shared<kTokens>),
                                     .overlaps_previous_kernel = true};
  return device::launch(shape, stream, gate_up<kTokens>, weights, p);
}

}  // namespace

const char* launch_gate_up_sm90_fp8(const MoeCudaPlan& plan, const MoeQuantizedPass& pass,
                                    void* stream) {
  return plan.token_tile == 64 ? launch<64>(plan, pass, stream) : launch<128>(plan, pass, stream);
}

}  // namespace dgemma
