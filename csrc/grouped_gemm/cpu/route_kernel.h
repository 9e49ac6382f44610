// The router's input: normalised, scaled twice, rounded each time. Compiled once per instruction
// set; see cpu/vector.h for what that forbids, and cpu/rows.h for why the sets agree bit for bit.
#pragma once

#include "cpu/rows.h"
#include "grouped_gemm/cpu/route.h"

namespace dgemma {
namespace {

template <typename T>
void route_task(const dgemma_route& op, float hidden_scale, void* scaled, int64_t first,
                int64_t end) {
  const int64_t width = op.hidden_size;
  const T* scale = static_cast<const T*>(op.scale);
  for (int64_t token = first; token < end; ++token) {
    const T* x = static_cast<const T*>(op.input) + token * width;
    T* to = static_cast<T*>(scaled) + token * width;
    const float factor = norm_factor(x, width, op.epsilon);
    for_each_vector(width, [&](int64_t i, auto span) {
      const Floats normed = rounded_to<T>(span.load(x + i) * factor);
      span.store(to + i, rounded_to<T>(normed * span.load(scale + i)) * hidden_scale);
    });
  }
}

}  // namespace
}  // namespace dgemma
