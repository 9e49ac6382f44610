// The launch plan of the router in CUDA. Pure host code that allocates nothing.
//
// The scores of 256 tokens are little work, 185 MFLOP, but all of the chip must take part in it to
// be done within some microseconds. So k is cut into segments, as many as the hidden size needs,
// whatever the number of tokens, and a second kernel adds them in their order: a token's bits do
// not depend on the others.
#pragma once

#include <cstddef>
#include <cstdint>
#include <iosfwd>

#include "cuda/entry.h"
#include "dgemma/grouped_gemm.h"

namespace dgemma {

// A block of the scores: four warps, each with 32 experts by all tokens of the tile.
constexpr int32_t kRouterThreads = 128;
constexpr int32_t kRouterExperts = 128;
// Depth of a step along k: 64 bfloat16 are 128 bytes, a row of the widest swizzle.
constexpr int32_t kRouterDepth = 64;
constexpr int32_t kRouterStages = 3;
// Steps of a segment at most: its tokens stay in shared memory, 48 KB for a tile of 64.
constexpr int32_t kRouterSteps = 6;
// A warp keeps the probabilities of one token: 32 per lane at most.
constexpr int32_t kRouterMostExperts = 1024;
// A lane keeps one choice.
constexpr int32_t kRouterMostChoices = 32;

struct RoutePlan {
  int32_t token_tile;  // 16 or 64
  int32_t k_steps, segments;
  int32_t token_tiles, expert_tiles;
  int32_t score_blocks, choice_blocks;
  size_t workspace_bytes;  // float32 [segments, tokens, experts]
};

// Null when the CUDA kernels take these sizes, this epsilon and this dtype, else what they want
// instead. Pointers are not checked.
const char* route_error(const dgemma_route& op);

// Plans sizes that have no error and at least one token, alike for every GPU.
RoutePlan make_route_plan(const dgemma_route& op);

// A line for each kernel and one for the workspace.
void print(const RoutePlan& plan, std::ostream& out);

}  // namespace dgemma
