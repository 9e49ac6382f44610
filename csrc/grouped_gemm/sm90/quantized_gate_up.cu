// h = gelu_tanh(gate x) * (up x) for every pair, over 4-bit weights on sm_90: see
// sm90/quantized_pipeline.h.
//
// A weight tile is 64 gate rows and the 64 up rows that belong to them, as two boxes in which even
// rows come first. A warp may take any of them as its 8 and 8; they are chosen so that eight
// results of a token that one store of the warp puts side by side are side by side in the order of
// columns that `down` takes.
#include "device/launch.h"
#include "device/shared_memory.h"
#include "grouped_gemm/sm90/gate_up_store.h"
#include "grouped_gemm/sm90/quantized_pipeline.h"

namespace dgemma {
namespace {

using namespace moe_sm90_quantized;

struct Rows {
  QuantizedMatrix matrix;  // [experts, 2 * expert_size, hidden_size]
  int32_t expert_size;

  // Rows of the tile: 64 of gate, then of up.
  DGEMMA_DEVICE int32_t matrix_row(const MoeWorkTile& work_tile, int32_t row) const {
    const int32_t result = min(work_tile.weight_tile * kColumns + row % kColumns, expert_size - 1);
    return 2 * work_tile.expert * expert_size + row / kColumns * expert_size + result;
  }
};

struct GateUp {
  MoeTileScheduler scheduler;
  Rows rows;
  const bfloat16* input;  // [tokens, permuted hidden_size]
  bfloat16* activations;  // [pairs, permuted expert_size]
  int32_t top_k;
  int32_t likely_steps;  // as in MoeCudaPlan
};

// The boxes of a work tile's weights: visit(row of the tile, pair of rows), of the first ones. See
// make_layout.
template <typename Visit>
DGEMMA_DEVICE void for_each_box(const Rows& rows, const MoeWorkTile& work_tile, Visit visit) {
  const int32_t gate = work_tile.expert * rows.expert_size + work_tile.weight_tile * kColumns / 2;
  visit(0, gate);
  visit(static_cast<int32_t>(kBoxRows), gate + rows.expert_size / 2);
}

template <int kTokens>
struct Shared {
  WeightRing<kTokens> ring;
  Results<kTokens> results;
};

// The result of the tile that a thread has: of position 16 * warp + (4 * h + 2 * j + i), with h, j
// and i from lane / 4, in the half block that the tile is.
DGEMMA_DEVICE int32_t own_result() {
  const int32_t warp = static_cast<int32_t>(device::warp_index());
  const int32_t row = static_cast<int32_t>(device::lane_index() / 4);
  return permuted_column(16 * warp + row / 4 * 8 + row % 4);
}

// The results go through shared memory, so that four threads write the 16 runs of four results that
// a token has of a warpgroup. A block of h is two tiles: threads j = 0, 1 of `down` have the first,
// 2 and 3 the second; where there is no second, zeros.
template <int kN>
DGEMMA_DEVICE void store(const MoeWorkTile& work_tile, const float (&sum)[kN / 2],
                         bfloat16 (*tile)[kWarpgroupColumns], int32_t expert_size,
                         bfloat16* activations) {
  const bool there = work_tile.weight_tile * kColumns + own_result() < expert_size;
  sync_warpgroup();  // the last work tile's results have been read
  store_tile<kN>(sum, tile, there);
  sync_warpgroup();
  const uint32_t thread = threadIdx.x % 128, piece = thread % kPiecesOfResult;
  const int64_t width = permuted_width(expert_size);
  const int32_t second = work_tile.weight_tile % 2;
  const bool alone = second == 0 && (work_tile.weight_tile + 1) * kColumns >= expert_size;
  const int64_t column =
      work_tile.weight_tile / 2 * kPermutedBlock +
      static_cast<int64_t>(device::warpgroup_index() * kPiecesOfResult + piece) * 16;
  for (uint32_t token = thread / kPiecesOfResult; token < static_cast<uint32_t>(work_tile.rows);
       token += 128 / kPiecesOfResult) {
    bfloat16* row = activations + (work_tile.first + static_cast<int64_t>(token)) * width + column;
    const uint4 eight = *reinterpret_cast<const uint4*>(result_piece(tile, token, piece));
    if (alone) {
      *reinterpret_cast<uint4*>(row) = {eight.x, eight.y, 0, 0};
      *reinterpret_cast<uint4*>(row + 8) = {eight.z, eight.w, 0, 0};
    } else {
      *reinterpret_cast<uint2*>(row + 4 * second) = {eight.x, eight.y};
      *reinterpret_cast<uint2*>(row + 4 * second + 8) = {eight.z, eight.w};
    }
  }
}

template <Encoding kEncoding, int kTokens>
__global__ void __launch_bounds__(kMoeThreads, 1)
    gate_up(const __grid_constant__ device::TensorMap weights, const GateUp p) {
  auto& shared = device::shared_memory<Shared<kTokens>>();
  if (threadIdx.x == 0) {
    device::prefetch_tensor_map(&weights);
    initialise(shared.ring);
    prefetch_weights(p.scheduler, p.likely_steps, [&](const MoeWorkTile& work_tile, int32_t step) {
      for_each_box(p.rows, work_tile, [&](int32_t, int32_t pair) {
        device::tma_prefetch_to_l2(&weights, step * static_cast<int32_t>(kValueBytes), pair, 0);
      });
    });
  }
  __syncthreads();
  device::wait_for_previous_kernel();  // it wrote the tables and the input
  device::let_next_kernel_begin();

  const uint32_t warp = device::warp_index();
  if (warp >= kConsumerWarps) {
    Registers::give_back();
    if (warp == kConsumerWarps) {
      const auto once = device::evict_first();
      load_weights<kEncoding>(
          shared.ring, p.scheduler, p.rows,
          [&](auto& to, device::Mbarrier* full, const MoeWorkTile& work_tile, int32_t byte) {
            for_each_box(p.rows, work_tile, [&](int32_t first, int32_t pair) {
              device::tma_load(to + first, &weights, full, once, byte, pair, 0);
            });
          });
    } else {
      gather_tokens<kEncoding>(shared.ring, p.scheduler, p.rows, p.input, [&](int32_t position) {
        return p.scheduler.tables.pair[position] / p.top_k;
      });
    }
  } else {
    Registers::take();
    const DecodeTable table = make_decode_table();
    typename WeightRing<kTokens>::State at;
    const int32_t result = own_result();
    const uint32_t place = static_cast<uint32_t>(result % 2 * (kColumns / 2) + result / 2);
    consume_work_tiles<kTokens>(p.scheduler, [&](auto columns, const MoeWorkTile& work_tile, bool) {
      constexpr int kN = decltype(columns)::value;
      OwnRows own;
      own.find<kEncoding, shared.ring.kSteps>(0, p.rows, work_tile, place, result);
      own.find<kEncoding, shared.ring.kSteps>(1, p.rows, work_tile, place + kBoxRows,
                                              result + kColumns);
      float sum[kN / 2] = {};
      multiply<kEncoding, kN>(shared.ring, at, own, p.rows.matrix, table, p.scheduler.k_steps, sum);
      store<kN>(work_tile, sum, shared.results.tile[device::warpgroup_index()], p.rows.expert_size,
                p.activations);
    });
  }
}

// [experts * 2 * expert_size, hidden_size / 2 bytes] as (byte, pair of rows, row of the pair). A
// tile that reaches past an expert's last gate row goes on into other rows: they give results that
// are not stored. Past the tensor and past a row it reads zero.
device::TensorLayout make_layout(const MoeQuantizedPass& pass) {
  const uint64_t row = static_cast<uint64_t>(pass.gate_up.value_bytes);
  const uint64_t pairs =
      static_cast<uint64_t>(pass.ffn.tables.experts) * static_cast<uint64_t>(pass.ffn.expert_size);
  return {.type = device::ElementType::uint8,
          .rank = 3,
          .base = pass.gate_up.values,
          .size = {row, pairs, 2},
          .stride = {0, 2 * row, row},
          .box = {kValueBytes, kBoxRows / 2, 2}};
}

template <Encoding kEncoding, int kTokens>
const char* launch(const MoeCudaPlan& plan, const MoeQuantizedPass& pass, void* stream) {
  static_assert(sizeof(Shared<kTokens>) <= kSharedLimit90);
  device::TensorMap weights;
  if (const char* error = device::encode_tensor_map(&weights, make_layout(pass))) return error;
  const MoeCudaPass& ffn = pass.ffn;
  const GateUp p = {.scheduler = {.tables = ffn.tables,
                                  .weight_tiles = plan.gate_up.weight_tiles,
                                  .k_steps = plan.gate_up.k_steps,
                                  .contiguous = plan.contiguous},
                    .rows = {pass.gate_up, ffn.expert_size},
                    .input = ffn.permuted_input,
                    .activations = ffn.activations,
                    .top_k = ffn.top_k,
                    .likely_steps = plan.likely_steps};
  const device::LaunchShape shape = {.grid = dim3(static_cast<unsigned>(plan.gate_up.blocks)),
                                     .threads = kMoeThreads,
                                     .shared_bytes = sizeof(Shared<kTokens>),
                                     .overlaps_previous_kernel = true};
  return device::launch(shape, stream, gate_up<kEncoding, kTokens>, weights, p);
}

}  // namespace

const char* launch_gate_up_sm90_quantized(const MoeCudaPlan& plan, const MoeQuantizedPass& pass,
                                          void* stream) {
  return launch_encoding_sm90(pass.gate_up_encoding, plan.token_tile,
                              [&]<Encoding kEncoding, int kTokens>() {
                                return launch<kEncoding, kTokens>(plan, pass, stream);
                              });
}

}  // namespace dgemma
