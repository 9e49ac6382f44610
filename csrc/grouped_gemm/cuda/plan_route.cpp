#include "grouped_gemm/cuda/plan_route.h"

#include <algorithm>
#include <cmath>
#include <ostream>

#include "common/ceil_divide.h"

namespace dgemma {
namespace {

// A canvas of 256 in tiles of 16 tokens gives 16 x 8 = 128 blocks, which fill the 132
// multiprocessors of an H100 or H200. Every block reads its tokens' whole rows, for their norm, so
// more segments would read more than they save.
constexpr int64_t kSegments = 8;
// So many tokens fill a GPU in tiles of 64 as well, and read the projection a quarter as often.
constexpr int64_t kManyTokens = 512;
constexpr int64_t kMostTokens = 1 << 24;  // keeps the number of blocks in 31 bits

}  // namespace

const char* route_error(const dgemma_route& op) {
  const auto outside = [](int64_t value, int64_t least, int64_t most) {
    return value < least || value > most;
  };
  if (outside(op.tokens, 0, kMostTokens)) return "tokens: wants 0 to 16777216";
  if (outside(op.hidden_size, 8, 65536) || op.hidden_size % 8 != 0)
    return "hidden_size: wants a multiple of 8 up to 65536";
  if (outside(op.experts, 1, kRouterMostExperts)) return "experts: wants 1 to 1024";
  if (outside(op.top_k, 1, kRouterMostChoices)) return "top_k: wants 1 to 32";
  if (op.top_k > op.experts) return "top_k: wants at most the number of experts";
  if (!std::isfinite(op.epsilon) || op.epsilon < 0.0f) return "epsilon: wants 0 or a little more";
  if (op.dtype != DGEMMA_BFLOAT16) return "dtype: wants bfloat16";
  return nullptr;
}

RoutePlan make_route_plan(const dgemma_route& op) {
  RoutePlan plan = {};
  const int64_t k_steps = ceil_divide(op.hidden_size, kRouterDepth);
  const int64_t segments =
      std::max(std::min(kSegments, k_steps), ceil_divide(k_steps, kRouterSteps));
  plan.token_tile = op.tokens <= kManyTokens ? 16 : 64;
  const int64_t token_tiles = ceil_divide(op.tokens, plan.token_tile);
  const int64_t expert_tiles = ceil_divide(op.experts, kRouterExperts);
  plan.k_steps = static_cast<int32_t>(k_steps);
  plan.segments = static_cast<int32_t>(segments);
  plan.token_tiles = static_cast<int32_t>(token_tiles);
  plan.expert_tiles = static_cast<int32_t>(expert_tiles);
  plan.score_blocks = static_cast<int32_t>(token_tiles * expert_tiles * segments);
  plan.choice_blocks = static_cast<int32_t>(ceil_divide(op.tokens, kRouterThreads / 32));
  WorkspaceParts parts;
  parts.take<float>(segments * op.tokens * op.experts);
  plan.workspace_bytes = parts.bytes;
  return plan;
}

void print(const RoutePlan& plan, std::ostream& out) {
  out << "scores: " << plan.score_blocks << " blocks of " << kRouterThreads << " threads, "
      << plan.token_tiles << " token tiles of " << plan.token_tile << ", " << plan.expert_tiles
      << " tiles of " << kRouterExperts << " experts, " << plan.k_steps << " steps of "
      << kRouterDepth << " in " << plan.segments << " segments\n";
  out << "choice: " << plan.choice_blocks << " blocks of " << kRouterThreads << " threads\n";
  out << "workspace: " << plan.workspace_bytes << " bytes\n";
}

}  // namespace dgemma
