// The activation between gate, up and down. Compiled once per instruction set; see cpu/vector.h for
// what that forbids.
#pragma once

#include "cpu/vector.h"

namespace dgemma {
namespace {

// gelu_tanh(gate) * up: 0.5 g (1 + tanh(sqrt(2 / pi) (g + 0.044715 g^3))) u. Never inlined, so that
// every tile shape runs the same instructions.
__attribute__((noinline)) inline Floats activate(Floats gate, Floats up) {
  const Floats inner = 0.79788456080286536f * fmadd(0.044715f * gate * gate, gate, gate);
  return 0.5f * gate * (1.0f + tanh(inner)) * up;
}

}  // namespace
}  // namespace dgemma
