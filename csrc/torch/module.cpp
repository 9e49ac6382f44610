// The Python module dgemma_ext._C: importing it registers the torch operators of the library
// `dgemma`; its functions carry what is not a tensor operation.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <cstring>
#include <tuple>

#include "cpu/dispatch.h"
#include "device/philox.h"
#include "dgemma/denoise.h"
#include "torch/backend.h"

namespace dgemma {

void bind_description(pybind11::module_& module);
[[gnu::weak]] void bind_moe_plan(pybind11::module_& module);
void bind_graph_loop(pybind11::module_& module);

namespace {

std::vector<std::string> available_cpu_variants() {
  std::vector<std::string> names;
  for (int i = 0; i < kCpuVariants; ++i) {
    const auto variant = static_cast<dgemma_cpu_variant>(i);
    if (cpu_variant_available(variant)) names.emplace_back(dgemma_cpu_variant_name(variant));
  }
  return names;
}

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

PYBIND11_MODULE(_C, module) {
  module.doc() = "Registers torch.ops.dgemma and tells what this build and this machine have.";
  module.def("version", [] { return std::string(dgemma_version()); });
  module.def(
      "cpu_variant",
      [] { return std::string(dgemma_cpu_variant_name(dgemma::cpu_variant_from_environment())); },
      "The variant that CPU kernels run now: DGEMMA_CPU, or the best of the machine.");
  module.def("cpu_variants", &dgemma::available_cpu_variants,
             "The variants that this machine runs, the best last.");
  module.def("has_cuda", [] { return dgemma_has_cuda() != 0; });
  module.attr("VOCABULARY_TILE") = DGEMMA_VOCABULARY_TILE;
  module.def(
      "philox4x32_10",
      [](uint32_t counter0, uint32_t counter1, uint32_t counter2, uint32_t counter3, uint32_t key0,
         uint32_t key1) {
        const dgemma::PhiloxBlock block =
            dgemma::philox4x32_10({{counter0, counter1, counter2, counter3}}, key0, key1);
        return std::make_tuple(block.word[0], block.word[1], block.word[2], block.word[3]);
      },
      "One block of the counter-based random numbers: four words.");
  dgemma::bind_description(module);
  if (dgemma::bind_moe_plan) dgemma::bind_moe_plan(module);
  dgemma::bind_graph_loop(module);
}
