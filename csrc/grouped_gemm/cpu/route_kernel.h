// What stands before and behind the router's product: its input, normalised, scaled twice, rounded
// each time; and the choice. Compiled once per instruction set; see cpu/vector.h for what that
// forbids, and cpu/rows.h for why the sets agree bit for bit.
#pragma once

#include "cpu/rows.h"
#include "grouped_gemm/cpu/choice.h"
#include "grouped_gemm/cpu/route.h"

namespace dgemma {
namespace {

template <typename T>
void router_input_task(const dgemma_router_input& op, float hidden_scale, int64_t first,
                       int64_t end) {
  const int64_t width = op.hidden_size;
  const T* scale = static_cast<const T*>(op.scale);
  for (int64_t token = first; token < end; ++token) {
    const T* x = static_cast<const T*>(op.input) + token * width;
    T* to = static_cast<T*>(op.output) + token * width;
    const float factor = norm_factor(x, width, op.epsilon);
    for_each_vector(width, [&](int64_t i, auto span) {
      const Floats normed = rounded_to<T>(span.load(x + i) * factor);
      span.store(to + i, rounded_to<T>(normed * span.load(scale + i)) * hidden_scale);
    });
  }
}

// In the order of torch's sum of a row of any length.
inline float sum_of(const float* values, int64_t n) {
  if (n >= 8) return RowSum<Itself>::of(values, n);
  // Of fewer than eight, four sums take turns as long as there is a value for each.
  float parts[4] = {};
  const int64_t turns = n / 4 * 4;
  for (int64_t i = 0; i < n; ++i) parts[i < turns ? i : 0] += values[i];
  for (int part = 1; part < 4; ++part) parts[0] += parts[part];
  return parts[0];
}

template <typename T>
void router_choice_task(const dgemma_router_choice& op, int64_t first, int64_t end) {
  const T* scale = static_cast<const T*>(op.per_expert_scale);
  for (int64_t token = first; token < end; ++token) {
    int32_t* ids = op.expert_ids + token * op.top_k;
    float* weights = op.expert_weights + token * op.top_k;
    choose_largest(op.probabilities + token * op.experts, op.experts, op.top_k, ids, weights);
    const float sum = sum_of(weights, op.top_k);
    for (int64_t k = 0; k < op.top_k; ++k) weights[k] = weights[k] / sum * to_float(scale[ids[k]]);
  }
}

}  // namespace
}  // namespace dgemma
