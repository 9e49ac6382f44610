// The router's scores, one segment of k at a time: projection . scaled, where scaled is the token's
// normed row times the router's scale times hidden_size^-1/2, rounded to bfloat16 after each step.
//
// A block has up to 128 experts, 16 or 64 tokens and a segment of k. It starts the copies of the
// projection first; meanwhile it reads its tokens' whole rows for their norm, then their segment
// again (out of the L1 or L2) and leaves it scaled in shared memory. The projection is mma's A, the
// tokens its B.
#include "cuda/limits.h"
#include "device/cp_async.h"
#include "device/launch.h"
#include "device/ldmatrix.h"
#include "device/mma.h"
#include "device/shared_memory.h"
#include "device/swizzle.h"
#include "device/warp.h"
#include "grouped_gemm/cuda/route.h"

namespace dgemma {
namespace {

using device::bfloat16;

constexpr int32_t kWarps = kRouterThreads / 32;
constexpr int32_t kPieces = kRouterDepth * static_cast<int32_t>(sizeof(bfloat16)) / 16;
constexpr int32_t kRowTiles = kRouterExperts / 16 / kWarps;

template <int kTokens>
struct Shared {
  alignas(1024) bfloat16 projection[kRouterStages][kRouterExperts][kRouterDepth];  // swizzled
  alignas(1024) bfloat16 scaled[kRouterSteps][kTokens][kRouterDepth];              // likewise
  float inverse_rms[kTokens];
};
static_assert(sizeof(Shared<64>) <= kSharedLimit80);

// The work tile of a block.
struct Part {
  int32_t first_token, tokens;  // 1 to kTokens
  int32_t first_expert;
  int32_t segment, first_step, steps;
};

template <int kTokens>
DGEMMA_DEVICE Part find_part(const RouteCall& p) {
  const int32_t index = static_cast<int32_t>(blockIdx.x);
  const int32_t segment = index % p.segments, rest = index / p.segments;
  const int32_t first_token = rest / p.expert_tiles * kTokens;
  const int32_t first_step = segment * p.k_steps / p.segments;
  return {first_token,
          min(kTokens, p.tokens - first_token),
          rest % p.expert_tiles * kRouterExperts,
          segment,
          first_step,
          (segment + 1) * p.k_steps / p.segments - first_step};
}

// The address of a piece of a row in a tile.
DGEMMA_DEVICE char* piece_of(const void* tile, int32_t row, int32_t piece) {
  const uint32_t offset = static_cast<uint32_t>(row * kPieces + piece) * 16;
  return static_cast<char*>(const_cast<void*>(tile)) +
         device::swizzled(offset, device::Swizzle::bytes_128);
}

DGEMMA_DEVICE uint4 load_piece(const bfloat16* values) {
  return *reinterpret_cast<const uint4*>(values);
}
DGEMMA_DEVICE void unpack(uint4 piece, float (&value)[8]) {
  const uint32_t pairs[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    value[2 * i] = device::low_to_float(pairs[i]);
    value[2 * i + 1] = device::high_to_float(pairs[i]);
  }
}

// Starts the copies of one step's projection; rows and columns that do not exist become zero. Past
// the segment's last step the group is empty.
DGEMMA_DEVICE void start_copies(const RouteCall& p, const Part& part, int32_t step,
                                bfloat16 (*stage)[kRouterDepth]) {
  if (step < part.steps) {
    const int32_t thread = static_cast<int32_t>(threadIdx.x), piece = thread % kPieces;
    const int32_t column = (part.first_step + step) * kRouterDepth + piece * 8;
#pragma unroll
    for (int i = 0; i < kRouterExperts * kPieces / kRouterThreads; ++i) {
      const int32_t row = thread / kPieces + i * (kRouterThreads / kPieces);
      const int32_t expert = part.first_expert + row;
      const bool inside = expert < p.experts && column < p.hidden_size;
      const int64_t from = static_cast<int64_t>(expert) * p.hidden_size + column;
      device::cp_async_16(piece_of(stage, row, piece), p.projection + (inside ? from : 0),
                          inside ? 16 : 0);
    }
  }
  device::cp_async_commit();
}

// A warp takes every fourth token, four of them at a time so that their loads overlap. Which lane
// sums what depends on the hidden size alone.
template <int kTokens>
DGEMMA_DEVICE void find_norms(const RouteCall& p, const Part& part, float* inverse_rms) {
  constexpr int kAtOnce = 4;
  const int32_t warp = static_cast<int32_t>(device::warp_index());
  const int32_t lane = static_cast<int32_t>(device::lane_index());
  for (int32_t first = warp; first < part.tokens; first += kAtOnce * kWarps) {
    float squares[kAtOnce] = {};
#pragma unroll 2
    for (int32_t column = lane * 8; column < p.hidden_size; column += 32 * 8) {
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int32_t token = first + i * kWarps;
        if (token >= part.tokens) continue;
        float x[8];
        unpack(load_piece(p.input + static_cast<int64_t>(part.first_token + token) * p.hidden_size +
                          column),
               x);
#pragma unroll
        for (int j = 0; j < 8; ++j) squares[i] += x[j] * x[j];
      }
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      for (int lanes = 16; lanes > 0; lanes /= 2)
        squares[i] += __shfl_xor_sync(device::kAllLanes, squares[i], lanes);
      const int32_t token = first + i * kWarps;
      if (lane == 0 && token < part.tokens)
        inverse_rms[token] =
            1.0f / sqrtf(squares[i] / static_cast<float>(p.hidden_size) + p.epsilon);
    }
  }
}

// Eight values of a token, rounded after each product as bfloat16 tensors are.
DGEMMA_DEVICE uint4 scale_piece(uint4 input, uint4 scale, float inverse_rms, float hidden_scale) {
  float x[8], s[8];
  unpack(input, x);
  unpack(scale, s);
  uint32_t packed[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t normed =
        device::pack_bfloat16(x[2 * i] * inverse_rms, x[2 * i + 1] * inverse_rms);
    const uint32_t scaled = device::pack_bfloat16(device::low_to_float(normed) * s[2 * i],
                                                  device::high_to_float(normed) * s[2 * i + 1]);
    packed[i] = device::pack_bfloat16(device::low_to_float(scaled) * hidden_scale,
                                      device::high_to_float(scaled) * hidden_scale);
  }
  return {packed[0], packed[1], packed[2], packed[3]};
}

template <int kTokens>
DGEMMA_DEVICE void scale_tokens(const RouteCall& p, const Part& part, Shared<kTokens>& shared) {
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < part.steps * kTokens * kPieces;
       i += kRouterThreads) {
    const int32_t piece = i % kPieces, token = i / kPieces % kTokens, step = i / kPieces / kTokens;
    if (token >= part.tokens) continue;  // left as it is: a product's columns do not mix
    const int32_t column = (part.first_step + step) * kRouterDepth + piece * 8;
    uint4 scaled = {0, 0, 0, 0};
    if (column < p.hidden_size) {
      const int64_t row = static_cast<int64_t>(part.first_token + token) * p.hidden_size;
      scaled = scale_piece(load_piece(p.input + row + column), load_piece(p.scale + column),
                           shared.inverse_rms[token], p.hidden_scale);
    }
    *reinterpret_cast<uint4*>(piece_of(shared.scaled[step], token, piece)) = scaled;
  }
}

template <int kTokens>
__global__ void __launch_bounds__(kRouterThreads, 2) router_scores(const RouteCall p) {
  device::let_next_kernel_begin();
  auto& shared = device::shared_memory<Shared<kTokens>>();
  const Part part = find_part<kTokens>(p);
  const int32_t lane = static_cast<int32_t>(device::lane_index());
  const int32_t first_row = static_cast<int32_t>(device::warp_index()) * 16 * kRowTiles;
#pragma unroll
  for (int i = 0; i < kRouterStages - 1; ++i) start_copies(p, part, i, shared.projection[i]);
  find_norms<kTokens>(p, part, shared.inverse_rms);
  __syncthreads();
  scale_tokens(p, part, shared);

  float sum[kRowTiles][kTokens / 8][4] = {};
  for (int32_t step = 0; step < part.steps; ++step) {
    device::cp_async_wait<kRouterStages - 2>();
    // This step's copies, and in the first the scaled tokens, are visible to all, and no warp still
    // reads the stage that is filled next.
    __syncthreads();
    const int32_t prefetcher = step + kRouterStages - 1;
    start_copies(p, part, prefetcher, shared.projection[prefetcher % kRouterStages]);
#pragma unroll
    for (int k = 0; k < kPieces; k += 2) {
      uint32_t a[kRowTiles][4];
#pragma unroll
      for (int tile = 0; tile < kRowTiles; ++tile)
        device::load_tiles(a[tile], piece_of(shared.projection[step % kRouterStages],
                                             first_row + 16 * tile + lane % 16, k + lane / 16));
#pragma unroll
      for (int group = 0; group < kTokens / 16; ++group) {
        uint32_t b[4];
        device::load_tiles(b, piece_of(shared.scaled[step], 16 * group + lane / 16 * 8 + lane % 8,
                                       k + lane / 8 % 2));
        const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
#pragma unroll
        for (int tile = 0; tile < kRowTiles; ++tile) {
          device::mma_m16n8k16(sum[tile][2 * group], a[tile], low);
          device::mma_m16n8k16(sum[tile][2 * group + 1], a[tile], high);
        }
      }
    }
  }

  // Eight lanes write 32 bytes, a sector of the L2.
  float* out = p.partial + static_cast<int64_t>(part.segment) * p.tokens * p.experts;
#pragma unroll
  for (int i = 0; i < kRowTiles * kTokens / 2; ++i) {
    const int tile = i / (kTokens / 2), eight = i / 4 % (kTokens / 8);
    const int32_t expert = part.first_expert + first_row + 16 * tile + lane / 4 + i % 4 / 2 * 8;
    const int32_t token = 8 * eight + 2 * (lane % 4) + i % 2;
    if (expert < p.experts && token < part.tokens)
      out[static_cast<int64_t>(part.first_token + token) * p.experts + expert] =
          sum[tile][eight][i % 4];
  }
}

template <int kTokens>
const char* launch(const RoutePlan& plan, const RouteCall& call, void* stream) {
  // This kernel does not begin before the previous one ends, which may write what it reads.
  const device::LaunchShape shape = {.grid = dim3(static_cast<unsigned>(plan.score_blocks)),
                                     .threads = kRouterThreads,
                                     .shared_bytes = sizeof(Shared<kTokens>)};
  return device::launch(shape, stream, router_scores<kTokens>, call);
}

}  // namespace

const char* launch_router_scores_sm80_bf16(const RoutePlan& plan, const RouteCall& call,
                                           void* stream) {
  return plan.token_tile == 16 ? launch<16>(plan, call, stream) : launch<64>(plan, call, stream);
}

}  // namespace dgemma
