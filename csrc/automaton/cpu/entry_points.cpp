// The C entry points: checks, and what each task is.
#include <cinttypes>
#include <cmath>

#include "automaton/cpu/chain.h"
#include "automaton/cpu/kernels.h"
#include "automaton/operands.h"
#include "cpu/dispatch.h"
#include "cpu/entry.h"
#include "denoise/cpu/checks.h"

namespace dgemma {
namespace {

constexpr int64_t kMostStates = 1 << 20;
constexpr int64_t kMostClasses = 1 << 16;

// Every index of an array in [least, end).
dgemma_status check_indices(const char* name, const int32_t* values, int64_t count, int64_t least,
                            int64_t end, dgemma_cpu* cpu) {
  for (int64_t i = 0; i < count; ++i)
    if (values[i] < least || values[i] >= end)
      return fail(cpu, DGEMMA_INVALID_ARGUMENT,
                  "arena: got %d in the automaton's %s, wants %" PRId64 " to %" PRId64, values[i],
                  name, least, end - 1);
  return DGEMMA_OK;
}

// Begins of `count` lists that lie one after another in [0, end].
dgemma_status check_begins(const char* name, const int32_t* values, int64_t count, int64_t end,
                           dgemma_cpu* cpu) {
  for (int64_t i = 0; i < count; ++i)
    if (values[i] < 0 || values[i] > values[i + 1] || values[i + 1] > end)
      return fail(
          cpu, DGEMMA_INVALID_ARGUMENT,
          "arena: got %d in the automaton's %s, wants lists one after another within %" PRId64,
          values[i + 1], name, end);
  return DGEMMA_OK;
}

struct Part {
  const char* name;
  dgemma_automaton_word word;
  int64_t count;
};

// vocabulary 0: tokens and their classes are not read.
dgemma_status check_automaton(const int32_t* arena, int64_t arena_words, const int64_t* descriptor,
                              int64_t request, int64_t vocabulary, dgemma_cpu* cpu) {
  const int64_t* const word = descriptor + request * DGEMMA_AUTOMATON_WORDS;
  const int64_t states = word[DGEMMA_AUTOMATON_STATES], classes = word[DGEMMA_AUTOMATON_CLASSES];
  const int64_t sets = word[DGEMMA_AUTOMATON_SETS], arcs = word[DGEMMA_AUTOMATON_ARCS];
  if (states > kMostStates || classes < 1 || classes > kMostClasses || sets < 1 || arcs < 1 ||
      sets > arena_words || arcs > arena_words)
    return fail(cpu, DGEMMA_INVALID_ARGUMENT,
                "descriptor: got %" PRId64 " states, %" PRId64 " classes, %" PRId64
                " sets, %" PRId64 " arcs for request %" PRId64
                ", wants some of each within the arena",
                states, classes, sets, arcs, request);
  const auto fits = [&](dgemma_automaton_word which, int64_t count) {
    return word[which] >= 0 && count <= arena_words && word[which] <= arena_words - count;
  };
  if (!fits(DGEMMA_AUTOMATON_SET_BEGIN, sets + 1))
    return fail(cpu, DGEMMA_INVALID_ARGUMENT,
                "descriptor: got set_begin of request %" PRId64
                " outside the arena, wants it inside",
                request);
  const int64_t entries = arena[word[DGEMMA_AUTOMATON_SET_BEGIN] + sets];
  const Part parts[] = {
      {"class_of_token", DGEMMA_AUTOMATON_CLASS_OF_TOKEN, vocabulary},
      {"token_begin", DGEMMA_AUTOMATON_TOKEN_BEGIN, vocabulary == 0 ? 0 : classes + 1},
      {"tokens", DGEMMA_AUTOMATON_TOKENS, vocabulary},
      {"set_class", DGEMMA_AUTOMATON_SET_CLASS, entries},
      {"out_begin", DGEMMA_AUTOMATON_OUT_BEGIN, states + 1},
      {"out_target", DGEMMA_AUTOMATON_OUT_TARGET, arcs},
      {"out_set", DGEMMA_AUTOMATON_OUT_SET, arcs},
      {"in_begin", DGEMMA_AUTOMATON_IN_BEGIN, states + 1},
      {"in_source", DGEMMA_AUTOMATON_IN_SOURCE, arcs},
      {"in_set", DGEMMA_AUTOMATON_IN_SET, arcs},
      {"distance", DGEMMA_AUTOMATON_DISTANCE, states},
      {"closing", DGEMMA_AUTOMATON_CLOSING, word[DGEMMA_AUTOMATON_CLOSING] == 0 ? 0 : states}};
  for (const Part& part : parts)
    if (part.count < 0 || !fits(part.word, part.count))
      return fail(cpu, DGEMMA_INVALID_ARGUMENT,
                  "descriptor: got %s of request %" PRId64 " outside the arena, wants it inside",
                  part.name, request);
  const Automaton a = automaton_of(arena, descriptor, request);
  const dgemma_status found[] = {
      check_indices("class_of_token", a.class_of_token, vocabulary, 0, classes, cpu),
      check_begins("token_begin", a.token_begin, vocabulary == 0 ? 0 : classes, vocabulary, cpu),
      check_indices("tokens", a.tokens, vocabulary, 0, vocabulary, cpu),
      check_begins("set_begin", a.set_begin, sets, entries, cpu),
      check_indices("set_class", a.set_class, entries, 0, classes, cpu),
      check_begins("out_begin", a.out_begin, states, arcs, cpu),
      check_indices("out_target", a.out_target, arcs, 0, states, cpu),
      check_indices("out_set", a.out_set, arcs, 0, sets, cpu),
      check_begins("in_begin", a.in_begin, states, arcs, cpu),
      check_indices("in_source", a.in_source, arcs, 0, states, cpu),
      check_indices("in_set", a.in_set, arcs, 0, sets, cpu),
  };
  for (const dgemma_status status : found)
    if (status != DGEMMA_OK) return status;
  return DGEMMA_OK;
}

template <typename Op>
dgemma_status check_automata(const Op& op, int64_t batch, const uint8_t* active, int64_t vocabulary,
                             dgemma_cpu* cpu) {
  for (int64_t b = 0; b < batch; ++b) {
    if ((active != nullptr && active[b] == 0) || !has_automaton(op.descriptor, b)) continue;
    if (const auto status =
            check_automaton(op.arena, op.arena_words, op.descriptor, b, vocabulary, cpu))
      return status;
  }
  return DGEMMA_OK;
}

dgemma_status check_most(const char* name, const int64_t* descriptor, int64_t batch,
                         dgemma_automaton_word word, int64_t most, dgemma_cpu* cpu) {
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t count = descriptor[b * DGEMMA_AUTOMATON_WORDS + word];
    if (has_automaton(descriptor, b) && count > most)
      return fail(cpu, DGEMMA_INVALID_ARGUMENT,
                  "%s: got %" PRId64 ", wants at least the %" PRId64 " of request %" PRId64, name,
                  most, count, b);
  }
  return DGEMMA_OK;
}

dgemma_status check(const dgemma_class_statistics& op, dgemma_cpu* cpu) {
  if (const auto status = check_logits(op.logits, cpu)) return status;
  if (const auto status = check_sizes(
          {{"arena_words", op.arena_words, 0}, {"most_classes", op.most_classes, 1, kMostClasses}},
          cpu))
    return status;
  if (const auto status = check_operands(operands_of(op), cpu)) return status;
  if (const auto status = check_requests(op.logits, cpu)) return status;
  const int64_t batch = op.logits.batch;
  if (const auto status = check_most("most_classes", op.descriptor, batch, DGEMMA_AUTOMATON_CLASSES,
                                     op.most_classes, cpu))
    return status;
  if (const auto status = check_automata(op, batch, op.logits.active, op.logits.vocabulary, cpu))
    return status;
  for (int64_t i = 0; op.pinned != nullptr && i < batch * op.logits.length; ++i)
    if (op.pinned[i] != 0 && has_automaton(op.descriptor, i / op.logits.length) &&
        (op.canvas[i] < 0 || op.canvas[i] >= op.logits.vocabulary))
      return fail(cpu, DGEMMA_INVALID_ARGUMENT,
                  "canvas: got token %d at a pinned position, wants 0 to %" PRId64, op.canvas[i],
                  op.logits.vocabulary - 1);
  return DGEMMA_OK;
}

dgemma_status check(const dgemma_constrain& op, dgemma_cpu* cpu) {
  if (const auto status = check_sizes({{"batch", op.batch, 0},
                                       {"length", op.length, 1},
                                       {"arena_words", op.arena_words, 0},
                                       {"most_classes", op.most_classes, 1, kMostClasses},
                                       {"most_states", op.most_states, 1, kMostStates},
                                       {"most_sets", op.most_sets, 1}},
                                      cpu))
    return status;
  const OperandList operands = operands_of(op);
  if (const auto status = check_operands(operands, cpu)) return status;
  if (const auto status = check_workspace(operands, op.workspace, op.workspace_bytes,
                                          dgemma_cpu_constrain_workspace(&op), cpu))
    return status;
  const struct {
    const char* name;
    dgemma_automaton_word word;
    int64_t most;
  } limits[] = {{"most_classes", DGEMMA_AUTOMATON_CLASSES, op.most_classes},
                {"most_states", DGEMMA_AUTOMATON_STATES, op.most_states},
                {"most_sets", DGEMMA_AUTOMATON_SETS, op.most_sets}};
  for (const auto& limit : limits)
    if (const auto status =
            check_most(limit.name, op.descriptor, op.batch, limit.word, limit.most, cpu))
      return status;
  if (const auto status = check_automata(op, op.batch, op.active, 0, cpu)) return status;
  if (const auto status = check_uniforms(op.uniforms, op.batch, op.length, op.active, cpu))
    return status;
  for (int64_t b = 0; b < op.batch; ++b) {
    if ((op.active != nullptr && op.active[b] == 0) || !has_automaton(op.descriptor, b)) continue;
    const int64_t states = op.descriptor[b * DGEMMA_AUTOMATON_WORDS + DGEMMA_AUTOMATON_STATES];
    if (op.state[b] < 0 || op.state[b] >= states)
      return fail(cpu, DGEMMA_INVALID_ARGUMENT,
                  "state: got %d for request %" PRId64 ", wants 0 to %" PRId64, op.state[b], b,
                  states - 1);
    if (op.max_steps[b] < 1 || op.step[b] < 1 || op.step[b] > op.max_steps[b])
      return fail(cpu, DGEMMA_INVALID_ARGUMENT,
                  "step: got %d of %d for request %" PRId64 ", wants 1 to max_steps", op.step[b],
                  op.max_steps[b], b);
  }
  return DGEMMA_OK;
}

// What a row of sample_class needs: the masses of the tiles of its class.
struct RowWorkspace {
  float *tile_max, *tile_sum;
};

size_t carve(const dgemma_sample_class& op, char* base, RowWorkspace* work) {
  const int64_t tiles =
      (op.logits.vocabulary + DGEMMA_VOCABULARY_TILE - 1) / DGEMMA_VOCABULARY_TILE;
  Carver carver = {base};
  work->tile_max = carver.take<float>(tiles);
  work->tile_sum = carver.take<float>(tiles);
  return carver.used;
}

dgemma_status check(const dgemma_sample_class& op, dgemma_cpu* cpu) {
  if (const auto status = check_logits(op.logits, cpu)) return status;
  if (const auto status = check_sizes({{"arena_words", op.arena_words, 0}}, cpu)) return status;
  const OperandList operands = operands_of(op);
  if (const auto status = check_operands(operands, cpu)) return status;
  if (const auto status = check_workspace(operands, op.workspace, op.workspace_bytes,
                                          dgemma_cpu_sample_class_workspace(&op), cpu))
    return status;
  if (const auto status = check_requests(op.logits, cpu)) return status;
  if (const auto status =
          check_uniforms(op.remainder, op.logits.batch, op.logits.length, op.logits.active, cpu))
    return status;
  return check_automata(op, op.logits.batch, op.logits.active, op.logits.vocabulary, cpu);
}

}  // namespace
}  // namespace dgemma

dgemma_status dgemma_cpu_class_statistics(const dgemma_class_statistics* op, dgemma_cpu* cpu) {
  dgemma_status status = dgemma::check_call(op, cpu);
  if (status == DGEMMA_OK) status = dgemma::check(*op, cpu);
  dgemma_cpu_variant variant;
  if (status == DGEMMA_OK) status = dgemma::resolve_cpu_variant(cpu, &variant);
  if (status != DGEMMA_OK) return status;
  const auto kernel =
      DGEMMA_TABLE_OF(variant, automaton_kernels).class_statistics[op->logits.dtype];
  dgemma::run_tasks(cpu, op->logits.batch * op->logits.length,
                    [&](int64_t row) { kernel(*op, row); });
  return DGEMMA_OK;
}

size_t dgemma_cpu_constrain_workspace(const dgemma_constrain* op) {
  if (op == nullptr || op->batch < 1) return 0;
  return static_cast<size_t>(op->batch) * dgemma::chain_bytes(*op);
}

dgemma_status dgemma_cpu_constrain(const dgemma_constrain* op, dgemma_cpu* cpu) {
  dgemma_status status = dgemma::check_call(op, cpu);
  if (status == DGEMMA_OK) status = dgemma::check(*op, cpu);
  if (status != DGEMMA_OK) return status;
  const size_t bytes = dgemma::chain_bytes(*op);
  dgemma::run_tasks(cpu, op->batch, [&](int64_t b) {
    if ((op->active != nullptr && op->active[b] == 0) || !dgemma::has_automaton(op->descriptor, b))
      return;
    dgemma::constrain_request(*op, b,
                              static_cast<char*>(op->workspace) + static_cast<size_t>(b) * bytes);
  });
  return DGEMMA_OK;
}

size_t dgemma_cpu_sample_class_workspace(const dgemma_sample_class* op) {
  if (op == nullptr || op->logits.batch < 1 || op->logits.length < 1 || op->logits.vocabulary < 1)
    return 0;
  dgemma::RowWorkspace work;
  return static_cast<size_t>(op->logits.batch * op->logits.length) *
         dgemma::carve(*op, nullptr, &work);
}

dgemma_status dgemma_cpu_sample_class(const dgemma_sample_class* op, dgemma_cpu* cpu) {
  dgemma_status status = dgemma::check_call(op, cpu);
  if (status == DGEMMA_OK) status = dgemma::check(*op, cpu);
  dgemma_cpu_variant variant;
  if (status == DGEMMA_OK) status = dgemma::resolve_cpu_variant(cpu, &variant);
  if (status != DGEMMA_OK) return status;
  const auto kernel = DGEMMA_TABLE_OF(variant, automaton_kernels).sample_class[op->logits.dtype];
  dgemma::RowWorkspace unused;
  const size_t bytes = dgemma::carve(*op, nullptr, &unused);
  dgemma::run_tasks(cpu, op->logits.batch * op->logits.length, [&](int64_t row) {
    dgemma::RowWorkspace work;
    dgemma::carve(*op, static_cast<char*>(op->workspace) + static_cast<size_t>(row) * bytes, &work);
    kernel(*op, row, work.tile_max, work.tile_sum);
  });
  return DGEMMA_OK;
}
