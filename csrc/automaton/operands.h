// The tensors of automaton.h's structs.
#pragma once

#include "denoise/operands.h"
#include "dgemma/automaton.h"

namespace dgemma {

template <typename Op>
void add_automata(OperandList* list, const Op& op, int64_t batch) {
  list->add("arena", op.arena, {op.arena_words});
  list->add("descriptor", op.descriptor, {batch, DGEMMA_AUTOMATON_WORDS});
}

template <typename Op>
void add_class_statistics(OperandList* list, const Op& op, int64_t rows) {
  list->add("class_max", op.class_max, {rows, op.most_classes});
  list->add("class_argmax", op.class_argmax, {rows, op.most_classes});
  list->add("class_mass", op.class_mass, {rows, op.most_classes});
  list->add("class_shifted", op.class_shifted, {rows, op.most_classes});
}

inline OperandList operands_of(const dgemma_class_statistics& op) {
  OperandList list = operands_of(op.logits);
  const int64_t batch = op.logits.batch, length = op.logits.length;
  add_automata(&list, op, batch);
  list.add("pinned", op.pinned, {batch, length}).optional();
  list.add("canvas", op.canvas, {batch, length});
  add_class_statistics(&list, op, batch * length);
  return list;
}

inline OperandList operands_of(const dgemma_constrain& op) {
  OperandList list;
  add_automata(&list, op, op.batch);
  add_class_statistics(&list, op, op.batch * op.length);
  list.add("pinned", op.pinned, {op.batch, op.length}).optional();
  list.add("active", op.active, {op.batch}).optional();
  list.add("state", op.state, {op.batch});
  list.add("tokens_left", op.tokens_left, {op.batch});
  list.add("max_steps", op.max_steps, {op.batch});
  list.add("seed", op.seed, {op.batch});
  list.add("canvas_index", op.canvas_index, {op.batch});
  list.add("step", op.step, {op.batch});
  list.add("uniforms", op.uniforms, {op.batch, op.length}).optional();
  list.add("argmax", op.argmax, {op.batch, op.length});
  list.add("entropy", op.entropy, {op.batch, op.length});
  list.add("chosen_class", op.chosen_class, {op.batch, op.length});
  list.add("remainder", op.remainder, {op.batch, op.length});
  list.add("matches", op.matches, {op.batch});
  return list;
}

inline OperandList operands_of(const dgemma_sample_class& op) {
  OperandList list = operands_of(op.logits);
  const int64_t batch = op.logits.batch, length = op.logits.length;
  add_automata(&list, op, batch);
  list.add("pinned", op.pinned, {batch, length}).optional();
  list.add("chosen_class", op.chosen_class, {batch, length});
  list.add("remainder", op.remainder, {batch, length});
  list.add("matches", op.matches, {batch});
  list.add("tokens", op.tokens, {batch, length});
  return list;
}

}  // namespace dgemma
