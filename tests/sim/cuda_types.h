// CUDA's vector types and dim3 for the host, so that the test bed needs no CUDA headers.
#pragma once

#include <cstdint>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

#define SIM_VECTOR_TYPES(T, name)                               \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };            \
  struct alignas(4 * sizeof(T)) name##4 { T x, y, z, w; };      \
  constexpr name##2 make_##name##2(T x, T y) { return {x, y}; } \
  constexpr name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }

SIM_VECTOR_TYPES(float, float)
SIM_VECTOR_TYPES(int, int)
SIM_VECTOR_TYPES(unsigned, uint)
#undef SIM_VECTOR_TYPES
