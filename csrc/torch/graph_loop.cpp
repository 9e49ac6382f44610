// GraphLoop for Python: a step that torch has captured, repeated by the device. Graphs, streams and
// device memory come as addresses.
#include <pybind11/pybind11.h>

#include <stdexcept>

#if defined(DGEMMA_WITH_CUDA)
#include "cuda/graph_loop.h"
#endif

namespace dgemma {

void bind_graph_loop([[maybe_unused]] pybind11::module_& module) {
#if defined(DGEMMA_WITH_CUDA)
  pybind11::class_<GraphLoop>(module, "GraphLoop",
                              "A captured denoising step, repeated on the device until a canvas is "
                              "finished.")
      .def(pybind11::init([](uintptr_t step, uintptr_t active, uintptr_t slot, int32_t rows,
                             uintptr_t steps_left) {
             const LoopFlags flags = {reinterpret_cast<const uint8_t*>(active),
                                      reinterpret_cast<const int32_t*>(slot), rows,
                                      reinterpret_cast<int32_t*>(steps_left)};
             std::string error;
             auto loop = GraphLoop::make(reinterpret_cast<void*>(step), flags, &error);
             if (loop == nullptr) throw std::runtime_error("dgemma::GraphLoop: " + error);
             return loop;
           }),
           pybind11::arg("step"), pybind11::arg("active"), pybind11::arg("slot"),
           pybind11::arg("rows"), pybind11::arg("steps_left"))
      .def("launch", [](GraphLoop& loop, uintptr_t stream) {
        if (const char* error = loop.launch(reinterpret_cast<void*>(stream)))
          throw std::runtime_error(std::string("dgemma::GraphLoop: ") + error);
      });
#endif
}

}  // namespace dgemma
