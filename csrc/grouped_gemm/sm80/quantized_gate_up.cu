// h = gelu_tanh(gate x) * (up x) for every pair, over quantized weights: see
// sm80/quantized_pipeline.h.
#include "grouped_gemm/cuda/gelu.h"
#include "grouped_gemm/cuda/pack_rows.h"
#include "grouped_gemm/sm80/moe_launch.h"
#include "grouped_gemm/sm80/quantized_rows.h"

namespace dgemma {
namespace {

using namespace moe_quantized;

using Rows = GateUpRows<bfloat16>;

// Four lanes write 16 bytes of a row.
template <int kColumns>
DGEMMA_DEVICE void store(const Sum<kColumns>& sum, const OwnRows& own, const MoeWorkTile& work_tile,
                         int32_t expert_size, bfloat16* activations) {
#pragma unroll
  for (int tile = 0; tile < kRowTiles; ++tile) {
    const int32_t column = work_tile.weight_tile * kResults + first_row(tile) / 2 + packed_row();
    const float gate = own.factor[tile][0], up = own.factor[tile][1];
#pragma unroll
    for (int group = 0; group < kColumns; ++group) {
      const float (&d)[4] = sum[tile][group];
      const uint32_t h =
          pack_rows(gelu_tanh(gate * d[0]) * (up * d[2]), gelu_tanh(gate * d[1]) * (up * d[3]));
      const int32_t token = 8 * group + packed_token();
      if (token < work_tile.rows && column < expert_size)
        *reinterpret_cast<uint32_t*>(
            activations + static_cast<int64_t>(work_tile.first + token) * expert_size + column) = h;
    }
  }
}

template <Encoding kEncoding, int kTokens>
__global__ void __launch_bounds__(kQuantizedThreads, least_blocks(kEncoding, kTokens))
    gate_up(const MoeTileScheduler scheduler, const Rows rows, bfloat16* activations) {
  multiply_work_tiles<kEncoding, kTokens>(
      scheduler, rows,
      [&](auto columns, const MoeWorkTile& work_tile, const OwnRows& own, const auto& sum) {
        constexpr int kColumns = decltype(columns)::value;
        store<kColumns>(sum, own, work_tile, rows.expert_size, activations);
      });
}

template <Encoding kEncoding, int kTokens>
const char* launch(const MoeCudaPlan& plan, const MoeQuantizedPass& pass, void* stream) {
  const MoeCudaPass& ffn = pass.ffn;
  const MoeTileScheduler scheduler = scheduler_of(ffn.tables, plan.gate_up);
  const Rows rows = {pass.gate_up, ffn.input, ffn.expert_size, ffn.top_k, ffn.tables.pair};
  const device::LaunchShape shape =
      launch_shape_of(plan.gate_up, kQuantizedThreads, sizeof(Ring<kEncoding, kTokens>));
  return device::launch(shape, stream, gate_up<kEncoding, kTokens>, scheduler, rows,
                        ffn.activations);
}

}  // namespace

const char* launch_gate_up_sm80_quantized(const MoeCudaPlan& plan, const MoeQuantizedPass& pass,
                                          void* stream) {
  return launch_encoding_sm80(pass.gate_up_encoding, plan.token_tile,
                              [&]<Encoding kEncoding, int kTokens>() {
                                return launch<kEncoding, kTokens>(plan, pass, stream);
                              });
}

}  // namespace dgemma
