#include "automaton/cuda/plan_chain.h"

#include <algorithm>
#include <ostream>

#include "automaton/cuda/kernels.h"
#include "common/ceil_divide.h"
#include "cuda/entry.h"
#include "cuda/limits.h"

namespace dgemma {

ChainPlan make_chain_plan(const dgemma_constrain& op) {
  const int64_t positions = op.batch * op.length;
  const int64_t weights = op.most_sets + op.most_classes;
  const int64_t states_bytes = 2 * op.most_states * static_cast<int64_t>(sizeof(Scaled));
  const int64_t weights_bytes = weights * static_cast<int64_t>(sizeof(Weight));
  const auto fits = [](int64_t bytes) { return bytes <= kSharedLimit80 - kKeyScratch; };
  ChainPlan plan = {};
  plan.pass_threads = static_cast<int32_t>(
      std::clamp<int64_t>(ceil_divide(op.most_states, 32) * 32, 64, kMostPassThreads));
  plan.states_bytes = fits(states_bytes) ? static_cast<uint32_t>(states_bytes) : 0;
  plan.weights_bytes = fits(weights_bytes) ? static_cast<uint32_t>(weights_bytes) : 0;
  WorkspaceParts workspace;
  plan.class_mass = workspace.take<Scaled>(positions * op.most_classes);
  plan.set_mass = workspace.take<Scaled>(positions * op.most_sets);
  plan.best = workspace.take<BestOfSet>(positions * op.most_sets);
  plan.backward = workspace.take<Scaled>((positions + op.batch) * op.most_states);
  plan.forward = workspace.take<Scaled>(positions * op.most_states);
  plan.first_arc = workspace.take<int32_t>(positions * op.most_states);
  plan.score =
      workspace.take<double>(plan.states_bytes == 0 ? 2 * op.batch * op.most_states : int64_t{0});
  plan.weights = workspace.take<Weight>(plan.weights_bytes == 0 ? positions * weights : int64_t{0});
  plan.outcome = workspace.take<int32_t>(op.batch);
  plan.workspace_bytes = workspace.bytes;
  return plan;
}

void print(const ChainPlan& plan, std::ostream& out) {
  const auto place = [](uint32_t bytes) { return bytes > 0 ? "shared memory" : "the workspace"; };
  out << "constrain: three blocks of " << plan.pass_threads << " threads a request, states in "
      << place(plan.states_bytes) << " (" << plan.states_bytes << " bytes); a block of "
      << kPositionThreads << " threads a position, weights in " << place(plan.weights_bytes) << " ("
      << plan.weights_bytes << " bytes); " << plan.workspace_bytes << " bytes of workspace\n";
}

}  // namespace dgemma
