// The plan of the CUDA router, callable from Python.
#include <cstdio>
#include <sstream>

#include "entry.h"
#include "grouped_gemm/cuda/plan_route.h"

// Null, or what is wrong with the sizes. `text` has room for `bytes`.
SIM_ENTRY route_plan(const dgemma_route* op, int64_t (&out)[8], char* text, size_t bytes) {
  if (const char* error = dgemma::route_error(*op)) return error;
  const dgemma::RoutePlan plan = dgemma::make_route_plan(*op);
  const int64_t numbers[8] = {plan.token_tile,    plan.k_steps,
                              plan.segments,      plan.token_tiles,
                              plan.expert_tiles,  plan.score_blocks,
                              plan.choice_blocks, static_cast<int64_t>(plan.workspace_bytes)};
  for (int i = 0; i < 8; ++i) out[i] = numbers[i];
  std::ostringstream stream;
  print(plan, stream);
  std::snprintf(text, bytes, "%s", stream.str().c_str());
  return nullptr;
}
