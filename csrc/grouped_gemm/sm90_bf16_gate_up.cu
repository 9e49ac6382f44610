// h = gelu_tanh(gate x) * (up x) for every pair, bfloat16 on sm_90: see sm90_bf16_pipeline.h.
//
// A weight tile is 64 gate rows and the 64 up rows that belong to them, eight of the one and eight
// of the other in turn, so that both products of a result are in one thread: row l / 4 of a warp's
// 16 is gate's, row l / 4 + 8 up's. The copy engine brings them in that order out of the
// checkpoint's.
#include "device/launch.h"
#include "device/ldmatrix.h"
#include "device/shared_memory.h"
#include "grouped_gemm/gelu.h"
#include "grouped_gemm/sm90_bf16_pipeline.h"

namespace dgemma {
namespace {

using namespace moe_sm90;

struct GateUp {
  MoeWork work;
  const bfloat16* input;  // [tokens, hidden_size]
  bfloat16* activations;  // [pairs, expert_size]
  int32_t hidden_size, expert_size, top_k;
};

constexpr int32_t kColumns = kMoeWeightRows / 2;      // of h, per weight tile
constexpr uint32_t kWarpgroupColumns = kColumns / 2;  // 32: 64 bytes, four pieces of 16
constexpr uint32_t kPiecesOfResult = kWarpgroupColumns / 8;

template <int kTokens>
struct Shared {
  Ring<kTokens> ring;
  alignas(1024) bfloat16 result[2][kTokens][kWarpgroupColumns];  // by warpgroup; swizzled
};

// Where a piece of a token's results lies in the tile.
DGEMMA_DEVICE char* result_piece(bfloat16 (*tile)[kWarpgroupColumns], uint32_t token,
                                 uint32_t piece) {
  const uint32_t offset = (token * kPiecesOfResult + piece) * 16;
  return reinterpret_cast<char*>(tile) + device::swizzled(offset, Swizzle::bytes_64);
}

// Through shared memory, so that four threads write 64 bytes of a row together.
template <int kN>
DGEMMA_DEVICE void store(const GateUp& p, const MoeUnit& unit, const float (&sum)[kN / 2],
                         bfloat16 (*tile)[kWarpgroupColumns]) {
  const uint32_t lane = device::lane_index(), warp = device::warp_index() % 4;
  sync_warpgroup();  // the last unit's results are read
#pragma unroll
  for (int j = 0; j < kN / 8; j += 2) {
    uint32_t h[2];  // 16 tokens of the warp's eight columns
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float* d = sum + 4 * (j + i);
      h[i] = device::pack_bfloat16(gelu_tanh(d[0]) * d[2], gelu_tanh(d[1]) * d[3]);
    }
    device::store_tiles_transposed(result_piece(tile, 8 * j + lane % 16, warp), h);
  }
  sync_warpgroup();
  const uint32_t thread = threadIdx.x % 128, piece = thread % kPiecesOfResult;
  const int32_t column =
      unit.weight_tile * kColumns +
      static_cast<int32_t>(device::warpgroup_index() * kWarpgroupColumns + piece * 8);
  if (column >= p.expert_size) return;
  for (uint32_t token = thread / kPiecesOfResult; token < static_cast<uint32_t>(unit.rows);
       token += 128 / kPiecesOfResult) {
    bfloat16* row = p.activations + (unit.first + static_cast<int64_t>(token)) * p.expert_size;
    *reinterpret_cast<uint4*>(row + column) =
        *reinterpret_cast<const uint4*>(result_piece(tile, token, piece));
  }
}

template <int kTokens>
__global__ void __launch_bounds__(kMoeThreads, 1)
    gate_up(const __grid_constant__ device::TensorMap weights, const GateUp p) {
  auto& shared = device::shared_memory<Shared<kTokens>>();
  if (threadIdx.x == 0) {
    device::prefetch_tensor_map(&weights);
    initialise(shared.ring);
  }
  __syncthreads();
  device::wait_for_previous_kernel();  // it wrote the tables
  device::let_next_kernel_begin();

  const uint32_t warp = device::warp_index();
  if (warp >= kMultiplyingWarps) {
    device::decrease_registers<kLoadingRegisters>();
    if (warp == kMultiplyingWarps) {
      if (device::elect_one()) {
        const auto once = device::evict_first();
        load_weights(shared.ring, p.work,
                     [&](void* to, device::Mbarrier* full, const MoeUnit& unit, int32_t step) {
                       // Eight rows to a group: see make_layout.
                       const int32_t group =
                           (unit.expert * 2 * p.expert_size + unit.weight_tile * kColumns) / 8;
                       device::tma_load(to, &weights, full, once, step * kMoeDepth, 0, 0, group);
                     });
      }
    } else {
      gather_rows(shared.ring, p.work, p.input, p.hidden_size,
                  [&](int32_t position) { return p.work.tables.pair[position] / p.top_k; });
    }
  } else {
    device::increase_registers<kMultiplyingRegisters>();
    Position<kTokens> at;
    consume_units<kTokens>(p.work, [&](auto columns, const MoeUnit& unit) {
      constexpr int kN = decltype(columns)::value;
      float sum[kN / 2] = {};
      multiply<kN>(shared.ring, at, p.work.k_steps, sum);
      store<kN>(p, unit, sum, shared.result[device::warpgroup_index()]);
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
  static_assert(sizeof(Shared<kTokens>) <= kMoeSharedLimit);
  device::TensorMap weights;
  if (const char* problem = device::encode_tensor_map(&weights, make_layout(pass))) return problem;
  const GateUp p = {{pass.tables, plan.gate_up.weight_tiles, plan.gate_up.k_steps},
                    pass.input,
                    pass.activations,
                    pass.hidden_size,
                    pass.expert_size,
                    pass.top_k};
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
