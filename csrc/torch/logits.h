// What several operators of the denoising step take: logits and how they are read, and the softmax
// statistics of them.
#pragma once

#include "dgemma/denoise.h"
#include "torch/operator.h"

namespace dgemma {

constexpr int64_t kMaskBits = 32;  // ids in a word of `allowed`
constexpr Range kVocabularies = {.least = 1, .most = std::numeric_limits<int32_t>::max()};

// Which ids each position may hold: a mask, and the mask's row for every position.
constexpr std::array<Argument, 2> allowed_ids(Field mask, Field rows, Field row_index, Field batch,
                                              Field length, Field vocabulary) {
  return {optional("allowed", mask, {rows, ceil_divide(vocabulary, kMaskBits)}),
          with_previous("allowed_row", row_index, {batch, length})};
}

struct LogitsParams {
  using Struct = dgemma_logits;
  static constexpr std::array kRaw = {
      tensor("logits", AT(raw), {AT(batch), AT(length), positive(AT(vocabulary))})};
  static constexpr auto kParams =
      join(std::array{number("softcap", AT(softcap)),
                      tensor("temperature", AT(temperature), {AT(batch)}),
                      optional("active", AT(active), {AT(batch)})},
           allowed_ids(AT(allowed.mask), AT(allowed.rows), AT(allowed.row_index), AT(batch),
                       AT(length), AT(vocabulary)));
  static constexpr auto kAll = join(kRaw, kParams);
};

// Of every row and of every tile of its vocabulary: the greatest value and the sum of exponentials.
template <typename Operation>
constexpr std::array<Argument, 4> softmax_statistics(Field batch, Field length, Field vocabulary) {
  using Struct = Operation;
  const Extent tiles = ceil_divide(vocabulary, DGEMMA_VOCABULARY_TILE);
  return {tensor("row_max", AT(row_max), {batch, length}),
          tensor("row_sum", AT(row_sum), {batch, length}),
          tensor("tile_max", AT(tile_max), {batch, length, tiles}),
          tensor("tile_sum", AT(tile_sum), {batch, length, tiles})};
}

// All that vocabulary_statistics finds.
struct VocabularyStatistics {
  using Struct = dgemma_vocabulary_statistics;
  static constexpr auto kResults =
      join(std::array{tensor("argmax", AT(argmax), {AT(logits.batch), AT(logits.length)}),
                      tensor("entropy", AT(entropy), {AT(logits.batch), AT(logits.length)})},
           softmax_statistics<Struct>(AT(logits.batch), AT(logits.length), AT(logits.vocabulary)));
};

}  // namespace dgemma
