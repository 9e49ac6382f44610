// The operators of the family grouped_gemm over weights of 4 and 8 bits.
#include "dgemma/grouped_gemm.h"
#include "grouped_gemm/cpu/quantized.h"
#include "torch/backend.h"

namespace dgemma {
namespace {

struct QuantizedOnCpu : OnCpu {
  using OnCpu::OnCpu;
  static constexpr auto kDense = &dgemma_cpu_dense_quantized;
  static constexpr auto kDenseWorkspace = &dgemma_cpu_dense_quantized_workspace;
  static constexpr auto kMoeFfn = &dgemma_cpu_moe_ffn_quantized;
  static constexpr auto kMoeFfnWorkspace = &dgemma_cpu_moe_ffn_quantized_workspace;
};

#if defined(DGEMMA_WITH_CUDA)
struct QuantizedOnCuda : OnCuda {
  using OnCuda::OnCuda;
  static constexpr auto kDense = &dgemma_cuda_dense_quantized;
  static constexpr auto kDenseWorkspace = &dgemma_cuda_dense_quantized_workspace;
  static constexpr auto kMoeFfn = &dgemma_cuda_moe_ffn_quantized;
  static constexpr auto kMoeFfnWorkspace = &dgemma_cuda_moe_ffn_quantized_workspace;
  // On the CPU that one is written in torch (ops/quantized_gemm_plain.py).
  static constexpr auto kMoeFfnFp8 = &dgemma_cuda_moe_ffn_fp8;
  static constexpr auto kMoeFfnFp8Workspace = &dgemma_cuda_moe_ffn_fp8_workspace;
};
#endif

int64_t product(const Shape& shape) {
  int64_t count = 1;
  for (const int64_t extent : shape) count *= extent;
  return count;
}

// A matrix [.., rows, columns] whose parts have the leading extents `leading`, rows among them.
dgemma_quantized describe_matrix(const Arguments& arguments, const char* name, int64_t format,
                                 const Tensor& values, const std::optional<Tensor>& scales,
                                 const std::optional<Tensor>& factors, const Shape& leading,
                                 int64_t columns) {
  dgemma_quantized matrix = {};
  matrix.format = static_cast<dgemma_weight_format>(format);
  Shape shape = leading;
  shape.push_back(stored_row_bytes(matrix, columns));
  matrix.values = arguments.in_bytes(values, name, shape);
  if (scales.has_value()) {
    const int64_t groups = scales->dim() > 0 ? scales->size(scales->dim() - 1) : 0;
    if (groups < 1 || columns % groups != 0)
      arguments.fail(name, std::to_string(groups) + " scales in a row",
                     "a divisor of its " + std::to_string(columns) + " columns");
    matrix.group = static_cast<int32_t>(columns / groups);
    shape.back() = groups;
    const ScalarType type = scales->scalar_type();
    if (matrix.format == DGEMMA_WEIGHTS_INT4 && type == ScalarType::Half) {
      matrix.scale_dtype = DGEMMA_FLOAT16;
      matrix.scales = arguments.in_type(*scales, name, shape, ScalarType::Half);
    } else if (matrix.format == DGEMMA_WEIGHTS_INT4) {
      matrix.scale_dtype = DGEMMA_BFLOAT16;
      matrix.scales = arguments.in_type(*scales, name, shape, ScalarType::BFloat16);
    } else {
      matrix.scales = arguments.in_bytes(*scales, name, shape);
    }
  }
  if (factors.has_value()) {
    const int64_t count = factors->numel(), rows = product(leading);
    if (count < 1 || rows % count != 0)
      arguments.fail(name, std::to_string(count) + " factors",
                     "a divisor of its " + std::to_string(rows) + " rows");
    const auto sizes = factors->sizes();
    matrix.factors = arguments.in<float>(*factors, name, Shape(sizes.begin(), sizes.end()));
    matrix.rows_per_factor = rows / count;
  }
  return matrix;
}

// The arguments that no format changes; `gate_up` is looked at for its extents.
dgemma_moe_ffn describe_ffn(const Arguments& arguments, const Tensor& input,
                            const Tensor& expert_ids, const Tensor& expert_weights,
                            const Tensor& gate_up) {
  dgemma_moe_ffn ffn = {};
  ffn.dtype = arguments.dtype(input, "input");
  ffn.tokens = arguments.size(input, "input", 2, 0);
  ffn.hidden_size = input.size(1);
  ffn.top_k = arguments.size(expert_ids, "expert_ids", 2, 1);
  ffn.experts = arguments.size(gate_up, "gate_up", 3, 0);
  ffn.expert_size = gate_up.size(1) / 2;
  ffn.input = arguments.in(input, "input", {ffn.tokens, ffn.hidden_size}, ffn.dtype);
  ffn.expert_ids = arguments.in<int32_t>(expert_ids, "expert_ids", {ffn.tokens, ffn.top_k});
  ffn.expert_weights =
      arguments.in<float>(expert_weights, "expert_weights", {ffn.tokens, ffn.top_k});
  return ffn;
}

// The call into a new tensor, in a workspace of its own.
template <typename Backend, typename Entry, typename Workspace>
Tensor run_ffn(const Arguments& arguments, const char* name, const Tensor& input,
               dgemma_moe_ffn_quantized& op, Entry entry, Workspace workspace_bytes) {
  dgemma_moe_ffn& ffn = op.ffn;
  Tensor out = torch::stable::new_empty(input, input.sizes());
  ffn.output = arguments.out(out, "out", {ffn.tokens, ffn.hidden_size}, ffn.dtype);
  const Tensor workspace = torch::stable::new_empty(
      input, {static_cast<int64_t>(workspace_bytes(&op))}, ScalarType::Byte);
  ffn.workspace = arguments.workspace(workspace, &ffn.workspace_bytes);
  Backend(name, input).run(entry, op);
  return out;
}

template <typename Backend>
Tensor moe_ffn_quantized(const Tensor& input, const Tensor& expert_ids,
                         const Tensor& expert_weights, int64_t gate_up_format,
                         const Tensor& gate_up, const std::optional<Tensor>& gate_up_scales,
                         const std::optional<Tensor>& gate_up_factors, int64_t down_format,
                         const Tensor& down, const std::optional<Tensor>& down_scales,
                         const std::optional<Tensor>& down_factors) {
  const Arguments arguments("moe_ffn_quantized", Backend::kDevice);
  dgemma_moe_ffn_quantized op = {};
  op.ffn = describe_ffn(arguments, input, expert_ids, expert_weights, gate_up);
  const dgemma_moe_ffn& ffn = op.ffn;
  op.gate_up =
      describe_matrix(arguments, "gate_up", gate_up_format, gate_up, gate_up_scales,
                      gate_up_factors, {ffn.experts, 2 * ffn.expert_size}, ffn.hidden_size);
  op.down = describe_matrix(arguments, "down", down_format, down, down_scales, down_factors,
                            {ffn.experts, ffn.hidden_size}, ffn.expert_size);
  return run_ffn<Backend>(arguments, "moe_ffn_quantized", input, op, Backend::kMoeFfn,
                          Backend::kMoeFfnWorkspace);
}

template <typename Backend>
Tensor moe_ffn_fp8(const Tensor& input, const Tensor& expert_ids, const Tensor& expert_weights,
                   const Tensor& gate_up, const std::optional<Tensor>& gate_up_factors,
                   const Tensor& down, const std::optional<Tensor>& down_factors) {
  const Arguments arguments("moe_ffn_fp8", Backend::kDevice);
  dgemma_moe_ffn_quantized op = {};
  op.ffn = describe_ffn(arguments, input, expert_ids, expert_weights, gate_up);
  const dgemma_moe_ffn& ffn = op.ffn;
  const auto describe = [&](const char* name, const Tensor& values,
                            const std::optional<Tensor>& factors, int64_t rows, int64_t columns) {
    return describe_matrix(arguments, name, DGEMMA_WEIGHTS_FP8, values, std::nullopt, factors,
                           {ffn.experts, rows}, columns);
  };
  op.gate_up = describe("gate_up", gate_up, gate_up_factors, 2 * ffn.expert_size, ffn.hidden_size);
  op.down = describe("down", down, down_factors, ffn.hidden_size, ffn.expert_size);
  return run_ffn<Backend>(arguments, "moe_ffn_fp8", input, op, Backend::kMoeFfnFp8,
                          Backend::kMoeFfnFp8Workspace);
}

template <typename Backend>
Tensor dense_quantized(const Tensor& input, int64_t format, const Tensor& weight,
                       const std::optional<Tensor>& scales, const std::optional<Tensor>& factors) {
  const Arguments arguments("dense_quantized", Backend::kDevice);
  dgemma_dense_quantized op = {};
  dgemma_dense& dense = op.dense;
  dense.dtype = arguments.dtype(input, "input");
  dense.rows = arguments.size(input, "input", 2, 0);
  dense.in_features = input.size(1);
  dense.out_features = arguments.size(weight, "weight", 2, 0);
  dense.input = arguments.in(input, "input", {dense.rows, dense.in_features}, dense.dtype);
  op.weight = describe_matrix(arguments, "weight", format, weight, scales, factors,
                              {dense.out_features}, dense.in_features);
  Tensor out = torch::stable::new_empty(input, {dense.rows, dense.out_features});
  dense.output = arguments.out(out, "out", {dense.rows, dense.out_features}, dense.dtype);
  const auto bytes = static_cast<int64_t>(Backend::kDenseWorkspace(&op));
  const Tensor workspace = torch::stable::new_empty(input, {bytes}, ScalarType::Byte);
  dense.workspace = bytes > 0 ? arguments.workspace(workspace, &dense.workspace_bytes) : nullptr;
  Backend("dense_quantized", input).run(Backend::kDense, op);
  return out;
}

template <typename Backend, typename Library>
void implement_quantized(Library& library) {
  library.impl("dense_quantized", TORCH_BOX(&dense_quantized<Backend>));
  library.impl("moe_ffn_quantized", TORCH_BOX(&moe_ffn_quantized<Backend>));
  if constexpr (requires { Backend::kMoeFfnFp8; })
    library.impl("moe_ffn_fp8", TORCH_BOX(&moe_ffn_fp8<Backend>));
}

}  // namespace
}  // namespace dgemma

// A format is a number of dgemma_weight_format.
STABLE_TORCH_LIBRARY_FRAGMENT(dgemma, library) {
  library.def(
      "dense_quantized(Tensor input, int format, Tensor weight, Tensor? scales, Tensor? factors) "
      "-> Tensor");
  library.def(
      "moe_ffn_quantized(Tensor input, Tensor expert_ids, Tensor expert_weights, int "
      "gate_up_format, Tensor gate_up, Tensor? gate_up_scales, Tensor? gate_up_factors, int "
      "down_format, Tensor down, Tensor? down_scales, Tensor? down_factors) -> Tensor");
  library.def(
      "moe_ffn_fp8(Tensor input, Tensor expert_ids, Tensor expert_weights, Tensor gate_up, "
      "Tensor? gate_up_factors, Tensor down, Tensor? down_factors) -> Tensor");
}

DGEMMA_REGISTER(dgemma::implement_quantized, dgemma::QuantizedOnCpu, dgemma::QuantizedOnCuda)
