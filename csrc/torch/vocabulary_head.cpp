// The operator vocabulary_head. On the CPU it is made of torch's product and vocabulary_statistics
// (ops/plain/vocabulary_head.py).
#include "dgemma/vocabulary_head.h"

#include "torch/logits.h"
#include "torch/registration.h"

namespace dgemma {
namespace {

// The logits are what it writes: `raw` of its own struct, not that of the statistics.
struct VocabularyHead {
  using Struct = dgemma_vocabulary_head;
  static constexpr auto kArguments = join(
      std::array{
          tensor("hidden", AT(hidden),
                 {AT(statistics.logits.batch), AT(statistics.logits.length), AT(hidden_size)}),
          tensor("embedding", AT(embedding), {AT(statistics.logits.vocabulary), AT(hidden_size)})},
      within(AT(statistics.logits), LogitsParams::kParams),
      std::array{tensor("logits", AT(raw),
                        {AT(statistics.logits.batch), AT(statistics.logits.length),
                         AT(statistics.logits.vocabulary)})},
      within(AT(statistics), VocabularyStatistics::kResults));
  static constexpr Operator kOperator = {
      .name = "vocabulary_head",
      .operation = operation<Struct>(AT(statistics.logits.dtype), AT(statistics.workspace),
                                     AT(statistics.workspace_bytes)),
      .arguments = kArguments,
      .cuda = ON_CUDA(&dgemma_cuda_vocabulary_head, &dgemma_cuda_vocabulary_head_workspace)};
};

}  // namespace
}  // namespace dgemma

DGEMMA_OPERATORS(dgemma::VocabularyHead)
