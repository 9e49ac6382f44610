// weight * (down h) for every pair, over quantized weights: see sm80/quantized_pipeline.h.
//
// A pair's product goes to the row of its slot, from where combine.cu sums them in that order.
#include "grouped_gemm/sm80/moe_launch.h"
#include "grouped_gemm/sm80/quantized_rows.h"

namespace dgemma {
namespace {

using namespace moe_quantized;

using Rows = DownRows<bfloat16>;

struct Down {
  const float* expert_weights;  // [pairs], in the order of the slots
  float* products;              // [pairs, hidden_size], in the order of the slots
};

template <Encoding kEncoding, int kTokens>
__global__ void __launch_bounds__(kQuantizedThreads, least_blocks(kEncoding, kTokens))
    down(const MoeTileScheduler scheduler, const Rows rows, const Down p) {
  multiply_work_tiles<kEncoding, kTokens>(
      scheduler, rows,
      [&](auto columns, const MoeWorkTile& work_tile, const OwnRows& own, const auto& sum) {
        constexpr int kColumns = decltype(columns)::value;
        store_products<kColumns>(scheduler.tables, work_tile, own, sum, rows.hidden_size,
                                 p.products, [&](int32_t pair, int32_t) {
                                   const float weight = p.expert_weights[pair];
                                   return [=](float total, float factor) {
                                     return weight * (factor * total);
                                   };
                                 });
      });
}

template <Encoding kEncoding, int kTokens>
const char* launch(const MoeCudaPlan& plan, const MoeQuantizedPass& pass, void* stream) {
  const MoeCudaPass& ffn = pass.ffn;
  const MoeTileScheduler scheduler = scheduler_of(ffn.tables, plan.down);
  const Rows rows = {pass.down, ffn.activations, ffn.hidden_size};
  const Down p = {ffn.expert_weights, ffn.products};
  const device::LaunchShape shape =
      launch_shape_of(plan.down, kQuantizedThreads, sizeof(Ring<kEncoding, kTokens>));
  return device::launch(shape, stream, down<kEncoding, kTokens>, scheduler, rows, p);
}

}  // namespace

const char* launch_down_sm80_quantized(const MoeCudaPlan& plan, const MoeQuantizedPass& pass,
                                       void* stream) {
  return launch_encoding_sm80(pass.down_encoding, plan.token_tile,
                              [&]<Encoding kEncoding, int kTokens>() {
                                return launch<kEncoding, kTokens>(plan, pass, stream);
                              });
}

}  // namespace dgemma
