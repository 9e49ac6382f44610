// A request's automaton as the kernels read it.
#pragma once

#include <cstdint>

#include "common/host_device.h"
#include "dgemma/automaton.h"

namespace dgemma {

struct Automaton {
  int64_t states, classes, sets, arcs;
  const int32_t *class_of_token, *set_begin, *set_class;
  const int32_t *out_begin, *out_target, *out_set;
  const int32_t *in_begin, *in_source, *in_set;
  const int32_t* distance;
  const int32_t* closing;  // nullptr: no part opens
  int64_t closing_left;
  const int32_t *token_begin, *tokens;

  // Whether a canvas may be in a state after i of its tokens.
  DGEMMA_HOST_DEVICE bool passes(int64_t i, int64_t state) const {
    return closing == nullptr || closing[state] == 0 || closing[state] <= closing_left - i;
  }
};

DGEMMA_HOST_DEVICE Automaton automaton_of(const int32_t* arena, const int64_t* descriptor,
                                          int64_t request) {
  const int64_t* const word = descriptor + request * DGEMMA_AUTOMATON_WORDS;
  const auto at = [&](dgemma_automaton_word which) { return arena + word[which]; };
  return {word[DGEMMA_AUTOMATON_STATES],
          word[DGEMMA_AUTOMATON_CLASSES],
          word[DGEMMA_AUTOMATON_SETS],
          word[DGEMMA_AUTOMATON_ARCS],
          at(DGEMMA_AUTOMATON_CLASS_OF_TOKEN),
          at(DGEMMA_AUTOMATON_SET_BEGIN),
          at(DGEMMA_AUTOMATON_SET_CLASS),
          at(DGEMMA_AUTOMATON_OUT_BEGIN),
          at(DGEMMA_AUTOMATON_OUT_TARGET),
          at(DGEMMA_AUTOMATON_OUT_SET),
          at(DGEMMA_AUTOMATON_IN_BEGIN),
          at(DGEMMA_AUTOMATON_IN_SOURCE),
          at(DGEMMA_AUTOMATON_IN_SET),
          at(DGEMMA_AUTOMATON_DISTANCE),
          word[DGEMMA_AUTOMATON_CLOSING] > 0 ? at(DGEMMA_AUTOMATON_CLOSING) : nullptr,
          word[DGEMMA_AUTOMATON_CLOSING_LEFT],
          at(DGEMMA_AUTOMATON_TOKEN_BEGIN),
          at(DGEMMA_AUTOMATON_TOKENS)};
}

DGEMMA_HOST_DEVICE bool has_automaton(const int64_t* descriptor, int64_t request) {
  return descriptor[request * DGEMMA_AUTOMATON_WORDS + DGEMMA_AUTOMATON_STATES] > 0;
}

}  // namespace dgemma
