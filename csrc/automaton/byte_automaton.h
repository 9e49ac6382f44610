// From a pattern to the least automaton over bytes that accepts the same texts. This is work of the
// host at a request's submission: it allocates, and is no part of the C interface.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace dgemma {

// A pattern is a tree of these in prefix order, each a word followed by its numbers and children.
enum class Node : int32_t {
  kCharacters = 0,  // n, then n ranges (first, last) of code points: one character, in UTF-8
  kBytes = 1,       // n, then n bytes in order
  kConcat = 2,      // n children, one after another
  kUnion = 3,       // n children, one of them; none accepts nothing
  kRepeat = 4,      // least, most (-1: no limit), a child
  kList = 5,        // least, most (-1: no limit), separator, item
  kFields = 6,  // n, separator, then n times (required, item): items in order, each once at most
};

// Complete: the last state is the one from which nothing is accepted. Bytes that no pattern tells
// apart share a class.
struct ByteAutomaton {
  int32_t states = 0;
  int32_t start = 0;
  int32_t byte_classes = 0;
  std::vector<uint8_t> byte_class;  // [256]
  std::vector<uint16_t> next;       // [byte_classes, states]
  std::vector<uint8_t> accepting;   // [states]
};

// Throws std::length_error where the automaton would have more than kMostByteStates states on the
// way, or takes too long, and std::invalid_argument for what is no pattern.
constexpr int32_t kMostByteStates = 65'000;
ByteAutomaton byte_automaton(std::span<const int32_t> pattern);

}  // namespace dgemma
