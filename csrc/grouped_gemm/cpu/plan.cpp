#include "grouped_gemm/cpu/plan.h"

#include <ostream>

namespace dgemma {

int64_t moe_plan_size(int64_t pairs, int64_t experts) { return experts + (experts + 1) + pairs; }

int64_t find_bad_expert_id(const int32_t* expert_ids, int64_t pairs, int64_t experts) {
  for (int64_t i = 0; i < pairs; ++i)
    if (expert_ids[i] < -1 || expert_ids[i] >= experts) return i;
  return -1;
}

MoePlan make_moe_plan(const int32_t* expert_ids, int64_t pairs, int64_t experts, int32_t* storage) {
  int32_t* expert = storage;
  int32_t* first = expert + experts;
  int32_t* pair = first + experts + 1;

  // A counting sort. `expert` first holds each expert's count, then where its next pair goes.
  for (int64_t e = 0; e < experts; ++e) expert[e] = 0;
  for (int64_t i = 0; i < pairs; ++i)
    if (expert_ids[i] >= 0) ++expert[expert_ids[i]];
  int32_t next = 0;
  for (int64_t e = 0; e < experts; ++e) {
    const int32_t count = expert[e];
    expert[e] = next;
    next += count;
  }
  for (int64_t i = 0; i < pairs; ++i)
    if (expert_ids[i] >= 0) pair[expert[expert_ids[i]]++] = static_cast<int32_t>(i);

  // Now expert[e] is where the pairs of e end; experts without any are closed up.
  int64_t groups = 0;
  int32_t begin = 0;
  for (int64_t e = 0; e < experts; ++e) {
    const int32_t end = expert[e];
    if (end == begin) continue;
    expert[groups] = static_cast<int32_t>(e);
    first[groups] = begin;
    ++groups;
    begin = end;
  }
  first[groups] = begin;
  return {groups, expert, first, pair};
}

void print(const MoePlan& plan, int64_t top_k, std::ostream& out) {
  for (int64_t g = 0; g < plan.groups; ++g) {
    out << "expert " << plan.expert[g] << ":";
    for (int32_t i = plan.first[g]; i < plan.first[g + 1]; ++i)
      out << " " << plan.pair[i] / top_k << "/" << plan.pair[i] % top_k;
    out << "\n";
  }
}

}  // namespace dgemma
