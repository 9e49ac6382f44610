// The operators of the family automaton.
#include "dgemma/automaton.h"

#include "torch/logits.h"
#include "torch/registration.h"

namespace dgemma {
namespace {

constexpr Range kMost = {.least = 1, .most = std::numeric_limits<int32_t>::max()};

template <typename Operation>
constexpr std::array<Argument, 2> automata(Field batch) {
  using Struct = Operation;
  return {tensor("arena", AT(arena), {AT(arena_words)}),
          tensor("descriptor", AT(descriptor), {batch, DGEMMA_AUTOMATON_WORDS})};
}

template <typename Operation>
constexpr std::array<Argument, 4> class_statistics(Field batch, Field length) {
  using Struct = Operation;
  const Field most = AT(most_classes);
  return {tensor("class_max", AT(class_max), {batch, length, most}),
          tensor("class_argmax", AT(class_argmax), {batch, length, most}),
          tensor("class_mass", AT(class_mass), {batch, length, most}),
          tensor("class_shifted", AT(class_shifted), {batch, length, most})};
}

struct ClassStatistics {
  using Struct = dgemma_class_statistics;
  static constexpr std::initializer_list<Extent> kPositions = {AT(logits.batch), AT(logits.length)};
  static constexpr auto kArguments =
      join(within(AT(logits), LogitsParams::kAll), automata<Struct>(AT(logits.batch)),
           std::array{optional("pinned", AT(pinned), kPositions),
                      tensor("canvas", AT(canvas), kPositions)},
           class_statistics<Struct>(AT(logits.batch), AT(logits.length)));
  static constexpr Operator kOperator = {.name = "class_statistics_",
                                         .operation = operation<Struct>(AT(logits.dtype)),
                                         .arguments = kArguments,
                                         .cpu = entry<&dgemma_cpu_class_statistics>(),
                                         .cuda = ON_CUDA(&dgemma_cuda_class_statistics)};
};

struct Constrain {
  using Struct = dgemma_constrain;
  static constexpr std::initializer_list<Extent> kPositions = {AT(batch), AT(length)};
  static constexpr std::initializer_list<Extent> kRequests = {AT(batch)};
  static constexpr auto kArguments = join(
      automata<Struct>(AT(batch)),
      std::array{number("most_states", AT(most_states), kMost),
                 number("most_sets", AT(most_sets), kMost)},
      class_statistics<Struct>(AT(batch), AT(length)),
      std::array{
          optional("pinned", AT(pinned), kPositions), optional("active", AT(active), kRequests),
          tensor("state", AT(state), kRequests), tensor("tokens_left", AT(tokens_left), kRequests),
          tensor("max_steps", AT(max_steps), kRequests), tensor("seed", AT(seed), kRequests),
          tensor("canvas_index", AT(canvas_index), kRequests), tensor("step", AT(step), kRequests),
          optional("uniforms", AT(uniforms), kPositions), tensor("argmax", AT(argmax), kPositions),
          tensor("entropy", AT(entropy), kPositions),
          tensor("chosen_class", AT(chosen_class), kPositions),
          tensor("remainder", AT(remainder), kPositions),
          tensor("matches", AT(matches), kRequests)});
  static constexpr Operator kOperator = {
      .name = "constrain_",
      .operation = operation<Struct>(Field{}, AT(workspace), AT(workspace_bytes)),
      .arguments = kArguments,
      .cpu = entry<&dgemma_cpu_constrain, &dgemma_cpu_constrain_workspace>(),
      .cuda = ON_CUDA(&dgemma_cuda_constrain, &dgemma_cuda_constrain_workspace)};
};

struct SampleClass {
  using Struct = dgemma_sample_class;
  static constexpr std::initializer_list<Extent> kPositions = {AT(logits.batch), AT(logits.length)};
  static constexpr auto kArguments =
      join(within(AT(logits), LogitsParams::kAll), automata<Struct>(AT(logits.batch)),
           std::array{optional("pinned", AT(pinned), kPositions),
                      tensor("chosen_class", AT(chosen_class), kPositions),
                      tensor("remainder", AT(remainder), kPositions),
                      tensor("matches", AT(matches), {AT(logits.batch)}),
                      tensor("tokens", AT(tokens), kPositions)});
  static constexpr Operator kOperator = {
      .name = "sample_class_",
      .operation = operation<Struct>(AT(logits.dtype), AT(workspace), AT(workspace_bytes)),
      .arguments = kArguments,
      .cpu = entry<&dgemma_cpu_sample_class, &dgemma_cpu_sample_class_workspace>(),
      .cuda = ON_CUDA(&dgemma_cuda_sample_class, &dgemma_cuda_sample_class_workspace)};
};

}  // namespace
}  // namespace dgemma

DGEMMA_OPERATORS(dgemma::ClassStatistics, dgemma::Constrain, dgemma::SampleClass)
