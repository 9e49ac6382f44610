#pragma once

#include "automaton/byte_automaton.h"

namespace dgemma {

// The least automaton that accepts the same, by Hopcroft's algorithm: n log n steps, where refining
// all states again and again takes as many rounds as the longest count in a pattern. States are
// numbered in the order in which the start reaches them, and the dead one is the last.
ByteAutomaton minimized(const ByteAutomaton& given);

}  // namespace dgemma
