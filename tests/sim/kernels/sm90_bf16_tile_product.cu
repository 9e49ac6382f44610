// out[token, row] = sum over k of weights[row, k] tokens[token, k], for up to kTokens tokens: the
// shape of a projection of few tokens. Weights are the 64 rows of wgmma and tokens its N, so no
// tensor-core row is wasted on padding.
//
// A producer thread fills a ring of stages by TMA; a warpgroup multiplies. A stage is `full` when
// its bytes are there and `empty` when the warpgroup has finished reading it. A block walks over
// row tiles with one ring throughout.
#include "cuda/sm90_pipeline.h"
#include "device/barrier.h"
#include "device/bfloat16.h"
#include "device/fence.h"
#include "device/launch.h"
#include "device/mbarrier.h"
#include "device/registers.h"
#include "device/shared_memory.h"
#include "device/tma.h"
#include "device/warp.h"
#include "device/wgmma.h"
#include "entry.h"
#include "mistakes.h"

namespace {

using namespace dgemma::device;

constexpr int kRows = 64;   // wgmma's M
constexpr int kDepth = 64;  // of a stage: 128 bytes, the widest swizzle
constexpr int kStages = 4;
constexpr int kConsumers = 128;
constexpr int kThreads =
    2 * kConsumers;  // the second warpgroup produces; setmaxnreg acts on whole warpgroups
using Registers = RegisterPlan<kConsumers, 256, kConsumers, 40>;

template <int kTokens>
struct Shared {
  alignas(1024) bfloat16 weights[kStages][kRows * kDepth];
  alignas(1024) bfloat16 tokens[kStages][kTokens * kDepth];
  Mbarrier full[kStages], empty[kStages];
};

using State = dgemma::sm90::PipelineState<kStages>;

template <int kTokens>
DGEMMA_DEVICE void produce(Shared<kTokens>& shared, const TensorMap* weights,
                           const TensorMap* tokens, int row_tiles, int depth) {
  const CachePolicy once = evict_first(), again = evict_last();
  State at;
  for (int tile = static_cast<int>(blockIdx.x); tile < row_tiles;
       tile += static_cast<int>(gridDim.x)) {
    for (int k = 0; k < depth; k += kDepth, at.advance()) {
      // The stages are empty in the first round: the phase before the first counts as over.
      mbarrier_wait(&shared.empty[at.stage], at.phase ^ 1);
      Mbarrier* full = &shared.full[at.stage];
      mbarrier_arrive_expect_bytes(full, sizeof shared.weights[0] + sizeof shared.tokens[0]);
      tma_load(shared.weights[at.stage], weights, full, once, k, tile * kRows);
      tma_load(shared.tokens[at.stage], tokens, full, again, k, 0);
    }
  }
}

template <int kTokens, Mistake kMistake>
DGEMMA_DEVICE void consume(Shared<kTokens>& shared, float* out, int rows, int token_count,
                           int depth) {
  const int lane = static_cast<int>(lane_index()), warp = static_cast<int>(warp_index());
  const int row_tiles = (rows + kRows - 1) / kRows;
  State at;
  for (int tile = static_cast<int>(blockIdx.x); tile < row_tiles;
       tile += static_cast<int>(gridDim.x)) {
    float sum[kTokens / 2];
    for (int k = 0; k < depth; k += kDepth, at.advance()) {
      mbarrier_wait(&shared.full[at.stage], at.phase);
      const MatrixDescriptor a = k_major_descriptor(shared.weights[at.stage], Swizzle::bytes_128);
      const MatrixDescriptor b = k_major_descriptor(shared.tokens[at.stage], Swizzle::bytes_128);
      wgmma_fence(sum);
#pragma unroll
      for (int step = 0; step < kDepth / 16; ++step)
        wgmma<kTokens>(sum, advanced(a, step * 32), advanced(b, step * 32), k + step > 0);
      wgmma_commit();
      // All threads have issued their products with these two mistakes: only the wait is missing.
      if (kMistake == Mistake::early_release || kMistake == Mistake::early_read)
        named_barrier_sync(1, kConsumers);
      if (kMistake == Mistake::early_release && lane == 0) mbarrier_arrive(&shared.empty[at.stage]);
      if (kMistake != Mistake::early_read) wgmma_wait<0>(sum);
      if (kMistake != Mistake::early_release && kMistake != Mistake::no_release && lane == 0)
        mbarrier_arrive(&shared.empty[at.stage]);
    }
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) {
      const int row = tile * kRows + 16 * warp + lane / 4 + 8 * (i / 2 % 2);
      const int token = 8 * (i / 4) + 2 * (lane % 4) + i % 2;
      if (row < rows && token < token_count) out[token * rows + row] = sum[i];
    }
    wgmma_wait<0>(sum);
  }
}

template <int kTokens, Mistake kMistake>
__global__ void __launch_bounds__(kThreads, 1)
    tile_product(const __grid_constant__ TensorMap weights,
                 const __grid_constant__ TensorMap tokens, float* out, int rows, int token_count,
                 int depth) {
  auto& shared = shared_memory<Shared<kTokens>>();
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      mbarrier_init(&shared.full[stage], 1);
      mbarrier_init(&shared.empty[stage], kConsumers / 32);
    }
    fence_mbarrier_init();
    prefetch_tensor_map(&weights);
    prefetch_tensor_map(&tokens);
  }
  __syncthreads();
  if (warpgroup_index() == 1) {
    Registers::give_back();
    if (warp_index() == kConsumers / 32 && elect_one())
      produce<kTokens>(shared, &weights, &tokens, (rows + kRows - 1) / kRows, depth);
  } else {
    Registers::take();
    consume<kTokens, kMistake>(shared, out, rows, token_count, depth);
  }
}

template <int kTokens, Mistake kMistake>
const char* run(const bfloat16* weights, const bfloat16* tokens, float* out, int rows,
                int token_count, int depth, int blocks, void* stream) {
  const auto matrix = [depth](const bfloat16* base, int count, uint32_t box) {
    TensorLayout layout{ElementType::bfloat16, 2, base, {}, {}, {}, Swizzle::bytes_128};
    layout.size[0] = static_cast<uint64_t>(depth);
    layout.size[1] = static_cast<uint64_t>(count);
    layout.stride[1] = static_cast<uint64_t>(depth) * sizeof(bfloat16);
    layout.box[0] = kDepth;
    layout.box[1] = box;
    return layout;
  };
  TensorMap weight_map, token_map;
  if (const char* error = encode_tensor_map(&weight_map, matrix(weights, rows, kRows)))
    return error;
  if (const char* error = encode_tensor_map(&token_map, matrix(tokens, token_count, kTokens)))
    return error;
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(blocks));
  shape.threads = kThreads;
  shape.shared_bytes = sizeof(Shared<kTokens>);
  return launch(shape, stream, tile_product<kTokens, kMistake>, weight_map, token_map, out, rows,
                token_count, depth);
}

}  // namespace

// Takes at most 32 tokens, and a depth that is a multiple of 8. `mistake` is a Mistake, and only
// none under nvcc.
SIM_ENTRY sm90_bf16_tile_product(const uint16_t* weights, const uint16_t* tokens, float* out,
                                 int rows, int token_count, int depth, int blocks, int mistake,
                                 void* stream) {
  const auto call = [&](auto run_it) {
    return run_it(reinterpret_cast<const bfloat16*>(weights),
                  reinterpret_cast<const bfloat16*>(tokens), out, rows, token_count, depth, blocks,
                  stream);
  };
  switch (static_cast<Mistake>(mistake)) {
    case Mistake::none:
      return token_count <= 16 ? call(run<16, Mistake::none>) : call(run<32, Mistake::none>);
#ifdef DGEMMA_SIM
    case Mistake::early_release:
      return call(run<16, Mistake::early_release>);
    case Mistake::no_release:
      return call(run<16, Mistake::no_release>);
    case Mistake::early_read:
      return call(run<16, Mistake::early_read>);
#endif
    default:
      return "no such mistake here";
  }
}
