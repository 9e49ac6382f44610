// The Python module dgemma_ext._C: importing it registers the torch operators of the library
// `dgemma`; its functions carry what is not a tensor operation.
#include <cstdlib>
#include <cstring>

#include "cpu/dispatch.h"
#include "device/philox.h"
#include "dgemma/denoise.h"
#include "torch/backend.h"
#include "torch/python.h"

namespace dgemma {

void bind_description(PyObject* module);
[[gnu::weak]] void bind_moe_plan(PyObject* module);
void bind_graph_loop(PyObject* module);
[[gnu::weak]] void bind_grammar(PyObject* module);

namespace {

std::vector<std::string> available_cpu_variants() {
  std::vector<std::string> names;
  for (int i = 0; i < kCpuVariants; ++i) {
    const auto variant = static_cast<dgemma_cpu_variant>(i);
    if (cpu_variant_available(variant)) names.emplace_back(dgemma_cpu_variant_name(variant));
  }
  return names;
}

PyObject* version(PyObject* /*module*/, PyObject* /*none*/) {
  return python::guard([] { return dgemma_version(); });
}

PyObject* cpu_variant(PyObject* /*module*/, PyObject* /*none*/) {
  return python::guard([] { return dgemma_cpu_variant_name(cpu_variant_from_environment()); });
}

PyObject* cpu_variants(PyObject* /*module*/, PyObject* /*none*/) {
  return python::guard([] { return available_cpu_variants(); });
}

PyObject* has_cuda(PyObject* /*module*/, PyObject* /*none*/) {
  return python::guard([] { return dgemma_has_cuda() != 0; });
}

PyObject* philox(PyObject* /*module*/, PyObject* arguments, PyObject* keywords) {
  return python::guard([&] {
    static const char* const names[] = {"counter0", "counter1", "counter2", "counter3",
                                        "key0",     "key1",     nullptr};
    unsigned int counter[4] = {}, key[2] = {};
    python::parse(arguments, keywords, "IIIIII:philox4x32_10", names, &counter[0], &counter[1],
                  &counter[2], &counter[3], &key[0], &key[1]);
    const PhiloxBlock block =
        philox4x32_10({{counter[0], counter[1], counter[2], counter[3]}}, key[0], key[1]);
    return python::make_tuple(block.word[0], block.word[1], block.word[2], block.word[3]);
  });
}

PyMethodDef functions[] = {
    python::method("version", version, "The version of the library."),
    python::method("cpu_variant", cpu_variant,
                   "The variant that CPU kernels run now: DGEMMA_CPU, or the best of the machine."),
    python::method("cpu_variants", cpu_variants,
                   "The variants that this machine runs, the best last."),
    python::method("has_cuda", has_cuda, "Whether this build has CUDA kernels."),
    python::method("philox4x32_10", philox,
                   "One block of the counter-based random numbers: four words."),
    {}};

// Its size is that of what is kept for every interpreter: nothing, as torch's registry is the
// process's.
PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    "_C",
    "Registers torch.ops.dgemma and tells what this build and this machine have.",
    -1,
    functions,
    nullptr,
    nullptr,
    nullptr,
    nullptr};

}  // namespace

dgemma_cpu_variant cpu_variant_from_environment() {
  const char* wanted = std::getenv("DGEMMA_CPU");
  if (wanted == nullptr || *wanted == '\0') return dgemma_cpu_best_variant();
  for (int i = 0; i < kCpuVariants; ++i) {
    const auto variant = static_cast<dgemma_cpu_variant>(i);
    if (std::strcmp(wanted, dgemma_cpu_variant_name(variant)) == 0 &&
        cpu_variant_available(variant))
      return variant;
  }
  std::string choices;
  for (const std::string& name : available_cpu_variants())
    choices += (choices.empty() ? "" : ", ") + name;
  throw std::invalid_argument("environment variable DGEMMA_CPU: got '" + std::string(wanted) +
                              "', wants one of what this machine has: " + choices);
}

}  // namespace dgemma

// The families add their operators in fragments of this library.
STABLE_TORCH_LIBRARY(dgemma, library) { static_cast<void>(library); }

PyMODINIT_FUNC PyInit__C() {
  using namespace dgemma;
  return python::guard([] {
    python::Object module(PyModule_Create(&definition));
    python::check(PyModule_AddIntConstant(module.get(), "VOCABULARY_TILE", DGEMMA_VOCABULARY_TILE));
    bind_description(module.get());
    if (bind_moe_plan) bind_moe_plan(module.get());
    bind_graph_loop(module.get());
    if (bind_grammar) bind_grammar(module.get());
    return module;
  });
}
