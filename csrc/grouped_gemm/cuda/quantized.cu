// The C entry points over quantized weights for CUDA: argument checks, the passes over tokens, the
// launches of each. Where a matrix is INT8, a kernel in front of its product rounds the tokens.
#include "common/ceil_divide.h"
#include "cuda/entry.h"
#include "dgemma/grouped_gemm.h"
#include "grouped_gemm/cuda/quantize_rows.h"
#include "grouped_gemm/cuda/quantized.h"
#include "grouped_gemm/operands.h"

namespace dgemma {
namespace {

constexpr size_t kMessageBytes = sizeof(dgemma_cuda::message);

ByteRows rows_at(void* workspace, const RowsPlan& plan) {
  if (plan.blocks == 0) return {};
  uint8_t* begin = static_cast<uint8_t*>(workspace);
  return {begin + plan.codes, reinterpret_cast<float*>(begin + plan.scales)};
}

// Rows that stay bfloat16 are left as they are. `filled` is that of QuantizeRows.
const char* round_rows(const device::bfloat16* rows, const ByteRows& to, Encoding encoding,
                       int32_t count, int32_t width, const int32_t* filled, void* stream) {
  if (to.codes == nullptr) return nullptr;
  const auto launch =
      encoding == Encoding::kInt8 ? launch_quantize_rows_int8 : launch_quantize_rows;
  return launch({.input = rows,
                 .output = to.codes,
                 .scales = to.scales,
                 .rows = count,
                 .width = width,
                 .filled = filled},
                stream);
}

MoeProduct find_gate_up(const dgemma_quantized& matrix, [[maybe_unused]] CudaPath path) {
  const Encoding encoding = encoding_of(matrix);
  if (encoding == Encoding::kInt8) return {encoding, launch_gate_up_sm80_int8};
#if defined(DGEMMA_WITH_SM90)
  if (path == CudaPath::kSm90) return {encoding, launch_gate_up_sm90_quantized};
#endif
  return {encoding, launch_gate_up_sm80_quantized};
}

MoeProduct find_down(const dgemma_quantized& matrix, [[maybe_unused]] CudaPath path) {
  const Encoding encoding = encoding_of(matrix);
  if (encoding == Encoding::kInt8) return {encoding, launch_down_sm80_int8};
#if defined(DGEMMA_WITH_SM90)
  if (path == CudaPath::kSm90) return {encoding, launch_down_sm90_quantized};
#endif
  return {encoding, launch_down_sm80_quantized};
}

// Returns null or the error's text.
const char* run_pass(const MoeCudaPlan& plan, const MoeQuantizedPass& pass,
                     const MoeProduct& gate_up, const MoeProduct& down, void* stream) {
  const MoeCudaPass& ffn = pass.ffn;
  if (const char* error = launch_sort_pairs(plan, ffn, stream)) return error;
  if (const char* error = round_rows(ffn.input, pass.input, gate_up.encoding, ffn.tokens,
                                     ffn.hidden_size, nullptr, stream))
    return error;
  if (const char* error = gate_up.launch(plan, pass, stream)) return error;
  if (const char* error =
          round_rows(ffn.activations, pass.activations, down.encoding, ffn.tokens * ffn.top_k,
                     ffn.expert_size, ffn.tables.first + ffn.tables.experts, stream))
    return error;
  if (const char* error = down.launch(plan, pass, stream)) return error;
  return launch_combine(plan, ffn, stream);
}

// The same of a dense projection.
const char* run_dense(const DensePlan& plan, const DenseQuantizedCall& call, void* stream) {
  const bool is_int8 = call.encoding == Encoding::kInt8;
  if (const char* error =
          round_rows(call.dense.input, call.input, call.encoding, call.dense.scheduler.rows,
                     call.dense.in_features, nullptr, stream))
    return error;
  const auto product = is_int8 ? launch_dense_sm80_int8 : launch_dense_sm80_quantized;
  if (const char* error = product(plan, call, stream)) return error;
  if (!plan.apart) return nullptr;
  return is_int8 ? launch_sum_int8_segments(plan, call, stream)
                 : launch_sum_segments(plan, call.dense, stream);
}

}  // namespace

QuantizedMatrix make_quantized_matrix(const dgemma_quantized& matrix, int64_t columns) {
  const WeightFormat format = describe(matrix.format);
  const bool has_scales = format.scale_bytes > 0;
  const int64_t group = has_scales ? matrix.group : 1;
  int32_t group_bits = 0;
  while ((1 << group_bits) < group) ++group_bits;
  const int64_t scale_bytes = ceil_divide(columns, group) * format.scale_bytes;
  return {.values = static_cast<const uint8_t*>(matrix.values),
          .scales = static_cast<const uint8_t*>(matrix.scales),
          .row_scales = matrix.factors,
          .rows_per_scale = static_cast<int32_t>(matrix.rows_per_factor),
          .columns = static_cast<int32_t>(columns),
          .value_bytes = static_cast<int32_t>(row_bytes(matrix.format, columns)),
          .scale_bytes = static_cast<int32_t>(scale_bytes),
          .group_bits = group_bits};
}

dgemma_status run_moe(const dgemma_moe_ffn_quantized& op, const MoeCudaPlan& plan,
                      const MoeProduct& gate_up, const MoeProduct& down, dgemma_cuda* cuda) {
  const dgemma_moe_ffn& ffn = op.ffn;
  for (int64_t token = 0; token < ffn.tokens; token += plan.tokens_per_pass) {
    const MoeQuantizedPass pass = {.ffn = make_moe_cuda_pass(ffn, plan, token),
                                   .gate_up = make_quantized_matrix(op.gate_up, ffn.hidden_size),
                                   .down = make_quantized_matrix(op.down, ffn.expert_size),
                                   .gate_up_encoding = gate_up.encoding,
                                   .down_encoding = down.encoding,
                                   .input = rows_at(ffn.workspace, plan.input_rows),
                                   .activations = rows_at(ffn.workspace, plan.activation_rows)};
    if (const char* error = run_pass(plan, pass, gate_up, down, cuda->stream))
      return launched(error, cuda);
  }
  return DGEMMA_OK;
}

}  // namespace dgemma

size_t dgemma_cuda_moe_ffn_quantized_workspace(const dgemma_moe_ffn_quantized* op) {
  using namespace dgemma;
  char text[kMessageBytes];
  if (moe_quantized_error(*op, text, sizeof text) != nullptr) return 0;
  return make_moe_quantized_plan(*op, {CudaPath::kSm80, 80, 1}).workspace_bytes;
}

dgemma_status dgemma_cuda_moe_ffn_quantized(const dgemma_moe_ffn_quantized* op, dgemma_cuda* cuda) {
  using namespace dgemma;
  const dgemma_moe_ffn& ffn = op->ffn;
  char text[kMessageBytes];
  if (const char* error = moe_quantized_error(*op, text, sizeof text))
    return fail(cuda, DGEMMA_UNSUPPORTED, "%s", error);
  if (ffn.tokens == 0) return DGEMMA_OK;
  const OperandList operands = operands_of(*op);
  dgemma_status status = check_operands(operands, cuda);
  if (status != DGEMMA_OK) return status;

  Gpu gpu = {};
  status = find_gpu(&gpu, cuda);
  if (status != DGEMMA_OK) return status;
  const MoeCudaPlan plan = make_moe_quantized_plan(*op, gpu);
  status =
      check_workspace(operands, ffn.workspace, ffn.workspace_bytes, plan.workspace_bytes, cuda);
  if (status != DGEMMA_OK) return status;
  return run_moe(*op, plan, find_gate_up(op->gate_up, plan.path), find_down(op->down, plan.path),
                 cuda);
}

size_t dgemma_cuda_dense_quantized_workspace(const dgemma_dense_quantized* op) {
  using namespace dgemma;
  char text[kMessageBytes];
  if (dense_quantized_error(*op, text, sizeof text) != nullptr) return 0;
  return make_dense_quantized_plan(*op, {CudaPath::kSm80, 80, 1}).workspace_bytes;
}

dgemma_status dgemma_cuda_dense_quantized(const dgemma_dense_quantized* op, dgemma_cuda* cuda) {
  using namespace dgemma;
  const dgemma_dense& dense = op->dense;
  char text[kMessageBytes];
  if (const char* error = dense_quantized_error(*op, text, sizeof text))
    return fail(cuda, DGEMMA_UNSUPPORTED, "%s", error);
  if (dense.rows == 0) return DGEMMA_OK;
  const OperandList operands = operands_of(*op);
  dgemma_status status = check_operands(operands, cuda);
  if (status != DGEMMA_OK) return status;

  Gpu gpu = {};
  status = find_gpu(&gpu, cuda);
  if (status != DGEMMA_OK) return status;
  const DensePlan plan = make_dense_quantized_plan(*op, gpu);
  status =
      check_workspace(operands, dense.workspace, dense.workspace_bytes, plan.workspace_bytes, cuda);
  if (status != DGEMMA_OK) return status;
  const DenseQuantizedCall call = {.dense = make_dense_call(dense, plan),
                                   .weight = make_quantized_matrix(op->weight, dense.in_features),
                                   .encoding = encoding_of(op->weight),
                                   .input = rows_at(dense.workspace, plan.input_rows),
                                   .partial = static_cast<int32_t*>(dense.workspace)};
  return launched(run_dense(plan, call, cuda->stream), cuda);
}
