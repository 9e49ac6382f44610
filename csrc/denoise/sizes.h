// The check of sizes that the entry points of both devices begin with.
#pragma once

#include <cinttypes>
#include <cstdint>

#include "dgemma/denoise.h"

namespace dgemma {

// batch and length not negative, vocabulary in [1, 2^31), their products in 64 bits. `Context` is
// dgemma_cpu or dgemma_cuda, for which fail() writes the message.
template <typename Context>
dgemma_status check_sizes(int64_t batch, int64_t length, int64_t vocabulary, Context* context) {
  if (batch < 0)
    return fail(context, DGEMMA_INVALID_ARGUMENT, "batch: got %" PRId64 ", wants at least 0",
                batch);
  if (length < 0)
    return fail(context, DGEMMA_INVALID_ARGUMENT, "length: got %" PRId64 ", wants at least 0",
                length);
  if (vocabulary < 1 || vocabulary > INT32_MAX)
    return fail(context, DGEMMA_INVALID_ARGUMENT, "vocabulary: got %" PRId64 ", wants 1 to %d",
                vocabulary, INT32_MAX);
  int64_t entries;
  if (__builtin_mul_overflow(batch, length, &entries) ||
      __builtin_mul_overflow(entries, vocabulary * 8, &entries))
    return fail(context, DGEMMA_INVALID_ARGUMENT,
                "batch x length x vocabulary: got %" PRId64 " x %" PRId64 " x %" PRId64
                ", wants fewer than 2^60",
                batch, length, vocabulary);
  return DGEMMA_OK;
}

// Of merged shards: 1 to DGEMMA_MOST_SHARDS of them, rank one of them, and rows in 64 bits.
template <typename Context>
dgemma_status check_shards(const dgemma_merge_vocabulary_shards& op, Context* context) {
  if (op.shards < 1 || op.shards > DGEMMA_MOST_SHARDS)
    return fail(context, DGEMMA_INVALID_ARGUMENT, "shards: got %" PRId64 ", wants 1 to %d",
                op.shards, DGEMMA_MOST_SHARDS);
  if (op.rank < 0 || op.rank >= op.shards)
    return fail(context, DGEMMA_INVALID_ARGUMENT, "rank: got %" PRId64 ", wants 0 to %" PRId64,
                op.rank, op.shards - 1);
  return check_sizes(op.batch, op.length, op.shards, context);
}

}  // namespace dgemma
