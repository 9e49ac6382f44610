// The operators of the family layer: schemas, tensor checks, tensors to pointers. On the CPU they
// are made of torch's operators (ops/layer.py).
#include "dgemma/layer.h"

#include <tuple>

#include "torch/backend.h"

STABLE_TORCH_LIBRARY_FRAGMENT(dgemma, library) {
  library.def(
      "normalise_heads(Tensor query, Tensor key, Tensor? value, Tensor query_norm, Tensor "
      "key_norm, Tensor cosine, Tensor sine, float epsilon) -> (Tensor, Tensor, Tensor)");
  library.def(
      "attention_residual(Tensor hidden, Tensor attended, Tensor attended_norm, Tensor dense_norm, "
      "Tensor sparse_norm, float epsilon) -> (Tensor, Tensor, Tensor)");
  library.def("gelu_product(Tensor gate, Tensor up) -> Tensor");
  library.def(
      "layer_output(Tensor residual, Tensor dense, Tensor sparse, Tensor dense_norm, Tensor "
      "sparse_norm, Tensor norm, Tensor next_norm, float scalar, float epsilon) -> (Tensor, "
      "Tensor)");
}

#if defined(DGEMMA_WITH_CUDA)
namespace dgemma {
namespace {

using Three = std::tuple<Tensor, Tensor, Tensor>;

Three normalise_heads(const Tensor& query, const Tensor& key, const std::optional<Tensor>& value,
                      const Tensor& query_norm, const Tensor& key_norm, const Tensor& cosine,
                      const Tensor& sine, double epsilon) {
  const Arguments arguments("normalise_heads", OnCuda::kDevice);
  dgemma_normalise_heads op = {};
  op.dtype = arguments.dtype(query, "query");
  op.tokens = arguments.size(query, "query", 3, 0);
  op.query_heads = query.size(1);
  op.head_dim = query.size(2);
  op.key_heads = arguments.size(key, "key", 3, 1);
  op.epsilon = static_cast<float>(epsilon);
  const Shape queries = {op.tokens, op.query_heads, op.head_dim};
  const Shape keys = {op.tokens, op.key_heads, op.head_dim}, table = {op.tokens, op.head_dim};
  op.raw_query = arguments.in(query, "query", queries, op.dtype);
  op.raw_key = arguments.in(key, "key", keys, op.dtype);
  op.raw_value = value.has_value() ? arguments.in(*value, "value", keys, op.dtype) : nullptr;
  op.query_norm = arguments.in(query_norm, "query_norm", {op.head_dim}, op.dtype);
  op.key_norm = arguments.in(key_norm, "key_norm", {op.head_dim}, op.dtype);
  op.cosine = arguments.in(cosine, "cosine", table, op.dtype);
  op.sine = arguments.in(sine, "sine", table, op.dtype);
  const Three out = {torch::stable::new_empty(query, queries),
                     torch::stable::new_empty(query, keys), torch::stable::new_empty(query, keys)};
  op.query = arguments.out(std::get<0>(out), "query", queries, op.dtype);
  op.key = arguments.out(std::get<1>(out), "key", keys, op.dtype);
  op.value = arguments.out(std::get<2>(out), "value", keys, op.dtype);
  OnCuda("normalise_heads", query).run(&dgemma_cuda_normalise_heads, op);
  return out;
}

Three attention_residual(const Tensor& hidden, const Tensor& attended, const Tensor& attended_norm,
                         const Tensor& dense_norm, const Tensor& sparse_norm, double epsilon) {
  const Arguments arguments("attention_residual", OnCuda::kDevice);
  dgemma_attention_residual op = {};
  op.dtype = arguments.dtype(hidden, "hidden");
  op.tokens = arguments.size(hidden, "hidden", 2, 0);
  op.hidden_size = hidden.size(1);
  op.epsilon = static_cast<float>(epsilon);
  const Shape rows = {op.tokens, op.hidden_size}, weight = {op.hidden_size};
  op.hidden = arguments.in(hidden, "hidden", rows, op.dtype);
  op.attended = arguments.in(attended, "attended", rows, op.dtype);
  op.attended_norm = arguments.in(attended_norm, "attended_norm", weight, op.dtype);
  op.dense_norm = arguments.in(dense_norm, "dense_norm", weight, op.dtype);
  op.sparse_norm = arguments.in(sparse_norm, "sparse_norm", weight, op.dtype);
  const Three out = {torch::stable::new_empty(hidden, rows), torch::stable::new_empty(hidden, rows),
                     torch::stable::new_empty(hidden, rows)};
  op.residual = arguments.out(std::get<0>(out), "residual", rows, op.dtype);
  op.dense_input = arguments.out(std::get<1>(out), "dense_input", rows, op.dtype);
  op.sparse_input = arguments.out(std::get<2>(out), "sparse_input", rows, op.dtype);
  OnCuda("attention_residual", hidden).run(&dgemma_cuda_attention_residual, op);
  return out;
}

Tensor gelu_product(const Tensor& gate, const Tensor& up) {
  const Arguments arguments("gelu_product", OnCuda::kDevice);
  dgemma_gelu_product op = {};
  op.dtype = arguments.dtype(gate, "gate");
  op.values = gate.numel();
  const auto sizes = gate.sizes();
  const Shape shape(sizes.begin(), sizes.end());
  op.gate = arguments.in(gate, "gate", shape, op.dtype);
  op.up = arguments.in(up, "up", shape, op.dtype);
  const Tensor out = torch::stable::new_empty(gate, shape);
  op.output = arguments.out(out, "output", shape, op.dtype);
  OnCuda("gelu_product", gate).run(&dgemma_cuda_gelu_product, op);
  return out;
}

std::tuple<Tensor, Tensor> layer_output(const Tensor& residual, const Tensor& dense,
                                        const Tensor& sparse, const Tensor& dense_norm,
                                        const Tensor& sparse_norm, const Tensor& norm,
                                        const Tensor& next_norm, double scalar, double epsilon) {
  const Arguments arguments("layer_output", OnCuda::kDevice);
  dgemma_layer_output op = {};
  op.dtype = arguments.dtype(residual, "residual");
  op.tokens = arguments.size(residual, "residual", 2, 0);
  op.hidden_size = residual.size(1);
  op.epsilon = static_cast<float>(epsilon);
  op.scalar = static_cast<float>(scalar);
  const Shape rows = {op.tokens, op.hidden_size}, weight = {op.hidden_size};
  op.residual = arguments.in(residual, "residual", rows, op.dtype);
  op.dense = arguments.in(dense, "dense", rows, op.dtype);
  op.sparse = arguments.in(sparse, "sparse", rows, op.dtype);
  op.dense_norm = arguments.in(dense_norm, "dense_norm", weight, op.dtype);
  op.sparse_norm = arguments.in(sparse_norm, "sparse_norm", weight, op.dtype);
  op.norm = arguments.in(norm, "norm", weight, op.dtype);
  op.next_norm = arguments.in(next_norm, "next_norm", weight, op.dtype);
  const std::tuple<Tensor, Tensor> out = {torch::stable::new_empty(residual, rows),
                                          torch::stable::new_empty(residual, rows)};
  op.output = arguments.out(std::get<0>(out), "output", rows, op.dtype);
  op.next_input = arguments.out(std::get<1>(out), "next_input", rows, op.dtype);
  OnCuda("layer_output", residual).run(&dgemma_cuda_layer_output, op);
  return out;
}

template <typename Library>
void implement(Library& library) {
  library.impl("normalise_heads", TORCH_BOX(&normalise_heads));
  library.impl("attention_residual", TORCH_BOX(&attention_residual));
  library.impl("gelu_product", TORCH_BOX(&gelu_product));
  library.impl("layer_output", TORCH_BOX(&layer_output));
}

}  // namespace
}  // namespace dgemma

#if defined(DGEMMA_SIM)
STABLE_TORCH_LIBRARY_IMPL(dgemma, CPU, library) { dgemma::implement(library); }
#else
STABLE_TORCH_LIBRARY_IMPL(dgemma, CUDA, library) { dgemma::implement(library); }
#endif
#endif
