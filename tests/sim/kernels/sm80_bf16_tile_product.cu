// out[token, row] = sum over k of weights[row, k] tokens[token, k], for up to 16 tokens, on GPUs
// from sm_80 on: cp.async into a ring of stages, ldmatrix, mma.sync. Weights are the 16 rows of
// mma, tokens its 8 columns.
//
// Four warps, each with 16 of a block's 64 rows. The 16-byte pieces of a stage are swizzled as TMA
// would do it, so that ldmatrix has no bank conflicts.
#include "device/bfloat16.h"
#include "device/cp_async.h"
#include "device/launch.h"
#include "device/ldmatrix.h"
#include "device/mma.h"
#include "device/shared_memory.h"
#include "device/swizzle.h"
#include "device/warp.h"
#include "entry.h"
#include "mistakes.h"

namespace {

using namespace dgemma::device;

constexpr int kThreads = 128;
constexpr int kRows = 64, kTokens = 16;
constexpr int kDepth = 64;  // 128 bytes, eight pieces of 16
constexpr int kPieces = kDepth / 8;
constexpr int kStages = 3;

struct Shared {
  alignas(1024) bfloat16 weights[kStages][kRows * kDepth];
  alignas(1024) bfloat16 tokens[kStages][kTokens * kDepth];
};

// The place of piece `piece` of row `row` in a stage.
DGEMMA_DEVICE void* piece_of(bfloat16* stage, int row, int piece) {
  const auto offset = static_cast<uint32_t>((row * kPieces + piece) * 16);
  return reinterpret_cast<char*>(stage) + swizzled(offset, Swizzle::bytes_128);
}

// Starts the copies of kCount rows, from row `first` of a [rows, depth] matrix; what lies outside
// becomes zero.
template <int kCount>
DGEMMA_DEVICE void copy_rows(bfloat16* stage, const bfloat16* matrix, int first, int rows, int k,
                             int depth) {
#pragma unroll
  for (int i = static_cast<int>(threadIdx.x); i < kCount * kPieces; i += kThreads) {
    const int row = i / kPieces, piece = i % kPieces, column = k + piece * 8;
    const bool inside = first + row < rows && column < depth;
    const bfloat16* from =
        matrix + (inside ? static_cast<int64_t>(first + row) * depth + column : 0);
    cp_async_16(piece_of(stage, row, piece), from, inside ? 16 : 0);
  }
}

template <Mistake kMistake>
__global__ void __launch_bounds__(kThreads)
    tile_product(const bfloat16* weights, const bfloat16* tokens, float* out, int rows,
                 int token_count, int depth) {
  auto& shared = shared_memory<Shared>();
  const int lane = static_cast<int>(lane_index()), warp = static_cast<int>(warp_index());
  const int first_row = static_cast<int>(blockIdx.x) * kRows;
  const int steps = (depth + kDepth - 1) / kDepth;

  const auto start = [&](int step) {
    if (step < steps) {
      const int stage = step % kStages;
      copy_rows<kRows>(shared.weights[stage], weights, first_row, rows, step * kDepth, depth);
      copy_rows<kTokens>(shared.tokens[stage], tokens, 0, token_count, step * kDepth, depth);
    }
    cp_async_commit();  // an empty group too, so that the count of groups stays that of steps
  };
  for (int step = 0; step < kStages - 1; ++step) start(step);

  float sum[2][4] = {};  // tokens 0-7 and 8-15
  for (int step = 0; step < steps; ++step) {
    if (kMistake != Mistake::no_copy_wait) cp_async_wait<kStages - 2>();
    // This step's copies are visible to all, and no warp still reads the stage that is filled next.
    if (kMistake != Mistake::no_block_barrier) __syncthreads();
    start(step + kStages - 1);
    bfloat16* const a_stage = shared.weights[step % kStages];
    bfloat16* const b_stage = shared.tokens[step % kStages];
#pragma unroll
    for (int k = 0; k < kPieces; k += 2) {
      uint32_t a[4], b[4];
      // Tiles: rows 0-7 and 8-15 of the first eight k, then of the next.
      load_tiles(a, piece_of(a_stage, 16 * warp + lane % 16, k + lane / 16));
      // Tiles: both halves of k for tokens 0-7, then for 8-15.
      load_tiles(b, piece_of(b_stage, lane % 8 + lane / 16 * 8, k + lane / 8 % 2));
      const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
      mma_m16n8k16(sum[0], a, low);
      mma_m16n8k16(sum[1], a, high);
    }
  }
  cp_async_wait<0>();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = first_row + 16 * warp + lane / 4 + 8 * (i / 2);
      const int token = 8 * half + 2 * (lane % 4) + i % 2;
      if (row < rows && token < token_count) out[token * rows + row] = sum[half][i];
    }
  }
}

template <Mistake kMistake>
const char* run(const bfloat16* weights, const bfloat16* tokens, float* out, int rows,
                int token_count, int depth, void* stream) {
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>((rows + kRows - 1) / kRows));
  shape.threads = kThreads;
  shape.shared_bytes = sizeof(Shared);
  return launch(shape, stream, tile_product<kMistake>, weights, tokens, out, rows, token_count,
                depth);
}

}  // namespace

// Takes at most 16 tokens, and a depth that is a multiple of 8. `mistake` is a Mistake, and only
// none under nvcc.
SIM_ENTRY sm80_bf16_tile_product(const uint16_t* weights, const uint16_t* tokens, float* out,
                                 int rows, int token_count, int depth, int mistake, void* stream) {
  const auto* w = reinterpret_cast<const bfloat16*>(weights);
  const auto* x = reinterpret_cast<const bfloat16*>(tokens);
  switch (static_cast<Mistake>(mistake)) {
    case Mistake::none:
      return run<Mistake::none>(w, x, out, rows, token_count, depth, stream);
#ifdef DGEMMA_SIM
    case Mistake::no_copy_wait:
      return run<Mistake::no_copy_wait>(w, x, out, rows, token_count, depth, stream);
    case Mistake::no_block_barrier:
      return run<Mistake::no_block_barrier>(w, x, out, rows, token_count, depth, stream);
#endif
    default:
      return "no such mistake here";
  }
}
