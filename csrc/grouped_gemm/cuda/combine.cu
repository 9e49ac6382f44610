// A token's output: the sum of its weighted products in the order of its slots, in fp32, rounded
// once. A thread has 8 of a token's values, which are 16 bytes of the output.
#include "device/launch.h"
#include "device/memory.h"
#include "grouped_gemm/cuda/moe.h"

namespace dgemma {
namespace {

struct Combine {
  const float* products;      // [tokens, top_k, hidden_size]; rows of skipped slots are not written
  const int32_t* expert_ids;  // [tokens, top_k]
  device::bfloat16* output;   // [tokens, hidden_size]
  int32_t tokens, hidden_size, top_k, experts;
};

DGEMMA_DEVICE void add(float (&sum)[8], const float* product) {
  const uint4 low = device::load_once(product), high = device::load_once(product + 4);
  const uint32_t bits[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
  for (int i = 0; i < 8; ++i) sum[i] += __uint_as_float(bits[i]);
}

__global__ void __launch_bounds__(kMoeCombineThreads) combine(const Combine p) {
  device::wait_for_previous_kernel();
  device::let_next_kernel_begin();
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kMoeCombineThreads + threadIdx.x;
  const int32_t pieces = p.hidden_size / 8;
  const int64_t token = index / pieces, column = index % pieces * 8;
  if (token >= p.tokens) return;

  float sum[8] = {};
  for (int64_t pair = token * p.top_k; pair < (token + 1) * p.top_k; ++pair) {
    const int32_t expert = p.expert_ids[pair];
    if (expert >= 0 && expert < p.experts) add(sum, p.products + pair * p.hidden_size + column);
  }
  const uint4 rounded = {
      device::pack_bfloat16(sum[0], sum[1]), device::pack_bfloat16(sum[2], sum[3]),
      device::pack_bfloat16(sum[4], sum[5]), device::pack_bfloat16(sum[6], sum[7])};
  *reinterpret_cast<uint4*>(p.output + token * p.hidden_size + column) = rounded;
}

}  // namespace

const char* launch_combine(const MoeCudaPlan& plan, const MoeCudaPass& pass, void* stream) {
  const Combine p = {.products = pass.products,
                     .expert_ids = pass.expert_ids,
                     .output = pass.output,
                     .tokens = pass.tokens,
                     .hidden_size = pass.hidden_size,
                     .top_k = pass.top_k,
                     .experts = pass.tables.experts};
  const device::LaunchShape shape = {.grid = dim3(static_cast<unsigned>(plan.combine_blocks)),
                                     .threads = kMoeCombineThreads,
                                     .overlaps_previous_kernel = true};
  return device::launch(shape, stream, combine, p);
}

}  // namespace dgemma
