// The operators of the family layer. On the CPU gelu_product is made of torch's operators, for the
// bits of its tanh (ops/plain/layer.py).
#include "dgemma/layer.h"

#include "torch/registration.h"

namespace dgemma {
namespace {

struct RmsNorm {
  using Struct = dgemma_rms_norm;
  static constexpr std::initializer_list<Extent> kRows = {AT(tokens), AT(hidden_size)};
  static constexpr std::array kArguments = {tensor("input", AT(input), kRows),
                                            optional("weight", AT(weight), {AT(hidden_size)}),
                                            number("epsilon", AT(epsilon))};
  static constexpr std::array kOutputs = {tensor("output", AT(output), kRows)};
  static constexpr Operator kOperator = {.name = "rms_norm",
                                         .operation = operation<Struct>(AT(dtype)),
                                         .arguments = kArguments,
                                         .outputs = kOutputs,
                                         .form = Form::kNew,
                                         .cpu = entry<&dgemma_cpu_rms_norm>(),
                                         .cuda = ON_CUDA(&dgemma_cuda_rms_norm)};
};

struct NormaliseHeads {
  using Struct = dgemma_normalise_heads;
  static constexpr std::initializer_list<Extent> kQueries = {AT(tokens), AT(query_heads),
                                                             AT(head_dim)};
  static constexpr std::initializer_list<Extent> kKeys = {AT(tokens), AT(key_heads), AT(head_dim)};
  static constexpr std::array kArguments = {
      tensor("query", AT(raw_query), kQueries),
      tensor("key", AT(raw_key), kKeys),
      optional("value", AT(raw_value), kKeys),
      tensor("query_norm", AT(query_norm), {AT(head_dim)}),
      tensor("key_norm", AT(key_norm), {AT(head_dim)}),
      tensor("cosine", AT(cosine), {AT(tokens), AT(head_dim)}),
      tensor("sine", AT(sine), {AT(tokens), AT(head_dim)}),
      number("epsilon", AT(epsilon))};
  static constexpr std::array kOutputs = {tensor("query", AT(query), kQueries),
                                          tensor("key", AT(key), kKeys),
                                          tensor("value", AT(value), kKeys)};
  static constexpr Operator kOperator = {.name = "normalise_heads",
                                         .operation = operation<Struct>(AT(dtype)),
                                         .arguments = kArguments,
                                         .outputs = kOutputs,
                                         .form = Form::kNew,
                                         .cpu = entry<&dgemma_cpu_normalise_heads>(),
                                         .cuda = ON_CUDA(&dgemma_cuda_normalise_heads)};
};

struct AttentionResidual {
  using Struct = dgemma_attention_residual;
  static constexpr std::initializer_list<Extent> kRows = {AT(tokens), AT(hidden_size)};
  static constexpr std::array kArguments = {
      tensor("hidden", AT(hidden), kRows),
      tensor("attended", AT(attended), kRows),
      tensor("attended_norm", AT(attended_norm), {AT(hidden_size)}),
      tensor("dense_norm", AT(dense_norm), {AT(hidden_size)}),
      tensor("sparse_norm", AT(sparse_norm), {AT(hidden_size)}),
      number("epsilon", AT(epsilon))};
  static constexpr std::array kOutputs = {tensor("residual", AT(residual), kRows),
                                          tensor("dense_input", AT(dense_input), kRows),
                                          tensor("sparse_input", AT(sparse_input), kRows)};
  static constexpr Operator kOperator = {.name = "attention_residual",
                                         .operation = operation<Struct>(AT(dtype)),
                                         .arguments = kArguments,
                                         .outputs = kOutputs,
                                         .form = Form::kNew,
                                         .cpu = entry<&dgemma_cpu_attention_residual>(),
                                         .cuda = ON_CUDA(&dgemma_cuda_attention_residual)};
};

struct GeluProduct {
  using Struct = dgemma_gelu_product;
  static constexpr std::array kArguments = {of_any_shape("gate", AT(gate), AT(values)),
                                            of_any_shape("up", AT(up), AT(values))};
  static constexpr std::array kOutputs = {of_any_shape("out", AT(output), AT(values))};
  static constexpr Operator kOperator = {.name = "gelu_product",
                                         .operation = operation<Struct>(AT(dtype)),
                                         .arguments = kArguments,
                                         .outputs = kOutputs,
                                         .form = Form::kNew,
                                         .cuda = ON_CUDA(&dgemma_cuda_gelu_product)};
};

struct LayerOutput {
  using Struct = dgemma_layer_output;
  static constexpr std::initializer_list<Extent> kRows = {AT(tokens), AT(hidden_size)};
  static constexpr std::array kArguments = {
      tensor("residual", AT(residual), kRows),
      tensor("dense", AT(dense), kRows),
      tensor("sparse", AT(sparse), kRows),
      tensor("dense_norm", AT(dense_norm), {AT(hidden_size)}),
      tensor("sparse_norm", AT(sparse_norm), {AT(hidden_size)}),
      tensor("norm", AT(norm), {AT(hidden_size)}),
      tensor("next_norm", AT(next_norm), {AT(hidden_size)}),
      number("scalar", AT(scalar)),
      number("epsilon", AT(epsilon))};
  static constexpr std::array kOutputs = {tensor("output", AT(output), kRows),
                                          tensor("next_input", AT(next_input), kRows)};
  static constexpr Operator kOperator = {.name = "layer_output",
                                         .operation = operation<Struct>(AT(dtype)),
                                         .arguments = kArguments,
                                         .outputs = kOutputs,
                                         .form = Form::kNew,
                                         .cpu = entry<&dgemma_cpu_layer_output>(),
                                         .cuda = ON_CUDA(&dgemma_cuda_layer_output)};
};

}  // namespace
}  // namespace dgemma

DGEMMA_OPERATORS(dgemma::RmsNorm, dgemma::NormaliseHeads, dgemma::AttentionResidual,
                 dgemma::GeluProduct, dgemma::LayerOutput)
