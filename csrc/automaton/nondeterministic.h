// A pattern as a nondeterministic automaton over bytes (Thompson's construction).
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace dgemma {

struct ByteEdge {
  uint8_t first, last;  // bytes
  int32_t to;
};

struct NondeterministicAutomaton {
  int32_t start = 0, accept = 0;
  std::vector<std::vector<ByteEdge>> edges;
  std::vector<std::vector<int32_t>> silent;  // transitions without a byte
};

NondeterministicAutomaton nondeterministic(std::span<const int32_t> pattern);

}  // namespace dgemma
