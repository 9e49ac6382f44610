// The plan of a pass: the router's choice sorted by expert, which says which experts run and for
// which tokens.
//
// A pair is one slot of one token, token * top_k + slot. Pairs of one expert keep that order, so
// the plan is a function of the ids alone. Pure host code that allocates nothing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <iosfwd>

namespace dgemma {

struct MoePlan {
  int64_t groups;         // experts with at least one pair
  const int32_t* expert;  // [groups], ascending
  const int32_t* first;   // [groups + 1]: group g has pairs first[g] .. first[g + 1] - 1
  const int32_t* pair;    // [first[groups]]
};

// The int32 values that make_moe_plan writes for so many pairs and experts.
int64_t moe_plan_size(int64_t pairs, int64_t experts);

// The first position in [0, pairs) whose id is neither -1 nor in [0, experts), or -1.
int64_t find_bad_expert_id(const int32_t* expert_ids, int64_t pairs, int64_t experts);

// Sorts valid ids into `storage`, which the plan points into. O(pairs + experts).
MoePlan make_moe_plan(const int32_t* expert_ids, int64_t pairs, int64_t experts, int32_t* storage);

// One line per group, "expert 7: 0/2 5/0": token/slot for each pair.
void print(const MoePlan& plan, int64_t top_k, std::ostream& out);

}  // namespace dgemma
