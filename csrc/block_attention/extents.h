// The extents of a call of attention that decide how its work is cut up.
#pragma once

#include <cstdint>

#include "dgemma/block_attention.h"

namespace dgemma {

struct AttentionExtents {
  int64_t requests;
  int64_t rows;  // that a request has at most
  int64_t query_heads;
  int64_t key_heads;
  int64_t head_dim;
  bool own_lengths;  // a request may have fewer rows
};

inline AttentionExtents extents_of(const dgemma_block_attention& op) {
  return {op.batch,     op.block_length, op.query_heads,
          op.key_heads, op.head_dim,     op.length != nullptr};
}

inline AttentionExtents extents_of(const dgemma_paged_attention& op) {
  return {op.requests, op.max_query_length, op.query_heads, op.key_heads, op.head_dim, true};
}

}  // namespace dgemma
