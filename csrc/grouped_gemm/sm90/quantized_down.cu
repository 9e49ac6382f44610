// weight * (down h) for every pair, over 4-bit weights on sm_90: see sm90/quantized_pipeline.h.
//
// A pair's product goes to the row of its slot, from where combine.cu sums them in that order.
#include "device/launch.h"
#include "device/shared_memory.h"
#include "grouped_gemm/sm90/down_store.h"
#include "grouped_gemm/sm90/quantized_pipeline.h"

namespace dgemma {
namespace {

using namespace moe_sm90_quantized;

struct Rows {
  QuantizedMatrix matrix;  // [experts, hidden_size, expert_size]
  int32_t hidden_size;

  DGEMMA_DEVICE int32_t matrix_row(const MoeWorkTile& work_tile, int32_t row) const {
    return work_tile.expert * hidden_size +
           min(work_tile.weight_tile * kMoeWeightRows + row, hidden_size - 1);
  }
};

struct Down {
  MoeTileScheduler scheduler;
  Rows rows;
  const bfloat16* activations;  // [pairs, permuted expert_size], in sorted order
  const float* expert_weights;  // [pairs], in the order of the slots
  float* products;              // [pairs, hidden_size], in the order of the slots
  int32_t likely_steps;         // as in MoeCudaPlan
};

// The boxes of a work tile's weights: visit(row of the tile, row of the expert), of the first one.
template <typename Visit>
DGEMMA_DEVICE void for_each_box(const MoeWorkTile& work_tile, Visit visit) {
  for (int32_t first = 0; first < kMoeWeightRows; first += static_cast<int32_t>(kBoxRows))
    visit(first, work_tile.weight_tile * kMoeWeightRows + first);
}

template <int kTokens>
struct Shared {
  WeightRing<kTokens> ring;
  Target target[2][kTokens];  // by warpgroup
  TileTables tables;
};

template <Encoding kEncoding, int kTokens>
__global__ void __launch_bounds__(kMoeThreads, 1)
    down(const __grid_constant__ device::TensorMap weights, const Down p) {
  auto& shared = device::shared_memory<Shared<kTokens>>();
  if (threadIdx.x == 0) {
    device::prefetch_tensor_map(&weights);
    initialise(shared.ring);
    prefetch_weights(p.scheduler, p.likely_steps, [&](const MoeWorkTile& work_tile, int32_t step) {
      for_each_box(work_tile, [&](int32_t, int32_t row) {
        device::tma_prefetch_to_l2(&weights, step * static_cast<int32_t>(kValueBytes), row,
                                   work_tile.expert);
      });
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
      const auto once = device::evict_first();
      load_weights<kEncoding>(
          shared.ring, scheduler, p.rows,
          [&](auto& to, device::Mbarrier* full, const MoeWorkTile& work_tile, int32_t byte) {
            for_each_box(work_tile, [&](int32_t first, int32_t row) {
              device::tma_load(to + first, &weights, full, once, byte, row, work_tile.expert);
            });
          });
    } else {
      gather_tokens<kEncoding>(shared.ring, scheduler, p.rows, p.activations,
                               [](int32_t position) { return position; });
    }
  } else {
    Registers::take();
    Target* target = shared.target[device::warpgroup_index()];
    const uint32_t row = 16 * warp + device::lane_index() / 4;
    const DecodeTable table = make_decode_table();
    typename WeightRing<kTokens>::State at;
    consume_work_tiles<kTokens>(scheduler, [&](auto columns, const MoeWorkTile& work_tile,
                                               bool new_pairs) {
      constexpr int kN = decltype(columns)::value;
      OwnRows own;
      own.find<kEncoding, shared.ring.kSteps>(0, p.rows, work_tile, row, static_cast<int32_t>(row));
      own.find<kEncoding, shared.ring.kSteps>(1, p.rows, work_tile, row + 8,
                                              static_cast<int32_t>(row + 8));
      if (new_pairs)
        load_targets(scheduler.tables, work_tile, target,
                     [&](int32_t pair, int32_t) { return p.expert_weights[pair]; });
      float sum[kN / 2] = {};
      multiply<kEncoding, kN>(shared.ring, at, own, p.rows.matrix, table, scheduler.k_steps, sum);
      store_products<kN>(work_tile, sum, target, p.rows.hidden_size, p.products);
    });
  }
}

// (byte, row, expert). A tile's rows past an expert's last are zero, and bytes past a row's end.
device::TensorLayout make_layout(const MoeQuantizedPass& pass) {
  const uint64_t row = static_cast<uint64_t>(pass.down.value_bytes);
  const uint64_t rows = static_cast<uint64_t>(pass.ffn.hidden_size);
  return {.type = device::ElementType::uint8,
          .rank = 3,
          .base = pass.down.values,
          .size = {row, rows, static_cast<uint64_t>(pass.ffn.tables.experts)},
          .stride = {0, row, row * rows},
          .box = {kValueBytes, kBoxRows, 1}};
}

template <Encoding kEncoding, int kTokens>
const char* launch(const MoeCudaPlan& plan, const MoeQuantizedPass& pass, void* stream) {
  static_assert(sizeof(Shared<kTokens>) <= kSharedLimit90);
  device::TensorMap weights;
  if (const char* error = device::encode_tensor_map(&weights, make_layout(pass))) return error;
  const MoeCudaPass& ffn = pass.ffn;
  const Down p = {.scheduler = {.tables = ffn.tables,
                                .weight_tiles = plan.down.weight_tiles,
                                .k_steps = plan.down.k_steps,
                                .contiguous = plan.contiguous},
                  .rows = {pass.down, ffn.hidden_size},
                  .activations = ffn.activations,
                  .expert_weights = ffn.expert_weights,
                  .products = ffn.products,
                  .likely_steps = plan.likely_steps};
  const device::LaunchShape shape = {.grid = dim3(static_cast<unsigned>(plan.down.blocks)),
                                     .threads = kMoeThreads,
                                     .shared_bytes = sizeof(Shared<kTokens>),
                                     .overlaps_previous_kernel = true};
  return device::launch(shape, stream, down<kEncoding, kTokens>, weights, p);
}

}  // namespace

const char* launch_down_sm90_quantized(const MoeCudaPlan& plan, const MoeQuantizedPass& pass,
                                       void* stream) {
  return launch_encoding_sm90(pass.down_encoding, plan.token_tile,
                              [&]<Encoding kEncoding, int kTokens>() {
                                return launch<kEncoding, kTokens>(plan, pass, stream);
                              });
}

}  // namespace dgemma
