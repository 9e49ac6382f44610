// The operator of the family quantize. On a GPU it is made of torch's operators
// (ops/plain/quantize.py).
#include "dgemma/quantize.h"

#include "torch/registration.h"

namespace dgemma {
namespace {

struct QuantizeWeight {
  using Struct = dgemma_quantize_weight;
  static constexpr std::array kArguments = {
      tensor("weight", AT(weight), {AT(rows), positive(AT(columns))}),
      optional("importance", AT(importance), {AT(columns)}),
      number("format", AT(format)),
      number("multiplier", AT(multiplier), {.finite = true}),
      bytes("values", AT(values), {AT(rows), AT(row_bytes)}),
      tensor("scales", AT(scales), {AT(rows), positive(AT(groups))}),
      tensor("errors", AT(errors), {AT(rows), 3})};
  static constexpr Operator kOperator = {.name = "quantize_weight",
                                         .operation = operation<Struct>(AT(dtype)),
                                         .arguments = kArguments,
                                         .cpu = entry<&dgemma_cpu_quantize_weight>()};
};

}  // namespace
}  // namespace dgemma

DGEMMA_OPERATORS(dgemma::QuantizeWeight)
