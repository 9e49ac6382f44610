// GraphLoop for Python: a step that torch has captured, repeated by the device. Graphs, streams and
// device memory come as addresses.
#include "torch/python.h"

#if defined(DGEMMA_WITH_CUDA)
#include <memory>

#include "cuda/graph_loop.h"
#endif

namespace dgemma {
namespace {

#if defined(DGEMMA_WITH_CUDA)
struct Instance {
  PyObject_HEAD GraphLoop* loop;
};

GraphLoop*& loop_of(PyObject* self) { return reinterpret_cast<Instance*>(self)->loop; }

PyObject* make(PyTypeObject* type, PyObject* arguments, PyObject* keywords) {
  return python::guard([&] {
    static const char* const names[] = {"step", "active", "slot", "rows", "steps_left", nullptr};
    long long step = 0, active = 0, slot = 0, steps_left = 0;
    int rows = 0;
    python::parse(arguments, keywords, "LLLiL:GraphLoop", names, &step, &active, &slot, &rows,
                  &steps_left);
    const LoopFlags flags = {reinterpret_cast<const uint8_t*>(active),
                             reinterpret_cast<const int32_t*>(slot), rows,
                             reinterpret_cast<int32_t*>(steps_left)};
    std::string error;
    auto loop = GraphLoop::make(reinterpret_cast<void*>(step), flags, &error);
    if (loop == nullptr) throw std::runtime_error("dgemma::GraphLoop: " + error);
    const auto allocate = reinterpret_cast<allocfunc>(PyType_GetSlot(type, Py_tp_alloc));
    python::Object self(allocate(type, 0));
    loop_of(self.get()) = loop.release();
    return self;
  });
}

void destroy(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  delete loop_of(self);
  reinterpret_cast<freefunc>(PyType_GetSlot(type, Py_tp_free))(self);
  Py_DECREF(type);  // an instance of a type that is made at run time holds it
}

PyObject* launch(PyObject* self, PyObject* arguments, PyObject* keywords) {
  return python::guard([&] {
    static const char* const names[] = {"stream", nullptr};
    long long stream = 0;
    python::parse(arguments, keywords, "L:launch", names, &stream);
    if (const char* error = loop_of(self)->launch(reinterpret_cast<void*>(stream)))
      throw std::runtime_error(std::string("dgemma::GraphLoop: ") + error);
    return python::Object(Py_NewRef(Py_None));
  });
}
#endif

}  // namespace

void bind_graph_loop([[maybe_unused]] PyObject* module) {
#if defined(DGEMMA_WITH_CUDA)
  static PyMethodDef methods[] = {python::method("launch", launch, "Runs the loop in a stream."),
                                  {}};
  static char words[] =
      "A captured denoising step, repeated on the device until a canvas is finished.";
  static PyType_Slot slots[] = {{Py_tp_new, reinterpret_cast<void*>(make)},
                                {Py_tp_dealloc, reinterpret_cast<void*>(destroy)},
                                {Py_tp_methods, methods},
                                {Py_tp_doc, words},
                                {}};
  static PyType_Spec type = {"dgemma_ext._C.GraphLoop", sizeof(Instance), 0, Py_TPFLAGS_DEFAULT,
                             slots};
  const python::Object made(PyType_FromSpec(&type));
  python::check(PyModule_AddObjectRef(module, "GraphLoop", made.get()));
#endif
}

}  // namespace dgemma
