// From an automaton over bytes to one over tokens. This is work of the host at a request's
// submission: it allocates, and is no part of the C interface.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "automaton/byte_automaton.h"

namespace dgemma {

// The byte strings of a vocabulary's tokens: sorted, each once, none empty.
struct TokenStrings {
  std::span<const uint8_t> bytes;
  std::span<const int64_t> offset;  // [strings + 1]
};

// Tokens that lead from every state to the same state are one class; class 0 leads nowhere. Classes
// that lead from a state to the same state are a set; the sets are shared, and an arc has one. END,
// the last state, follows the accepting states by class `end_class`, and itself by `tail_class`.
// Only states that the start reaches, and that lead to an accepting one, are here.
struct TokenAutomaton {
  int32_t states = 0;
  int32_t start = 0;
  int32_t classes = 0;
  int32_t vectors = 0;  // different effects of prefixes of tokens: what the walk costs
  std::vector<int32_t> class_of_string;
  int32_t end_class = 0, tail_class = 0;
  std::vector<int32_t> set_begin, set_class;            // [sets + 1], [entries]
  std::vector<int32_t> out_begin, out_target, out_set;  // arcs by source: [states + 1], [arcs]
  std::vector<int32_t> in_begin, in_source, in_set;     // the same by target
  std::vector<int32_t>
      distance;  // [states]: the fewest tokens from which an accepting state follows
};

// What a compiled grammar may have; a longer one is refused before it is built whole.
struct TokenLimits {
  int32_t states, classes, arcs;
};

// Throws std::length_error, naming the limit.
TokenAutomaton token_automaton(const ByteAutomaton& bytes, const TokenStrings& strings,
                               const TokenLimits& limits);

}  // namespace dgemma
