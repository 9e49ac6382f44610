// The operators of the family grouped_gemm: schemas, and tensors to pointers.
#include "dgemma/grouped_gemm.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>
#include <type_traits>

#include "grouped_gemm/cpu/plan.h"
#include "torch/backend.h"

namespace dgemma {
namespace {

struct Cpu : OnCpu {
  using OnCpu::OnCpu;
  static constexpr auto kDense = &dgemma_cpu_dense;
  static constexpr auto kDenseWorkspace = &dgemma_cpu_dense_workspace;
  static constexpr auto kMoeFfn = &dgemma_cpu_moe_ffn;
  static constexpr auto kMoeFfnWorkspace = &dgemma_cpu_moe_ffn_workspace;
};

#if defined(DGEMMA_WITH_CUDA)
struct Cuda : OnCuda {
  using OnCuda::OnCuda;
  static constexpr auto kDense = &dgemma_cuda_dense;
  static constexpr auto kDenseWorkspace = &dgemma_cuda_dense_workspace;
  static constexpr auto kMoeFfn = &dgemma_cuda_moe_ffn;
  static constexpr auto kMoeFfnWorkspace = &dgemma_cuda_moe_ffn_workspace;
};
#endif

// All but output and workspace, which are left to the caller.
dgemma_moe_ffn describe_moe_ffn(const Arguments& arguments, const Tensor& input,
                                const Tensor& expert_ids, const Tensor& expert_weights,
                                const Tensor& gate_up, const Tensor& down) {
  dgemma_moe_ffn op = {};
  op.dtype = arguments.dtype(input, "input");
  op.tokens = arguments.size(input, "input", 2, 0);
  op.hidden_size = input.size(1);
  op.top_k = arguments.size(expert_ids, "expert_ids", 2, 1);
  op.experts = arguments.size(down, "down", 3, 0);
  op.expert_size = down.size(2);
  op.input = arguments.in(input, "input", {op.tokens, op.hidden_size}, op.dtype);
  op.expert_ids = arguments.in<int32_t>(expert_ids, "expert_ids", {op.tokens, op.top_k});
  op.expert_weights = arguments.in<float>(expert_weights, "expert_weights", {op.tokens, op.top_k});
  op.gate_up =
      arguments.in(gate_up, "gate_up", {op.experts, 2 * op.expert_size, op.hidden_size}, op.dtype);
  op.down = arguments.in(down, "down", {op.experts, op.hidden_size, op.expert_size}, op.dtype);
  return op;
}

template <typename Backend>
void run_into(const Arguments& arguments, dgemma_moe_ffn op, const Tensor& out,
              const Tensor& workspace) {
  op.output = arguments.out(out, "out", {op.tokens, op.hidden_size}, op.dtype);
  op.workspace = arguments.workspace(workspace, &op.workspace_bytes);
  Backend("moe_ffn", out).run(Backend::kMoeFfn, op);
}

template <typename Backend>
Tensor moe_ffn(const Tensor& input, const Tensor& expert_ids, const Tensor& expert_weights,
               const Tensor& gate_up, const Tensor& down) {
  const Arguments arguments("moe_ffn", Backend::kDevice);
  const dgemma_moe_ffn op =
      describe_moe_ffn(arguments, input, expert_ids, expert_weights, gate_up, down);
  const Tensor out = torch::stable::new_empty(input, input.sizes());
  const auto bytes = static_cast<int64_t>(Backend::kMoeFfnWorkspace(&op));
  run_into<Backend>(arguments, op, out, torch::stable::new_empty(input, {bytes}, ScalarType::Byte));
  return out;
}

template <typename Backend>
void moe_ffn_out(const Tensor& input, const Tensor& expert_ids, const Tensor& expert_weights,
                 const Tensor& gate_up, const Tensor& down, const Tensor& out,
                 const Tensor& workspace) {
  const Arguments arguments("moe_ffn", Backend::kDevice);
  run_into<Backend>(arguments,
                    describe_moe_ffn(arguments, input, expert_ids, expert_weights, gate_up, down),
                    out, workspace);
}

// A matrix of which a workspace's size is asked: no group changes it.
dgemma_quantized any_matrix(dgemma_weight_format format) {
  dgemma_quantized matrix = {};
  matrix.format = format;
  matrix.group = format == DGEMMA_WEIGHTS_INT4 ? 32 : format == DGEMMA_WEIGHTS_NVFP4 ? 16 : 0;
  matrix.scale_dtype = DGEMMA_BFLOAT16;
  return matrix;
}

// `format`: a dgemma_weight_format, or 0 for plain weights; `fp8_activations`: of moe_ffn_fp8,
// which the CPU does not have.
int64_t moe_ffn_workspace(int64_t tokens, int64_t hidden_size, int64_t expert_size, int64_t experts,
                          int64_t top_k, bool bfloat16, bool cuda, int64_t format,
                          bool fp8_activations) {
  dgemma_moe_ffn_quantized op = {};
  op.gate_up = op.down = any_matrix(static_cast<dgemma_weight_format>(format));
  op.ffn.tokens = tokens;
  op.ffn.hidden_size = hidden_size;
  op.ffn.expert_size = expert_size;
  op.ffn.experts = experts;
  op.ffn.top_k = top_k;
  op.ffn.dtype = bfloat16 ? DGEMMA_BFLOAT16 : DGEMMA_FLOAT32;
#if defined(DGEMMA_WITH_CUDA)
  if (served_by_cuda(cuda))
    return static_cast<int64_t>(format == 0       ? dgemma_cuda_moe_ffn_workspace(&op.ffn)
                                : fp8_activations ? dgemma_cuda_moe_ffn_fp8_workspace(&op)
                                                  : dgemma_cuda_moe_ffn_quantized_workspace(&op));
#endif
  if (cuda) return 0;
  return static_cast<int64_t>(format == 0 ? dgemma_cpu_moe_ffn_workspace(&op.ffn)
                                          : dgemma_cpu_moe_ffn_quantized_workspace(&op));
}

std::string moe_ffn_plan(const std::vector<std::vector<int32_t>>& expert_ids, int64_t experts) {
  const size_t top_k = expert_ids.empty() ? 1 : expert_ids[0].size();
  std::vector<int32_t> ids;
  for (const auto& row : expert_ids) {
    if (row.size() != top_k)
      throw std::invalid_argument("expert_ids: got rows of different lengths, wants equal ones");
    ids.insert(ids.end(), row.begin(), row.end());
  }
  const auto pairs = static_cast<int64_t>(ids.size());
  const int64_t bad = find_bad_expert_id(ids.data(), pairs, experts);
  if (bad >= 0)
    throw std::invalid_argument("expert_ids: got " + std::to_string(ids[bad]) + ", wants -1 to " +
                                std::to_string(experts - 1));
  std::vector<int32_t> storage(static_cast<size_t>(moe_plan_size(pairs, experts)));
  std::ostringstream text;
  print(make_moe_plan(ids.data(), pairs, experts, storage.data()), static_cast<int64_t>(top_k),
        text);
  return text.str();
}

template <typename Backend>
void dense_into(const Arguments& arguments, const Tensor& input, const Tensor& weight,
                const Tensor& out) {
  dgemma_dense op = {};
  op.dtype = arguments.dtype(input, "input");
  op.rows = arguments.size(input, "input", 2, 0);
  op.in_features = input.size(1);
  op.out_features = arguments.size(weight, "weight", 2, 0);
  op.input = arguments.in(input, "input", {op.rows, op.in_features}, op.dtype);
  op.weight = arguments.in(weight, "weight", {op.out_features, op.in_features}, op.dtype);
  op.output = arguments.out(out, "out", {op.rows, op.out_features}, op.dtype);
  const auto bytes = static_cast<int64_t>(Backend::kDenseWorkspace(&op));
  const Tensor workspace = torch::stable::new_empty(input, {bytes}, ScalarType::Byte);
  op.workspace = bytes > 0 ? arguments.workspace(workspace, &op.workspace_bytes) : nullptr;
  Backend("dense", input).run(Backend::kDense, op);
}

template <typename Backend>
Tensor dense(const Tensor& input, const Tensor& weight) {
  const Arguments arguments("dense", Backend::kDevice);
  const int64_t rows = arguments.size(input, "input", 2, 0);
  Tensor out = torch::stable::new_empty(input, {rows, arguments.size(weight, "weight", 2, 0)});
  dense_into<Backend>(arguments, input, weight, out);
  return out;
}

#if defined(DGEMMA_WITH_CUDA)
// On the CPU the router is made of torch's operators (ops/router.py).
std::tuple<Tensor, Tensor> route(const Tensor& input, const Tensor& scale, const Tensor& projection,
                                 const Tensor& per_expert_scale, int64_t top_k, double epsilon) {
  const Arguments arguments("route", OnCuda::kDevice);
  dgemma_route op = {};
  op.dtype = arguments.dtype(input, "input");
  op.tokens = arguments.size(input, "input", 2, 0);
  op.hidden_size = input.size(1);
  op.experts = arguments.size(projection, "projection", 2, 0);
  op.top_k = top_k;
  op.epsilon = static_cast<float>(epsilon);
  op.input = arguments.in(input, "input", {op.tokens, op.hidden_size}, op.dtype);
  op.scale = arguments.in(scale, "scale", {op.hidden_size}, op.dtype);
  op.projection = arguments.in(projection, "projection", {op.experts, op.hidden_size}, op.dtype);
  op.per_expert_scale = arguments.in(per_expert_scale, "per_expert_scale", {op.experts}, op.dtype);
  Tensor ids = torch::stable::new_empty(input, {op.tokens, top_k}, ScalarType::Int);
  Tensor weights = torch::stable::new_empty(input, {op.tokens, top_k}, ScalarType::Float);
  op.expert_ids = arguments.out<int32_t>(ids, "ids", {op.tokens, top_k});
  op.expert_weights = arguments.out<float>(weights, "weights", {op.tokens, top_k});
  const Tensor workspace = torch::stable::new_empty(
      input, {static_cast<int64_t>(dgemma_cuda_route_workspace(&op))}, ScalarType::Byte);
  op.workspace = arguments.workspace(workspace, &op.workspace_bytes);
  OnCuda("route", input).run(&dgemma_cuda_route, op);
  return {ids, weights};
}
#endif

template <typename Backend, typename Library>
void implement(Library& library) {
  library.impl("dense", TORCH_BOX(&dense<Backend>));
#if defined(DGEMMA_WITH_CUDA)
  if constexpr (std::is_base_of_v<OnCuda, Backend>) library.impl("route", TORCH_BOX(&route));
#endif
  library.impl("moe_ffn", TORCH_BOX(&moe_ffn<Backend>));
  library.impl("moe_ffn.out", TORCH_BOX(&moe_ffn_out<Backend>));
}

}  // namespace

void bind_grouped_gemm(pybind11::module_& module) {
  module.def("moe_ffn_workspace", &moe_ffn_workspace, pybind11::arg("tokens"),
             pybind11::arg("hidden_size"), pybind11::arg("expert_size"), pybind11::arg("experts"),
             pybind11::arg("top_k"), pybind11::arg("bfloat16"), pybind11::arg("cuda") = false,
             pybind11::arg("format") = 0, pybind11::arg("fp8_activations") = false,
             "Bytes of workspace of moe_ffn on the CPU or on a GPU; 0 for sizes that it does not "
             "take.");
  module.def("moe_ffn_plan", &moe_ffn_plan, pybind11::arg("expert_ids"), pybind11::arg("experts"),
             "The plan of one pass of moe_ffn: a line for each expert that is hit, with its "
             "token/slot pairs.");
}

}  // namespace dgemma

STABLE_TORCH_LIBRARY_FRAGMENT(dgemma, library) {
  library.def("dense(Tensor input, Tensor weight) -> Tensor");
  library.def(
      "route(Tensor input, Tensor scale, Tensor projection, Tensor per_expert_scale, int top_k, "
      "float epsilon) -> (Tensor ids, Tensor weights)");
  library.def(
      "moe_ffn(Tensor input, Tensor expert_ids, Tensor expert_weights, Tensor gate_up, Tensor "
      "down) -> Tensor");
  library.def(
      "moe_ffn.out(Tensor input, Tensor expert_ids, Tensor expert_weights, Tensor gate_up, Tensor "
      "down, *, Tensor(a!) out, Tensor(b!) workspace) -> ()");
}

DGEMMA_REGISTER(dgemma::implement, dgemma::Cpu, dgemma::Cuda)
