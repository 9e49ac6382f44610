// Logits as the denoise step's operators take them: tensors to the C interface's struct.
#pragma once

#include "dgemma/denoise.h"
#include "torch/tensors.h"

namespace dgemma {
namespace {

using OptionalTensor = std::optional<Tensor>;

inline int64_t tiles_of(int64_t vocabulary) {
  return (vocabulary + DGEMMA_VOCABULARY_TILE - 1) / DGEMMA_VOCABULARY_TILE;
}

inline dgemma_allowed describe_allowed(const Arguments& arguments, const OptionalTensor& mask,
                                       const OptionalTensor& rows, const Shape& positions,
                                       int64_t vocabulary) {
  dgemma_allowed allowed = {};
  if (mask.has_value() != rows.has_value())
    arguments.fail(mask.has_value() ? "allowed_row" : "allowed", "none", "both or neither");
  if (!mask.has_value()) return allowed;
  allowed.mask = arguments.in<int32_t>(mask, "allowed", {kAny, (vocabulary + 31) / 32});
  allowed.rows = mask->size(0);
  allowed.row_index = arguments.in<int32_t>(rows, "allowed_row", positions);
  return allowed;
}

// What the three ops that read logits begin with.
struct Logits {
  const Tensor& raw;
  double softcap;
  const Tensor& temperature;
  const OptionalTensor& active;
  const OptionalTensor& allowed;
  const OptionalTensor& allowed_row;

  dgemma_logits describe(const Arguments& arguments) const {
    dgemma_logits op = {};
    op.dtype = arguments.dtype(raw, "logits");
    op.batch = arguments.size(raw, "logits", 3, 0);
    op.length = raw.size(1);
    op.vocabulary = raw.size(2);
    op.raw = arguments.in(raw, "logits", {op.batch, op.length, op.vocabulary}, op.dtype);
    op.softcap = static_cast<float>(softcap);
    op.temperature = arguments.in<float>(temperature, "temperature", {op.batch});
    op.active = arguments.in<uint8_t>(active, "active", {op.batch});
    op.allowed =
        describe_allowed(arguments, allowed, allowed_row, {op.batch, op.length}, op.vocabulary);
    return op;
  }
};

}  // namespace
}  // namespace dgemma
