// weight * (down h) for every pair, weights and activations in e4m3 by mma.sync (8.9 and 12.0): see
// sm80/quantized_pipeline.h.
//
// A pair's product goes to the row of its slot, from where combine.cu sums them in that order.
#include "grouped_gemm/cuda/fp8.h"
#include "grouped_gemm/sm80/moe_launch.h"
#include "grouped_gemm/sm80/quantized_rows.h"

namespace dgemma {
namespace {

using namespace moe_quantized;

constexpr Encoding kEncoding = Encoding::kFp8Activations;
using Rows = DownRows<uint8_t>;  // of e4m3

struct Down {
  const float* activation_scales;  // [pairs], in sorted order
  const float* expert_weights;     // [pairs], in the order of the slots
  float* products;                 // [pairs, hidden_size], in the order of the slots
};

template <int kTokens>
__global__ void __launch_bounds__(kQuantizedThreads, kFp8LeastBlocks89)
    down(const MoeTileScheduler scheduler, const Rows rows, const Down p) {
  device::wait_for_previous_kernel();
  device::let_next_kernel_begin();
  Pipeline<kEncoding, kTokens, MoeTileScheduler, Rows> pipeline(
      device::shared_memory<Ring<kEncoding, kTokens>>(), scheduler, rows);
  pipeline.for_each_work_tile([&](auto columns, const MoeWorkTile& work_tile) {
    constexpr int kColumns = decltype(columns)::value;
    const OwnRows own = find_own_rows<kEncoding>(rows, work_tile);
    Sum<kColumns> sum = {};
    pipeline.template multiply<kColumns>(own, 0, scheduler.k_steps, sum);
    store_products<kColumns>(
        scheduler.tables, work_tile, own, sum, rows.hidden_size, p.products,
        [&](int32_t pair, int32_t position) {
          const float weight = p.expert_weights[pair] * p.activation_scales[position];
          return [=](float total, float factor) { return weight * (factor * total); };
        });
  });
}

template <int kTokens>
const char* launch(const MoeCudaPlan& plan, const MoeFp8Pass& pass, void* stream) {
  const MoeCudaPass& ffn = pass.ffn;
  const MoeTileScheduler scheduler = scheduler_of(ffn.tables, plan.down);
  const Rows rows = {pass.down, pass.activations, ffn.hidden_size};
  const Down p = {.activation_scales = pass.activation_scales,
                  .expert_weights = ffn.expert_weights,
                  .products = ffn.products};
  const device::LaunchShape shape =
      launch_shape_of(plan.down, kQuantizedThreads, sizeof(Ring<kEncoding, kTokens>));
  return device::launch(shape, stream, down<kTokens>, scheduler, rows, p);
}

}  // namespace

const char* launch_down_sm89_fp8(const MoeFp8Plan& plan, const MoeFp8Pass& pass, void* stream) {
  return plan.ffn.token_tile == 32 ? launch<32>(plan.ffn, pass, stream)
                                   : launch<64>(plan.ffn, pass, stream);
}

}  // namespace dgemma
