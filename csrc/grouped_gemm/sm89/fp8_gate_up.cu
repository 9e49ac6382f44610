// h = gelu_tanh(gate x) * (up x) for every pair, weights and activations in e4m3 by mma.sync (8.9
// and 12.0): see sm80/quantized_pipeline.h. h is rounded to bfloat16; quantize_rows.cu makes e4m3
// of its rows.
#include "grouped_gemm/cuda/fp8.h"
#include "grouped_gemm/sm80/moe_launch.h"
#include "grouped_gemm/sm80/scaled_activations.h"

namespace dgemma {
namespace {

using namespace moe_quantized;

constexpr Encoding kEncoding = Encoding::kFp8Activations;
using Rows = GateUpRows<uint8_t>;  // of e4m3

template <int kTokens>
__global__ void __launch_bounds__(kQuantizedThreads, kFp8LeastBlocks89)
    gate_up(const MoeTileScheduler scheduler, const Rows rows, const float* scales,
            bfloat16* activations) {
  device::wait_for_previous_kernel();
  device::let_next_kernel_begin();
  Pipeline<kEncoding, kTokens, MoeTileScheduler, Rows> pipeline(
      device::shared_memory<Ring<kEncoding, kTokens>>(), scheduler, rows);
  pipeline.for_each_work_tile([&](auto columns, const MoeWorkTile& work_tile) {
    constexpr int kColumns = decltype(columns)::value;
    const OwnRows own = find_own_rows<kEncoding>(rows, work_tile);
    Sum<kColumns> sum = {};
    pipeline.template multiply<kColumns>(own, 0, scheduler.k_steps, sum);
    store_scaled_activations<kColumns>(sum, own, work_tile, rows, scales, activations);
  });
}

template <int kTokens>
const char* launch(const MoeCudaPlan& plan, const MoeFp8Pass& pass, void* stream) {
  const MoeCudaPass& ffn = pass.ffn;
  const MoeTileScheduler scheduler = scheduler_of(ffn.tables, plan.gate_up);
  const Rows rows = {pass.gate_up, pass.input, ffn.expert_size, ffn.top_k, ffn.tables.pair};
  const device::LaunchShape shape =
      launch_shape_of(plan.gate_up, kQuantizedThreads, sizeof(Ring<kEncoding, kTokens>));
  return device::launch(shape, stream, gate_up<kTokens>, scheduler, rows, pass.input_scales,
                        ffn.activations);
}

}  // namespace

const char* launch_gate_up_sm89_fp8(const MoeFp8Plan& plan, const MoeFp8Pass& pass, void* stream) {
  return plan.ffn.token_tile == 32 ? launch<32>(plan.ffn, pass, stream)
                                   : launch<64>(plan.ffn, pass, stream);
}

}  // namespace dgemma
