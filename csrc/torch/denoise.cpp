// The denoise step's operators: schemas, tensor checks, tensors to pointers.
#include "dgemma/denoise.h"

#include <pybind11/pybind11.h>

#include <tuple>

#include "device/philox.h"
#include "torch/backend.h"
#include "torch/logits.h"

namespace dgemma {
namespace {

// The CPU's statistics need no workspace.
size_t no_workspace(const dgemma_vocabulary_statistics*) { return 0; }

struct Cpu : OnCpu {
  using OnCpu::OnCpu;
  static constexpr auto kStatisticsWorkspace = &no_workspace;
  static constexpr auto kStatistics = &dgemma_cpu_vocabulary_statistics;
  static constexpr auto kSample = &dgemma_cpu_sample;
  static constexpr auto kNoise = &dgemma_cpu_noise;
  static constexpr auto kUpdate = &dgemma_cpu_update_canvas;
  static constexpr auto kSoftEmbedding = &dgemma_cpu_soft_embedding;
  static constexpr auto kSoftEmbeddingWorkspace = &dgemma_cpu_soft_embedding_workspace;
};

#if defined(DGEMMA_WITH_CUDA)
struct Cuda : OnCuda {
  using OnCuda::OnCuda;
  static constexpr auto kStatisticsWorkspace = &dgemma_cuda_vocabulary_statistics_workspace;
  static constexpr auto kStatistics = &dgemma_cuda_vocabulary_statistics;
  static constexpr auto kSample = &dgemma_cuda_sample;
  static constexpr auto kNoise = &dgemma_cuda_noise;
  static constexpr auto kUpdate = &dgemma_cuda_update_canvas;
  static constexpr auto kSoftEmbedding = &dgemma_cuda_soft_embedding;
  static constexpr auto kSoftEmbeddingWorkspace = &dgemma_cuda_soft_embedding_workspace;
};
#endif

// What vocabulary_statistics leaves for the ops after it.
struct Masses {
  const Tensor& row_max;
  const Tensor& row_sum;
  const Tensor& tile_max;
  const Tensor& tile_sum;

  template <typename Op>
  void describe(const Arguments& arguments, Op* op) const {
    const Shape positions = {op->logits.batch, op->logits.length};
    const Shape tiles = {op->logits.batch, op->logits.length, tiles_of(op->logits.vocabulary)};
    op->row_max = arguments.in<float>(row_max, "row_max", positions);
    op->row_sum = arguments.in<double>(row_sum, "row_sum", positions);
    op->tile_max = arguments.in<float>(tile_max, "tile_max", tiles);
    op->tile_sum = arguments.in<float>(tile_sum, "tile_sum", tiles);
  }
};

template <typename Backend>
void vocabulary_statistics_into(const char* name, const Logits& logits, const Tensor& argmax,
                                const Tensor& entropy, const Tensor& row_max, const Tensor& row_sum,
                                const Tensor& tile_max, const Tensor& tile_sum) {
  const Arguments arguments(name, Backend::kDevice);
  dgemma_vocabulary_statistics op = {};
  op.logits = logits.describe(arguments);
  const Shape positions = {op.logits.batch, op.logits.length};
  const Shape tiles = {op.logits.batch, op.logits.length, tiles_of(op.logits.vocabulary)};
  op.argmax = arguments.out<int32_t>(argmax, "argmax", positions);
  op.entropy = arguments.out<float>(entropy, "entropy", positions);
  op.row_max = arguments.out<float>(row_max, "row_max", positions);
  op.row_sum = arguments.out<double>(row_sum, "row_sum", positions);
  op.tile_max = arguments.out<float>(tile_max, "tile_max", tiles);
  op.tile_sum = arguments.out<float>(tile_sum, "tile_sum", tiles);
  const Tensor workspace = torch::stable::new_empty(
      row_max, {static_cast<int64_t>(Backend::kStatisticsWorkspace(&op))}, ScalarType::Byte);
  op.workspace = arguments.workspace(workspace, &op.workspace_bytes);
  Backend(name, row_max).run(Backend::kStatistics, op);
}

template <typename Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> vocabulary_statistics(
    const Tensor& raw, double softcap, const Tensor& temperature, const OptionalTensor& active,
    const OptionalTensor& allowed, const OptionalTensor& allowed_row) {
  const Arguments arguments("vocabulary_statistics", Backend::kDevice);
  const Logits logits = {raw, softcap, temperature, active, allowed, allowed_row};
  const dgemma_logits op = logits.describe(arguments);
  const Shape positions = {op.batch, op.length};
  const Shape tiles = {op.batch, op.length, tiles_of(op.vocabulary)};
  // Zero where a request is not active.
  Tensor argmax = torch::stable::new_zeros(raw, positions, ScalarType::Int);
  Tensor entropy = torch::stable::new_zeros(raw, positions, ScalarType::Float);
  Tensor row_max = torch::stable::new_zeros(raw, positions, ScalarType::Float);
  Tensor row_sum = torch::stable::new_zeros(raw, positions, ScalarType::Double);
  Tensor tile_max = torch::stable::new_zeros(raw, tiles, ScalarType::Float);
  Tensor tile_sum = torch::stable::new_zeros(raw, tiles, ScalarType::Float);
  vocabulary_statistics_into<Backend>("vocabulary_statistics", logits, argmax, entropy, row_max,
                                      row_sum, tile_max, tile_sum);
  return {argmax, entropy, row_max, row_sum, tile_max, tile_sum};
}

template <typename Backend>
void vocabulary_statistics_out(const Tensor& raw, double softcap, const Tensor& temperature,
                               const OptionalTensor& active, const OptionalTensor& allowed,
                               const OptionalTensor& allowed_row, const Tensor& argmax,
                               const Tensor& entropy, const Tensor& row_max, const Tensor& row_sum,
                               const Tensor& tile_max, const Tensor& tile_sum) {
  vocabulary_statistics_into<Backend>("vocabulary_statistics.out",
                                      {raw, softcap, temperature, active, allowed, allowed_row},
                                      argmax, entropy, row_max, row_sum, tile_max, tile_sum);
}

// Who draws: the key and counter of a request's random numbers.
struct Draws {
  const Tensor& seed;
  const Tensor& canvas_index;

  template <typename Op>
  void describe(const Arguments& arguments, int64_t batch, Op* op) const {
    op->seed = arguments.in<int64_t>(seed, "seed", {batch});
    op->canvas_index = arguments.in<int32_t>(canvas_index, "canvas_index", {batch});
  }
};

template <typename Backend>
void sample_into(const char* name, const Logits& logits, const Masses& masses, const Draws& draws,
                 const Tensor& step, const OptionalTensor& uniforms, const Tensor& out) {
  const Arguments arguments(name, Backend::kDevice);
  dgemma_sample op = {};
  op.logits = logits.describe(arguments);
  const Shape positions = {op.logits.batch, op.logits.length};
  masses.describe(arguments, &op);
  draws.describe(arguments, op.logits.batch, &op);
  op.step = arguments.in<int32_t>(step, "step", {op.logits.batch});
  op.uniforms = arguments.in<double>(uniforms, "uniforms", positions);
  op.tokens = arguments.out<int32_t>(out, "out", positions);
  Backend(name, out).run(Backend::kSample, op);
}

template <typename Backend>
Tensor sample(const Tensor& raw, double softcap, const Tensor& temperature,
              const OptionalTensor& active, const OptionalTensor& allowed,
              const OptionalTensor& allowed_row, const Tensor& row_max, const Tensor& row_sum,
              const Tensor& tile_max, const Tensor& tile_sum, const Tensor& seed,
              const Tensor& canvas_index, const Tensor& step, const OptionalTensor& uniforms) {
  const Arguments arguments("sample", Backend::kDevice);
  const int64_t batch = arguments.size(raw, "logits", 3, 0);
  Tensor out = torch::stable::new_zeros(raw, {batch, raw.size(1)}, ScalarType::Int);
  sample_into<Backend>("sample", {raw, softcap, temperature, active, allowed, allowed_row},
                       {row_max, row_sum, tile_max, tile_sum}, {seed, canvas_index}, step, uniforms,
                       out);
  return out;
}

template <typename Backend>
void sample_out(const Tensor& raw, double softcap, const Tensor& temperature,
                const OptionalTensor& active, const OptionalTensor& allowed,
                const OptionalTensor& allowed_row, const Tensor& row_max, const Tensor& row_sum,
                const Tensor& tile_max, const Tensor& tile_sum, const Tensor& seed,
                const Tensor& canvas_index, const Tensor& step, const OptionalTensor& uniforms,
                const Tensor& out) {
  sample_into<Backend>("sample.out", {raw, softcap, temperature, active, allowed, allowed_row},
                       {row_max, row_sum, tile_max, tile_sum}, {seed, canvas_index}, step, uniforms,
                       out);
}

template <typename Backend>
void noise(const Tensor& tokens, int64_t vocabulary, int64_t purpose, const Tensor& seed,
           const Tensor& canvas_index, const Tensor& step, const OptionalTensor& active,
           const OptionalTensor& keep, const OptionalTensor& allowed,
           const OptionalTensor& allowed_row, const OptionalTensor& uniforms) {
  const Arguments arguments("noise_", Backend::kDevice);
  dgemma_noise op = {};
  op.batch = arguments.size(tokens, "tokens", 2, 0);
  op.length = tokens.size(1);
  op.vocabulary = vocabulary;
  const Shape positions = {op.batch, op.length};
  if (purpose < DGEMMA_PURPOSE_INITIAL_NOISE || purpose > DGEMMA_PURPOSE_RENOISE)
    arguments.fail("purpose", std::to_string(purpose), "0, 1 or 2");
  op.purpose = static_cast<dgemma_purpose>(purpose);
  Draws{seed, canvas_index}.describe(arguments, op.batch, &op);
  op.step = arguments.in<int32_t>(step, "step", {op.batch});
  op.active = arguments.in<uint8_t>(active, "active", {op.batch});
  op.keep = arguments.in<uint8_t>(keep, "keep", positions);
  op.uniforms = arguments.in<double>(uniforms, "uniforms", positions);
  op.allowed = describe_allowed(arguments, allowed, allowed_row, positions, vocabulary);
  op.tokens = arguments.out<int32_t>(tokens, "tokens", positions);
  Backend("noise_", tokens).run(Backend::kNoise, op);
}

template <typename Backend>
void update_canvas(const Tensor& sampled, const Tensor& argmax, const Tensor& entropy,
                   const OptionalTensor& pinned, const OptionalTensor& allowed,
                   const OptionalTensor& allowed_row, const OptionalTensor& uniforms,
                   int64_t vocabulary, const Tensor& seed, const Tensor& canvas_index,
                   const Tensor& max_steps, const Tensor& t_min, const Tensor& t_max,
                   const Tensor& entropy_bound, const Tensor& stability_threshold,
                   const Tensor& confidence_threshold, const Tensor& active, const Tensor& canvas,
                   const Tensor& draft, const Tensor& stable_steps, const Tensor& step,
                   const Tensor& temperature, const Tensor& accepted, const Tensor& mean_entropy,
                   const Tensor& status) {
  const Arguments arguments("update_canvas_", Backend::kDevice);
  dgemma_update_canvas op = {};
  op.batch = arguments.size(sampled, "sampled", 2, 0);
  op.length = sampled.size(1);
  op.vocabulary = vocabulary;
  const Shape positions = {op.batch, op.length}, requests = {op.batch};
  op.sampled = arguments.in<int32_t>(sampled, "sampled", positions);
  op.argmax = arguments.in<int32_t>(argmax, "argmax", positions);
  op.entropy = arguments.in<float>(entropy, "entropy", positions);
  op.pinned = arguments.in<uint8_t>(pinned, "pinned", positions);
  op.allowed = describe_allowed(arguments, allowed, allowed_row, positions, vocabulary);
  op.uniforms = arguments.in<double>(uniforms, "uniforms", positions);
  Draws{seed, canvas_index}.describe(arguments, op.batch, &op);
  op.max_steps = arguments.in<int32_t>(max_steps, "max_steps", requests);
  op.t_min = arguments.in<double>(t_min, "t_min", requests);
  op.t_max = arguments.in<double>(t_max, "t_max", requests);
  op.entropy_bound = arguments.in<float>(entropy_bound, "entropy_bound", requests);
  op.stability_threshold =
      arguments.in<int32_t>(stability_threshold, "stability_threshold", requests);
  op.confidence_threshold =
      arguments.in<float>(confidence_threshold, "confidence_threshold", requests);
  op.active = arguments.out<uint8_t>(active, "active", requests);
  op.canvas = arguments.out<int32_t>(canvas, "canvas", positions);
  op.draft = arguments.out<int32_t>(draft, "draft", positions);
  op.stable_steps = arguments.out<int32_t>(stable_steps, "stable_steps", requests);
  op.step = arguments.out<int32_t>(step, "step", requests);
  op.temperature = arguments.out<float>(temperature, "temperature", requests);
  op.accepted = arguments.out<uint8_t>(accepted, "accepted", positions);
  op.mean_entropy = arguments.out<float>(mean_entropy, "mean_entropy", requests);
  op.status = arguments.out<int32_t>(status, "status", requests);
  Backend("update_canvas_", sampled).run(Backend::kUpdate, op);
}

// How the embedding is read.
struct Embedding {
  const Tensor& rows;
  double scale;
  double tolerance;
  double max_norm;
};

dgemma_soft_embedding describe_soft_embedding(const Arguments& arguments, const Logits& logits,
                                              const Masses& masses, const OptionalTensor& pinned,
                                              const Embedding& embedding) {
  dgemma_soft_embedding op = {};
  op.logits = logits.describe(arguments);
  masses.describe(arguments, &op);
  op.pinned = arguments.in<uint8_t>(pinned, "pinned", {op.logits.batch, op.logits.length});
  op.hidden_size = arguments.size(embedding.rows, "embedding", 2, 1);
  op.embedding = arguments.in(embedding.rows, "embedding", {op.logits.vocabulary, op.hidden_size},
                              op.logits.dtype);
  op.embedding_scale = static_cast<float>(embedding.scale);
  op.tolerance = static_cast<float>(embedding.tolerance);
  op.max_embedding_norm = static_cast<float>(embedding.max_norm);
  return op;
}

template <typename Backend>
void run_soft_embedding(const char* name, const Arguments& arguments, dgemma_soft_embedding op,
                        const Tensor& out, const Tensor& workspace) {
  op.output = arguments.out(out, "out", {op.logits.batch, op.logits.length, op.hidden_size},
                            op.logits.dtype);
  op.workspace = arguments.workspace(workspace, &op.workspace_bytes);
  Backend(name, out).run(Backend::kSoftEmbedding, op);
}

template <typename Backend>
Tensor soft_embedding(const Tensor& raw, double softcap, const Tensor& temperature,
                      const OptionalTensor& active, const OptionalTensor& allowed,
                      const OptionalTensor& allowed_row, const Tensor& row_max,
                      const Tensor& row_sum, const Tensor& tile_max, const Tensor& tile_sum,
                      const OptionalTensor& pinned, const Tensor& embedding, double embedding_scale,
                      double tolerance, double max_embedding_norm) {
  const Arguments arguments("soft_embedding", Backend::kDevice);
  const dgemma_soft_embedding op =
      describe_soft_embedding(arguments, {raw, softcap, temperature, active, allowed, allowed_row},
                              {row_max, row_sum, tile_max, tile_sum}, pinned,
                              {embedding, embedding_scale, tolerance, max_embedding_norm});
  const auto bytes = static_cast<int64_t>(Backend::kSoftEmbeddingWorkspace(&op));
  Tensor out = torch::stable::new_zeros(raw, {op.logits.batch, op.logits.length, op.hidden_size});
  const Tensor workspace = torch::stable::new_empty(raw, {bytes}, ScalarType::Byte);
  run_soft_embedding<Backend>("soft_embedding", arguments, op, out, workspace);
  return out;
}

template <typename Backend>
void soft_embedding_out(const Tensor& raw, double softcap, const Tensor& temperature,
                        const OptionalTensor& active, const OptionalTensor& allowed,
                        const OptionalTensor& allowed_row, const Tensor& row_max,
                        const Tensor& row_sum, const Tensor& tile_max, const Tensor& tile_sum,
                        const OptionalTensor& pinned, const Tensor& embedding,
                        double embedding_scale, double tolerance, double max_embedding_norm,
                        const Tensor& out, const Tensor& workspace) {
  const Arguments arguments("soft_embedding.out", Backend::kDevice);
  const dgemma_soft_embedding op =
      describe_soft_embedding(arguments, {raw, softcap, temperature, active, allowed, allowed_row},
                              {row_max, row_sum, tile_max, tile_sum}, pinned,
                              {embedding, embedding_scale, tolerance, max_embedding_norm});
  run_soft_embedding<Backend>("soft_embedding.out", arguments, op, out, workspace);
}

template <typename Backend, typename Library>
void implement(Library& library) {
  library.impl("vocabulary_statistics", TORCH_BOX(&vocabulary_statistics<Backend>));
  library.impl("vocabulary_statistics.out", TORCH_BOX(&vocabulary_statistics_out<Backend>));
  library.impl("sample", TORCH_BOX(&sample<Backend>));
  library.impl("sample.out", TORCH_BOX(&sample_out<Backend>));
  library.impl("noise_", TORCH_BOX(&noise<Backend>));
  library.impl("update_canvas_", TORCH_BOX(&update_canvas<Backend>));
  library.impl("soft_embedding", TORCH_BOX(&soft_embedding<Backend>));
  library.impl("soft_embedding.out", TORCH_BOX(&soft_embedding_out<Backend>));
}

}  // namespace

void bind_denoise(pybind11::module_& module) {
  module.def(
      "soft_embedding_workspace",
      [](int64_t batch, int64_t length, int64_t vocabulary, int64_t hidden_size, bool cuda) {
        dgemma_soft_embedding op = {};
        op.logits.dtype = DGEMMA_BFLOAT16;
        op.logits.batch = batch;
        op.logits.length = length;
        op.logits.vocabulary = vocabulary;
        op.hidden_size = hidden_size;
#if defined(DGEMMA_WITH_CUDA)
        if (served_by_cuda(cuda)) return dgemma_cuda_soft_embedding_workspace(&op);
#endif
        return cuda ? 0 : dgemma_cpu_soft_embedding_workspace(&op);
      },
      "Bytes of workspace that the soft embedding of these sizes needs on the CPU or on a GPU.");
  module.def(
      "philox4x32_10",
      [](uint32_t counter0, uint32_t counter1, uint32_t counter2, uint32_t counter3, uint32_t key0,
         uint32_t key1) {
        const PhiloxBlock block =
            philox4x32_10({{counter0, counter1, counter2, counter3}}, key0, key1);
        return std::make_tuple(block.word[0], block.word[1], block.word[2], block.word[3]);
      },
      "One block of the counter-based random numbers: four words.");
}

}  // namespace dgemma

#define DGEMMA_LOGITS                                                                   \
  "Tensor logits, float softcap, Tensor temperature, Tensor? active, Tensor? allowed, " \
  "Tensor? allowed_row"
#define DGEMMA_MASSES "Tensor row_max, Tensor row_sum, Tensor tile_max, Tensor tile_sum"

STABLE_TORCH_LIBRARY_FRAGMENT(dgemma, library) {
  library.def("vocabulary_statistics(" DGEMMA_LOGITS
              ") -> (Tensor argmax, Tensor entropy, Tensor row_max, Tensor row_sum, "
              "Tensor tile_max, Tensor tile_sum)");
  library.def("vocabulary_statistics.out(" DGEMMA_LOGITS
              ", *, Tensor(a!) argmax, Tensor(b!) entropy, Tensor(c!) row_max, Tensor(d!) row_sum, "
              "Tensor(e!) tile_max, Tensor(f!) tile_sum) -> ()");
  library.def("sample(" DGEMMA_LOGITS ", " DGEMMA_MASSES
              ", Tensor seed, Tensor canvas_index, Tensor step, Tensor? uniforms) -> Tensor");
  library.def("sample.out(" DGEMMA_LOGITS ", " DGEMMA_MASSES
              ", Tensor seed, Tensor canvas_index, Tensor step, Tensor? uniforms, *, "
              "Tensor(a!) out) -> ()");
  library.def(
      "noise_(Tensor(a!) tokens, int vocabulary, int purpose, Tensor seed, Tensor canvas_index, "
      "Tensor step, Tensor? active, Tensor? keep, Tensor? allowed, Tensor? allowed_row, "
      "Tensor? uniforms) -> ()");
  library.def(
      "update_canvas_(Tensor sampled, Tensor argmax, Tensor entropy, Tensor? pinned, "
      "Tensor? allowed, Tensor? allowed_row, Tensor? uniforms, int vocabulary, Tensor seed, "
      "Tensor canvas_index, Tensor max_steps, Tensor t_min, Tensor t_max, Tensor entropy_bound, "
      "Tensor stability_threshold, Tensor confidence_threshold, Tensor(a!) active, "
      "Tensor(b!) canvas, Tensor(c!) draft, Tensor(d!) stable_steps, Tensor(e!) step, "
      "Tensor(f!) temperature, Tensor(g!) accepted, Tensor(h!) mean_entropy, "
      "Tensor(i!) status) -> ()");
  library.def("soft_embedding(" DGEMMA_LOGITS ", " DGEMMA_MASSES
              ", Tensor? pinned, Tensor embedding, float embedding_scale, float tolerance, "
              "float max_embedding_norm) -> Tensor");
  library.def("soft_embedding.out(" DGEMMA_LOGITS ", " DGEMMA_MASSES
              ", Tensor? pinned, Tensor embedding, float embedding_scale, float tolerance, "
              "float max_embedding_norm, *, Tensor(a!) out, Tensor(b!) workspace) -> ()");
}

DGEMMA_REGISTER(dgemma::implement, dgemma::Cpu, dgemma::Cuda)
