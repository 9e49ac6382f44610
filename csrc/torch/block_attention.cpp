// The operators of the family block_attention: schemas, and tensors to pointers.
#include "dgemma/block_attention.h"

#include <pybind11/pybind11.h>

#include "torch/backend.h"

namespace dgemma {
namespace {

using OptionalTensor = std::optional<Tensor>;

struct Cpu : OnCpu {
  using OnCpu::OnCpu;
  static constexpr auto kCanvas = &dgemma_cpu_canvas_attention;
  static constexpr auto kCausal = &dgemma_cpu_causal_attention;
  static constexpr auto kAppend = &dgemma_cpu_append_to_cache;
  static constexpr auto kWorkspace = &dgemma_cpu_block_attention_workspace;
};

#if defined(DGEMMA_WITH_CUDA)
struct Cuda : OnCuda {
  using OnCuda::OnCuda;
  static constexpr auto kCanvas = &dgemma_cuda_canvas_attention;
  static constexpr auto kCausal = &dgemma_cuda_causal_attention;
  static constexpr auto kAppend = &dgemma_cuda_append_to_cache;
  static constexpr auto kWorkspace = &dgemma_cuda_block_attention_workspace;
};
#endif

// Tensors and numbers of canvas_attention and causal_attention as the C interface takes them;
// output and workspace are left to the caller.
dgemma_block_attention describe_attention(const Arguments& arguments, const Tensor& query,
                                          const Tensor& key, const Tensor& value,
                                          const Tensor& prefix_key, const Tensor& prefix_value,
                                          const Tensor& slot, const Tensor& prefix_length,
                                          const OptionalTensor& length, const OptionalTensor& spans,
                                          int64_t window, double scale) {
  dgemma_block_attention op = {};
  op.dtype = arguments.dtype(query, "query");
  op.batch = arguments.size(query, "query", 4, 0);
  op.block_length = query.size(1);
  op.query_heads = query.size(2);
  op.head_dim = query.size(3);
  op.key_heads = arguments.size(key, "key", 4, 2);
  op.slots = arguments.size(prefix_key, "prefix_key", 4, 0);
  op.capacity = prefix_key.size(1);
  op.window = window;
  op.scale = static_cast<float>(scale);
  const Shape block = {op.batch, op.block_length, op.key_heads, op.head_dim};
  const Shape prefix = {op.slots, op.capacity, op.key_heads, op.head_dim};
  const Shape queries = {op.batch, op.block_length, op.query_heads, op.head_dim};
  op.query = arguments.in(query, "query", queries, op.dtype);
  op.key = arguments.in(key, "key", block, op.dtype);
  op.value = arguments.in(value, "value", block, op.dtype);
  op.prefix_key = arguments.in(prefix_key, "prefix_key", prefix, op.dtype);
  op.prefix_value = arguments.in(prefix_value, "prefix_value", prefix, op.dtype);
  op.slot = arguments.in<int32_t>(slot, "slot", {op.batch});
  op.prefix_length = arguments.in<int32_t>(prefix_length, "prefix_length", {op.batch});
  op.length = arguments.in<int32_t>(length, "length", {op.batch});
  if (spans.has_value()) {
    op.spans_per_request = arguments.size(*spans, "spans", 3, 1);
    op.spans = arguments.in<int32_t>(*spans, "spans", {op.batch, op.spans_per_request, 2});
  }
  return op;
}

template <typename Backend, typename Entry>
void run_into(const Arguments& arguments, const char* name, Entry entry, dgemma_block_attention op,
              const Tensor& out, const Tensor& workspace) {
  op.output =
      arguments.out(out, "out", {op.batch, op.block_length, op.query_heads, op.head_dim}, op.dtype);
  op.workspace = arguments.workspace(workspace, &op.workspace_bytes);
  Backend(name, out).run(entry, op);
}

// The result is zero where no query is: in padding rows and in skipped requests.
template <typename Backend, typename Entry>
Tensor run(const Arguments& arguments, const char* name, Entry entry,
           const dgemma_block_attention& op, const Tensor& query) {
  const auto bytes = static_cast<int64_t>(Backend::kWorkspace(&op));
  Tensor out = torch::stable::new_zeros(query, query.sizes());
  const Tensor workspace = torch::stable::new_empty(query, {bytes}, ScalarType::Byte);
  run_into<Backend>(arguments, name, entry, op, out, workspace);
  return out;
}

template <typename Backend>
Tensor canvas_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                        const Tensor& prefix_key, const Tensor& prefix_value, const Tensor& slot,
                        const Tensor& prefix_length, const OptionalTensor& length, int64_t window,
                        double scale) {
  const Arguments arguments("canvas_attention", Backend::kDevice);
  const auto op = describe_attention(arguments, query, key, value, prefix_key, prefix_value, slot,
                                     prefix_length, length, std::nullopt, window, scale);
  return run<Backend>(arguments, "canvas_attention", Backend::kCanvas, op, query);
}

template <typename Backend>
void canvas_attention_out(const Tensor& query, const Tensor& key, const Tensor& value,
                          const Tensor& prefix_key, const Tensor& prefix_value, const Tensor& slot,
                          const Tensor& prefix_length, const OptionalTensor& length, int64_t window,
                          double scale, const Tensor& out, const Tensor& workspace) {
  const Arguments arguments("canvas_attention.out", Backend::kDevice);
  const auto op = describe_attention(arguments, query, key, value, prefix_key, prefix_value, slot,
                                     prefix_length, length, std::nullopt, window, scale);
  run_into<Backend>(arguments, "canvas_attention.out", Backend::kCanvas, op, out, workspace);
}

template <typename Backend>
Tensor causal_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                        const Tensor& prefix_key, const Tensor& prefix_value, const Tensor& slot,
                        const Tensor& prefix_length, const OptionalTensor& length,
                        const OptionalTensor& spans, int64_t window, double scale) {
  const Arguments arguments("causal_attention", Backend::kDevice);
  const auto op = describe_attention(arguments, query, key, value, prefix_key, prefix_value, slot,
                                     prefix_length, length, spans, window, scale);
  return run<Backend>(arguments, "causal_attention", Backend::kCausal, op, query);
}

template <typename Backend>
void causal_attention_out(const Tensor& query, const Tensor& key, const Tensor& value,
                          const Tensor& prefix_key, const Tensor& prefix_value, const Tensor& slot,
                          const Tensor& prefix_length, const OptionalTensor& length,
                          const OptionalTensor& spans, int64_t window, double scale,
                          const Tensor& out, const Tensor& workspace) {
  const Arguments arguments("causal_attention.out", Backend::kDevice);
  const auto op = describe_attention(arguments, query, key, value, prefix_key, prefix_value, slot,
                                     prefix_length, length, spans, window, scale);
  run_into<Backend>(arguments, "causal_attention.out", Backend::kCausal, op, out, workspace);
}

template <typename Backend>
void append_to_cache(const Tensor& key, const Tensor& value, const Tensor& prefix_key,
                     const Tensor& prefix_value, const Tensor& slot, const Tensor& prefix_length,
                     const OptionalTensor& length) {
  const Arguments arguments("append_to_cache", Backend::kDevice);
  dgemma_append_to_cache op = {};
  op.dtype = arguments.dtype(key, "key");
  op.batch = arguments.size(key, "key", 4, 0);
  op.block_length = key.size(1);
  op.key_heads = key.size(2);
  op.head_dim = key.size(3);
  op.slots = arguments.size(prefix_key, "prefix_key", 4, 0);
  op.capacity = prefix_key.size(1);
  const Shape block = {op.batch, op.block_length, op.key_heads, op.head_dim};
  const Shape prefix = {op.slots, op.capacity, op.key_heads, op.head_dim};
  op.key = arguments.in(key, "key", block, op.dtype);
  op.value = arguments.in(value, "value", block, op.dtype);
  op.prefix_key = arguments.out(prefix_key, "prefix_key", prefix, op.dtype);
  op.prefix_value = arguments.out(prefix_value, "prefix_value", prefix, op.dtype);
  op.slot = arguments.in<int32_t>(slot, "slot", {op.batch});
  op.prefix_length = arguments.in<int32_t>(prefix_length, "prefix_length", {op.batch});
  op.length = arguments.in<int32_t>(length, "length", {op.batch});
  Backend("append_to_cache", key).run(Backend::kAppend, op);
}

template <typename Backend, typename Library>
void implement(Library& library) {
  library.impl("canvas_attention", TORCH_BOX(&canvas_attention<Backend>));
  library.impl("canvas_attention.out", TORCH_BOX(&canvas_attention_out<Backend>));
  library.impl("causal_attention", TORCH_BOX(&causal_attention<Backend>));
  library.impl("causal_attention.out", TORCH_BOX(&causal_attention_out<Backend>));
  library.impl("append_to_cache", TORCH_BOX(&append_to_cache<Backend>));
}

}  // namespace

void bind_block_attention(pybind11::module_& module) {
  module.def(
      "block_attention_workspace",
      [](int64_t batch, int64_t block_length, int64_t query_heads, int64_t key_heads,
         int64_t head_dim, bool cuda) -> size_t {
        dgemma_block_attention op = {};
        op.batch = batch;
        op.block_length = block_length;
        op.query_heads = query_heads;
        op.key_heads = key_heads;
        op.head_dim = head_dim;
        op.dtype = DGEMMA_BFLOAT16;
        const int32_t any_length = 0;
        op.length = &any_length;  // requests of any length: what needs most
#if defined(DGEMMA_WITH_CUDA)
        if (served_by_cuda(cuda)) return dgemma_cuda_block_attention_workspace(&op);
#endif
        return cuda ? 0 : dgemma_cpu_block_attention_workspace(&op);
      },
      "Bytes of workspace that attention of these sizes needs on the CPU or on a GPU.");
}

}  // namespace dgemma

STABLE_TORCH_LIBRARY_FRAGMENT(dgemma, library) {
  library.def(
      "canvas_attention(Tensor query, Tensor key, Tensor value, Tensor prefix_key, Tensor "
      "prefix_value, Tensor slot, Tensor prefix_length, Tensor? length, int window, float scale) "
      "-> Tensor");
  library.def(
      "canvas_attention.out(Tensor query, Tensor key, Tensor value, Tensor prefix_key, Tensor "
      "prefix_value, Tensor slot, Tensor prefix_length, Tensor? length, int window, float scale, "
      "*, Tensor(a!) out, Tensor(b!) workspace) -> ()");
  library.def(
      "causal_attention(Tensor query, Tensor key, Tensor value, Tensor prefix_key, Tensor "
      "prefix_value, Tensor slot, Tensor prefix_length, Tensor? length, Tensor? spans, int window, "
      "float scale) -> Tensor");
  library.def(
      "causal_attention.out(Tensor query, Tensor key, Tensor value, Tensor prefix_key, Tensor "
      "prefix_value, Tensor slot, Tensor prefix_length, Tensor? length, Tensor? spans, int window, "
      "float scale, *, Tensor(a!) out, Tensor(b!) workspace) -> ()");
  library.def(
      "append_to_cache(Tensor key, Tensor value, Tensor(a!) prefix_key, Tensor(b!) prefix_value, "
      "Tensor slot, Tensor prefix_length, Tensor? length) -> ()");
}

DGEMMA_REGISTER(dgemma::implement, dgemma::Cpu, dgemma::Cuda)
