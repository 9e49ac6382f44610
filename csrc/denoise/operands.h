// The tensors of denoise.h's and vocabulary_head.h's structs.
#pragma once

#include "common/ceil_divide.h"
#include "common/operands.h"
#include "dgemma/vocabulary_head.h"

namespace dgemma {

inline void add_allowed(OperandList* list, const dgemma_allowed& allowed, int64_t batch,
                        int64_t length, int64_t vocabulary) {
  const int64_t words = ceil_divide(vocabulary, int64_t{32});
  list->add("mask", allowed.mask, {allowed.rows > 0 ? allowed.rows : 0, words}).optional();
  list->add("row_index", allowed.row_index, {batch, length}).only_if(allowed.mask != nullptr);
}

inline void add_logits_params(OperandList* list, const dgemma_logits& logits) {
  list->add("temperature", logits.temperature, {logits.batch});
  list->add("active", logits.active, {logits.batch}).optional();
  add_allowed(list, logits.allowed, logits.batch, logits.length, logits.vocabulary);
}

inline OperandList operands_of(const dgemma_logits& logits) {
  // A GPU reads rows of a multiple of four values four at a time.
  const size_t element = logits.dtype == DGEMMA_BFLOAT16 ? 2 : 4;
  OperandList list(logits.dtype);
  list.add("raw", logits.raw, {logits.batch, logits.length, logits.vocabulary})
      .aligned_on_gpu_to(logits.vocabulary % 4 == 0 ? 4 * element : element);
  add_logits_params(&list, logits);
  return list;
}

// `Op` has the statistics as inputs, whose fields are const, or as outputs.
template <typename Op>
void add_softmax_statistics(OperandList* list, const Op& op) {
  const dgemma_logits& logits = op.logits;
  const int64_t tiles = ceil_divide(logits.vocabulary, int64_t{DGEMMA_VOCABULARY_TILE});
  list->add("row_max", op.row_max, {logits.batch, logits.length});
  list->add("row_sum", op.row_sum, {logits.batch, logits.length});
  list->add("tile_max", op.tile_max, {logits.batch, logits.length, tiles});
  list->add("tile_sum", op.tile_sum, {logits.batch, logits.length, tiles});
}

inline void add_statistics(OperandList* list, const dgemma_vocabulary_statistics& op) {
  list->add("argmax", op.argmax, {op.logits.batch, op.logits.length});
  list->add("entropy", op.entropy, {op.logits.batch, op.logits.length});
  add_softmax_statistics(list, op);
}

// A request's uniforms, and what they are drawn with where none are given.
template <typename Op>
void add_draws(OperandList* list, const Op& op, int64_t batch, int64_t length) {
  list->add("uniforms", op.uniforms, {batch, length}).optional();
  list->add("seed", op.seed, {batch}).only_if(op.uniforms == nullptr);
  list->add("canvas_index", op.canvas_index, {batch}).only_if(op.uniforms == nullptr);
}

inline OperandList operands_of(const dgemma_vocabulary_statistics& op) {
  OperandList list = operands_of(op.logits);
  add_statistics(&list, op);
  return list;
}

inline OperandList operands_of(const dgemma_vocabulary_head& op) {
  const dgemma_logits& logits = op.statistics.logits;
  OperandList list(logits.dtype);
  list.add("hidden", op.hidden, {logits.batch, logits.length, op.hidden_size});
  list.add("embedding", op.embedding, {logits.vocabulary, op.hidden_size})
      .only_if(logits.batch * logits.length > 0);
  list.add("raw", op.raw, {logits.batch, logits.length, logits.vocabulary});
  add_logits_params(&list, logits);
  add_statistics(&list, op.statistics);
  return list;
}

inline OperandList operands_of(const dgemma_sample& op) {
  OperandList list = operands_of(op.logits);
  add_softmax_statistics(&list, op);
  add_draws(&list, op, op.logits.batch, op.logits.length);
  list.add("step", op.step, {op.logits.batch}).only_if(op.uniforms == nullptr);
  list.add("tokens", op.tokens, {op.logits.batch, op.logits.length});
  return list;
}

inline OperandList operands_of(const dgemma_merge_vocabulary_shards& op) {
  OperandList list;
  list.add("best", op.best, {op.shards, op.batch, op.length});
  list.add("argmax", op.argmax, {op.shards, op.batch, op.length});
  list.add("entropy", op.entropy, {op.shards, op.batch, op.length});
  list.add("row_max", op.row_max, {op.shards, op.batch, op.length});
  list.add("row_sum", op.row_sum, {op.shards, op.batch, op.length});
  list.add("nonempty", op.nonempty, {op.shards, op.batch, op.length}).optional();
  list.add("active", op.active, {op.batch}).optional();
  add_draws(&list, op, op.batch, op.length);
  list.add("step", op.step, {op.batch}).only_if(op.uniforms == nullptr);
  list.add("merged_argmax", op.merged_argmax, {op.batch, op.length});
  list.add("merged_entropy", op.merged_entropy, {op.batch, op.length});
  list.add("merged_row_max", op.merged_row_max, {op.batch, op.length});
  list.add("merged_row_sum", op.merged_row_sum, {op.batch, op.length});
  list.add("share", op.share, {op.batch, op.length});
  list.add("owner", op.owner, {op.batch, op.length});
  list.add("own_uniform", op.own_uniform, {op.batch, op.length});
  return list;
}

inline OperandList operands_of(const dgemma_noise& op) {
  OperandList list;
  add_draws(&list, op, op.batch, op.length);
  list.add("step", op.step, {op.batch}).only_if(op.uniforms == nullptr);
  list.add("active", op.active, {op.batch}).optional();
  list.add("keep", op.keep, {op.batch, op.length}).optional();
  add_allowed(&list, op.allowed, op.batch, op.length, op.vocabulary);
  list.add("tokens", op.tokens, {op.batch, op.length});
  return list;
}

inline OperandList operands_of(const dgemma_update_canvas& op) {
  OperandList list;
  list.add("sampled", op.sampled, {op.batch, op.length});
  list.add("argmax", op.argmax, {op.batch, op.length});
  list.add("entropy", op.entropy, {op.batch, op.length});
  list.add("pinned", op.pinned, {op.batch, op.length}).optional();
  add_allowed(&list, op.allowed, op.batch, op.length, op.vocabulary);
  add_draws(&list, op, op.batch, op.length);
  list.add("max_steps", op.max_steps, {op.batch});
  list.add("t_min", op.t_min, {op.batch});
  list.add("t_max", op.t_max, {op.batch});
  list.add("entropy_bound", op.entropy_bound, {op.batch});
  list.add("stability_threshold", op.stability_threshold, {op.batch});
  list.add("confidence_threshold", op.confidence_threshold, {op.batch});
  list.add("active", op.active, {op.batch});
  list.add("canvas", op.canvas, {op.batch, op.length});
  list.add("draft", op.draft, {op.batch, op.length});
  list.add("stable_steps", op.stable_steps, {op.batch});
  list.add("step", op.step, {op.batch});
  list.add("temperature", op.temperature, {op.batch});
  list.add("accepted", op.accepted, {op.batch, op.length});
  list.add("mean_entropy", op.mean_entropy, {op.batch});
  list.add("status", op.status, {op.batch});
  return list;
}

inline OperandList operands_of(const dgemma_soft_embedding& op) {
  const dgemma_logits& logits = op.logits;
  OperandList list = operands_of(logits);
  add_softmax_statistics(&list, op);
  list.add("pinned", op.pinned, {logits.batch, logits.length}).optional();
  list.add("embedding", op.embedding, {logits.vocabulary, op.hidden_size})
      .only_if(logits.batch * logits.length > 0);
  list.add("output", op.output, {logits.batch, logits.length, op.hidden_size});
  return list;
}

}  // namespace dgemma
