// The operators of the family grouped_gemm.
#include "dgemma/grouped_gemm.h"

#include "torch/registration.h"

namespace dgemma {
namespace {

struct Dense {
  using Struct = dgemma_dense;
  static constexpr std::array kInput = {tensor("input", AT(input), {AT(rows), AT(in_features)})};
  static constexpr std::array kWeight = {
      tensor("weight", AT(weight), {AT(out_features), AT(in_features)})};
  static constexpr auto kArguments = join(kInput, kWeight);
  static constexpr std::array kOutputs = {tensor("out", AT(output), {AT(rows), AT(out_features)})};
  static constexpr Operator kOperator = {
      .name = "dense",
      .operation = operation<Struct>(AT(dtype), AT(workspace), AT(workspace_bytes)),
      .arguments = kArguments,
      .outputs = kOutputs,
      .form = Form::kNew,
      .cpu = entry<&dgemma_cpu_dense, &dgemma_cpu_dense_workspace>(),
      .cuda = ON_CUDA(&dgemma_cuda_dense, &dgemma_cuda_dense_workspace)};
};

struct DenseQuantized {
  using Struct = dgemma_dense_quantized;
  static constexpr auto kArguments =
      join(within(AT(dense), Dense::kInput),
           matrix({"format", "weight", "scales", "row_scales"}, AT(weight),
                  {AT(dense.out_features), AT(dense.in_features)}));
  static constexpr auto kOutputs = within(AT(dense), Dense::kOutputs);
  static constexpr Operator kOperator = {
      .name = "dense_quantized",
      .operation =
          operation<Struct>(AT(dense.dtype), AT(dense.workspace), AT(dense.workspace_bytes)),
      .arguments = kArguments,
      .outputs = kOutputs,
      .form = Form::kNew,
      .cpu = entry<&dgemma_cpu_dense_quantized, &dgemma_cpu_dense_quantized_workspace>(),
      .cuda = ON_CUDA(&dgemma_cuda_dense_quantized, &dgemma_cuda_dense_quantized_workspace)};
};

struct MoeFfn {
  using Struct = dgemma_moe_ffn;
  static constexpr std::array kTokens = {
      tensor("input", AT(input), {AT(tokens), positive(AT(hidden_size))}),
      tensor("expert_ids", AT(expert_ids), {AT(tokens), positive(AT(top_k))}),
      tensor("expert_weights", AT(expert_weights), {AT(tokens), AT(top_k)})};
  static constexpr std::array kWeights = {
      tensor("gate_up", AT(gate_up), {AT(experts), twice(AT(expert_size)), AT(hidden_size)}),
      tensor("down", AT(down),
             {positive(AT(experts)), AT(hidden_size), positive(AT(expert_size))})};
  static constexpr auto kArguments = join(kTokens, kWeights);
  static constexpr std::array kOutputs = {tensor("out", AT(output), {AT(tokens), AT(hidden_size)})};
  static constexpr Operator kOperator = {
      .name = "moe_ffn",
      .operation = operation<Struct>(AT(dtype), AT(workspace), AT(workspace_bytes)),
      .arguments = kArguments,
      .outputs = kOutputs,
      .form = Form::kNewAndOut,
      .cpu = entry<&dgemma_cpu_moe_ffn, &dgemma_cpu_moe_ffn_workspace>(),
      .cuda = ON_CUDA(&dgemma_cuda_moe_ffn, &dgemma_cuda_moe_ffn_workspace)};
};

// Of both operators over quantized experts.
struct QuantizedExperts {
  using Struct = dgemma_moe_ffn_quantized;
  static constexpr std::initializer_list<Extent> kGateUp = {
      positive(AT(ffn.experts)), twice(AT(ffn.expert_size)), AT(ffn.hidden_size)};
  static constexpr std::initializer_list<Extent> kDown = {AT(ffn.experts), AT(ffn.hidden_size),
                                                          positive(AT(ffn.expert_size))};
  static constexpr auto kTokens = within(AT(ffn), MoeFfn::kTokens);
  static constexpr auto kOutputs = within(AT(ffn), MoeFfn::kOutputs);
  static constexpr Operation kOperation =
      operation<Struct>(AT(ffn.dtype), AT(ffn.workspace), AT(ffn.workspace_bytes));
};

struct MoeFfnQuantized : QuantizedExperts {
  using Struct = dgemma_moe_ffn_quantized;
  static constexpr auto kArguments =
      join(kTokens,
           matrix({"gate_up_format", "gate_up", "gate_up_scales", "gate_up_row_scales"},
                  AT(gate_up), kGateUp),
           matrix({"down_format", "down", "down_scales", "down_row_scales"}, AT(down), kDown));
  static constexpr Operator kOperator = {
      .name = "moe_ffn_quantized",
      .operation = kOperation,
      .arguments = kArguments,
      .outputs = kOutputs,
      .form = Form::kNew,
      .cpu = entry<&dgemma_cpu_moe_ffn_quantized, &dgemma_cpu_moe_ffn_quantized_workspace>(),
      .cuda = ON_CUDA(&dgemma_cuda_moe_ffn_quantized, &dgemma_cuda_moe_ffn_quantized_workspace)};
};

// On the CPU it is written in torch (ops/plain/quantized_gemm.py).
struct MoeFfnFp8 : QuantizedExperts {
  using Struct = dgemma_moe_ffn_quantized;
  static constexpr auto kArguments =
      join(kTokens, fp8_matrix({"gate_up", "gate_up_row_scales"}, AT(gate_up), kGateUp),
           fp8_matrix({"down", "down_row_scales"}, AT(down), kDown));
  static constexpr Operator kOperator = {
      .name = "moe_ffn_fp8",
      .operation = kOperation,
      .arguments = kArguments,
      .outputs = kOutputs,
      .form = Form::kNew,
      .cuda = ON_CUDA(&dgemma_cuda_moe_ffn_fp8, &dgemma_cuda_moe_ffn_fp8_workspace)};
};

// On the CPU the router is these two around torch's product and softmax (ops/plain/router.py),
// which decide ties; on a GPU they are made of torch's operators.
struct RouterInput {
  using Struct = dgemma_router_input;
  static constexpr std::array kArguments = {
      tensor("input", AT(input), {AT(tokens), AT(hidden_size)}),
      tensor("scale", AT(scale), {AT(hidden_size)}), number("epsilon", AT(epsilon))};
  static constexpr std::array kOutputs = {
      tensor("output", AT(output), {AT(tokens), AT(hidden_size)})};
  static constexpr Operator kOperator = {.name = "router_input",
                                         .operation = operation<Struct>(AT(dtype)),
                                         .arguments = kArguments,
                                         .outputs = kOutputs,
                                         .form = Form::kNew,
                                         .cpu = entry<&dgemma_cpu_router_input>()};
};

struct RouterChoice {
  using Struct = dgemma_router_choice;
  static constexpr std::array kArguments = {
      tensor("probabilities", AT(probabilities), {AT(tokens), AT(experts)}),
      tensor("per_expert_scale", AT(per_expert_scale), {AT(experts)}),
      number("top_k", AT(top_k), {.least = 1, .most_of = AT(experts)})};
  static constexpr std::array kOutputs = {
      tensor("expert_ids", AT(expert_ids), {AT(tokens), AT(top_k)}),
      tensor("expert_weights", AT(expert_weights), {AT(tokens), AT(top_k)})};
  static constexpr Operator kOperator = {.name = "router_choice",
                                         .operation = operation<Struct>(AT(dtype)),
                                         .arguments = kArguments,
                                         .outputs = kOutputs,
                                         .form = Form::kNew,
                                         .cpu = entry<&dgemma_cpu_router_choice>()};
};

struct Route {
  using Struct = dgemma_route;
  static constexpr std::array kArguments = {
      tensor("input", AT(input), {AT(tokens), AT(hidden_size)}),
      tensor("scale", AT(scale), {AT(hidden_size)}),
      tensor("projection", AT(projection), {AT(experts), AT(hidden_size)}),
      tensor("per_expert_scale", AT(per_expert_scale), {AT(experts)}),
      number("top_k", AT(top_k), {.least = 1, .most_of = AT(experts)}),
      number("epsilon", AT(epsilon))};
  static constexpr std::array kOutputs = {
      tensor("expert_ids", AT(expert_ids), {AT(tokens), AT(top_k)}),
      tensor("expert_weights", AT(expert_weights), {AT(tokens), AT(top_k)})};
  static constexpr Operator kOperator = {
      .name = "route",
      .operation = operation<Struct>(AT(dtype), AT(workspace), AT(workspace_bytes)),
      .arguments = kArguments,
      .outputs = kOutputs,
      .form = Form::kNew,
      .cuda = ON_CUDA(&dgemma_cuda_route, &dgemma_cuda_route_workspace)};
};

}  // namespace
}  // namespace dgemma

DGEMMA_OPERATORS(dgemma::Dense, dgemma::DenseQuantized, dgemma::MoeFfn, dgemma::MoeFfnQuantized,
                 dgemma::MoeFfnFp8, dgemma::RouterInput, dgemma::RouterChoice, dgemma::Route)
