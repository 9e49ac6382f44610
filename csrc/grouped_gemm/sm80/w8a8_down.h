// weight * (down h) for every pair, weights and activations in bytes of one kind (W8A8) by
// mma.sync: see sm80/quantized_pipeline.h. sm80/int8_down.cu and sm89/fp8_down.cu instantiate it.
//
// A pair's product goes to the row of its slot, from where combine.cu sums them in that order.
#pragma once

#include "grouped_gemm/sm80/moe_launch.h"
#include "grouped_gemm/sm80/quantized_rows.h"

namespace dgemma {
namespace {

using namespace moe_quantized;

using Rows = DownRows<uint8_t>;  // of int8 or e4m3

struct Down {
  const float* activation_scales;  // [pairs], in sorted order
  const float* expert_weights;     // [pairs], in the order of the slots
  float* products;                 // [pairs, hidden_size], in the order of the slots
};

template <Encoding kEncoding, int kTokens>
__global__ void __launch_bounds__(kQuantizedThreads, least_blocks(kEncoding, kTokens))
    down(const MoeTileScheduler scheduler, const Rows rows, const Down p) {
  const auto finish_of = [&](int32_t pair, int32_t position) {
    const float weight = p.expert_weights[pair], scale = p.activation_scales[position];
    return [=](SumElement<kEncoding> total, float factor) {
      if constexpr (kEncoding == Encoding::kInt8)  // an exact sum, scaled as on the CPU
        return weight * (static_cast<float>(total) * scale * factor);
      else
        return weight * scale * (factor * total);
    };
  };
  multiply_work_tiles<kEncoding, kTokens>(
      scheduler, rows,
      [&](auto columns, const MoeWorkTile& work_tile, const OwnRows& own, const auto& sum) {
        store_products<decltype(columns)::value>(scheduler.tables, work_tile, own, sum,
                                                 rows.hidden_size, p.products, finish_of);
      });
}

template <Encoding kEncoding>
const char* launch_down(const MoeCudaPlan& plan, const MoeQuantizedPass& pass, void* stream) {
  const MoeCudaPass& ffn = pass.ffn;
  const Rows rows = {pass.down, pass.activations.codes, ffn.hidden_size};
  const Down p = {.activation_scales = pass.activations.scales,
                  .expert_weights = ffn.expert_weights,
                  .products = ffn.products};
  return launch_tile<kEncoding, 32, 64>(plan.token_tile, [&]<Encoding, int kTokens>() {
    const device::LaunchShape shape =
        launch_shape_of(plan.down, kQuantizedThreads, sizeof(Ring<kEncoding, kTokens>));
    return device::launch(shape, stream, down<kEncoding, kTokens>,
                          scheduler_of(ffn.tables, plan.down), rows, p);
  });
}

}  // namespace
}  // namespace dgemma
