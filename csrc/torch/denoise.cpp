// The operators of the family denoise.
#include "dgemma/denoise.h"

#include "torch/logits.h"
#include "torch/registration.h"

namespace dgemma {
namespace {

// The key and the first word of the counter of a request's random numbers.
template <typename Operation>
constexpr std::array<Argument, 2> draws(Field batch) {
  using Struct = Operation;
  return {tensor("seed", AT(seed), {batch}), tensor("canvas_index", AT(canvas_index), {batch})};
}

struct Statistics : VocabularyStatistics {
  using Struct = dgemma_vocabulary_statistics;
  static constexpr auto kArguments = within(AT(logits), LogitsParams::kAll);
  static constexpr Operator kOperator = {
      .name = "vocabulary_statistics",
      .operation = operation<Struct>(AT(logits.dtype), AT(workspace), AT(workspace_bytes)),
      .arguments = kArguments,
      .outputs = kResults,
      .form = Form::kNewAndOut,
      .zeroed = true,
      .cpu = entry<&dgemma_cpu_vocabulary_statistics>(),
      .cuda = ON_CUDA(&dgemma_cuda_vocabulary_statistics,
                      &dgemma_cuda_vocabulary_statistics_workspace)};
};

struct Sample {
  using Struct = dgemma_sample;
  static constexpr auto kArguments =
      join(within(AT(logits), LogitsParams::kAll),
           softmax_statistics<Struct>(AT(logits.batch), AT(logits.length), AT(logits.vocabulary)),
           draws<Struct>(AT(logits.batch)),
           std::array{tensor("step", AT(step), {AT(logits.batch)}),
                      optional("uniforms", AT(uniforms), {AT(logits.batch), AT(logits.length)})});
  static constexpr std::array kOutputs = {
      tensor("out", AT(tokens), {AT(logits.batch), AT(logits.length)})};
  static constexpr Operator kOperator = {.name = "sample",
                                         .operation = operation<Struct>(AT(logits.dtype)),
                                         .arguments = kArguments,
                                         .outputs = kOutputs,
                                         .form = Form::kNewAndOut,
                                         .zeroed = true,
                                         .cpu = entry<&dgemma_cpu_sample>(),
                                         .cuda = ON_CUDA(&dgemma_cuda_sample)};
};

struct MergeVocabularyShards {
  using Struct = dgemma_merge_vocabulary_shards;
  static constexpr std::initializer_list<Extent> kShards = {positive(AT(shards)), AT(batch),
                                                            AT(length)};
  static constexpr std::initializer_list<Extent> kPositions = {AT(batch), AT(length)};
  static constexpr auto kArguments = join(
      std::array{tensor("best", AT(best), kShards), tensor("argmax", AT(argmax), kShards),
                 tensor("entropy", AT(entropy), kShards), tensor("row_max", AT(row_max), kShards),
                 tensor("row_sum", AT(row_sum), kShards),
                 number("rank", AT(rank), {.least = 0, .most = DGEMMA_MOST_SHARDS - 1})},
      draws<Struct>(AT(batch)),
      std::array{tensor("step", AT(step), {AT(batch)}), optional("nonempty", AT(nonempty), kShards),
                 optional("active", AT(active), {AT(batch)}),
                 optional("uniforms", AT(uniforms), kPositions)});
  static constexpr std::array kOutputs = {tensor("merged_argmax", AT(merged_argmax), kPositions),
                                          tensor("merged_entropy", AT(merged_entropy), kPositions),
                                          tensor("merged_row_max", AT(merged_row_max), kPositions),
                                          tensor("merged_row_sum", AT(merged_row_sum), kPositions),
                                          tensor("share", AT(share), kPositions),
                                          tensor("owner", AT(owner), kPositions),
                                          tensor("own_uniform", AT(own_uniform), kPositions)};
  static constexpr Operator kOperator = {.name = "merge_vocabulary_shards",
                                         .operation = operation<Struct>(),
                                         .arguments = kArguments,
                                         .outputs = kOutputs,
                                         .form = Form::kNewAndOut,
                                         .zeroed = true,
                                         .cpu = entry<&dgemma_cpu_merge_vocabulary_shards>(),
                                         .cuda = ON_CUDA(&dgemma_cuda_merge_vocabulary_shards)};
};

// The struct's `allowed` stays empty in both: noise comes from the whole vocabulary (denoise.h).
struct Noise {
  using Struct = dgemma_noise;
  static constexpr auto kArguments = join(
      std::array{tensor("tokens", AT(tokens), {AT(batch), AT(length)}),
                 number("vocabulary", AT(vocabulary), kVocabularies),
                 number("purpose", AT(purpose),
                        {.least = DGEMMA_PURPOSE_INITIAL_NOISE, .most = DGEMMA_PURPOSE_RENOISE})},
      draws<Struct>(AT(batch)),
      std::array{tensor("step", AT(step), {AT(batch)}), optional("active", AT(active), {AT(batch)}),
                 optional("keep", AT(keep), {AT(batch), AT(length)}),
                 optional("uniforms", AT(uniforms), {AT(batch), AT(length)})});
  static constexpr Operator kOperator = {.name = "noise_",
                                         .operation = operation<Struct>(),
                                         .arguments = kArguments,
                                         .cpu = entry<&dgemma_cpu_noise>(),
                                         .cuda = ON_CUDA(&dgemma_cuda_noise)};
};

struct UpdateCanvas {
  using Struct = dgemma_update_canvas;
  static constexpr std::initializer_list<Extent> kPositions = {AT(batch), AT(length)};
  static constexpr std::initializer_list<Extent> kRequests = {AT(batch)};
  static constexpr auto kArguments = join(
      std::array{
          tensor("sampled", AT(sampled), kPositions), tensor("argmax", AT(argmax), kPositions),
          tensor("entropy", AT(entropy), kPositions), optional("pinned", AT(pinned), kPositions),
          optional("uniforms", AT(uniforms), kPositions),
          number("vocabulary", AT(vocabulary), kVocabularies)},
      draws<Struct>(AT(batch)),
      std::array{tensor("max_steps", AT(max_steps), kRequests),
                 tensor("t_min", AT(t_min), kRequests), tensor("t_max", AT(t_max), kRequests),
                 tensor("entropy_bound", AT(entropy_bound), kRequests),
                 tensor("stability_threshold", AT(stability_threshold), kRequests),
                 tensor("confidence_threshold", AT(confidence_threshold), kRequests),
                 tensor("active", AT(active), kRequests), tensor("canvas", AT(canvas), kPositions),
                 tensor("draft", AT(draft), kPositions),
                 tensor("stable_steps", AT(stable_steps), kRequests),
                 tensor("step", AT(step), kRequests),
                 tensor("temperature", AT(temperature), kRequests),
                 tensor("accepted", AT(accepted), kPositions),
                 tensor("mean_entropy", AT(mean_entropy), kRequests),
                 tensor("status", AT(status), kRequests)});
  static constexpr Operator kOperator = {.name = "update_canvas_",
                                         .operation = operation<Struct>(),
                                         .arguments = kArguments,
                                         .cpu = entry<&dgemma_cpu_update_canvas>(),
                                         .cuda = ON_CUDA(&dgemma_cuda_update_canvas)};
};

struct SoftEmbedding {
  using Struct = dgemma_soft_embedding;
  static constexpr auto kArguments = join(
      within(AT(logits), LogitsParams::kAll),
      softmax_statistics<Struct>(AT(logits.batch), AT(logits.length), AT(logits.vocabulary)),
      std::array{optional("pinned", AT(pinned), {AT(logits.batch), AT(logits.length)}),
                 tensor("embedding", AT(embedding), {AT(logits.vocabulary), AT(hidden_size)}),
                 number("embedding_scale", AT(embedding_scale)), number("tolerance", AT(tolerance)),
                 number("max_embedding_norm", AT(max_embedding_norm))});
  static constexpr std::array kOutputs = {
      tensor("out", AT(output), {AT(logits.batch), AT(logits.length), AT(hidden_size)})};
  static constexpr Operator kOperator = {
      .name = "soft_embedding",
      .operation = operation<Struct>(AT(logits.dtype), AT(workspace), AT(workspace_bytes)),
      .arguments = kArguments,
      .outputs = kOutputs,
      .form = Form::kNewAndOut,
      .zeroed = true,
      .cpu = entry<&dgemma_cpu_soft_embedding, &dgemma_cpu_soft_embedding_workspace>(),
      .cuda = ON_CUDA(&dgemma_cuda_soft_embedding, &dgemma_cuda_soft_embedding_workspace)};
};

}  // namespace
}  // namespace dgemma

DGEMMA_OPERATORS(dgemma::Statistics, dgemma::Sample, dgemma::MergeVocabularyShards, dgemma::Noise,
                 dgemma::UpdateCanvas, dgemma::SoftEmbedding)
