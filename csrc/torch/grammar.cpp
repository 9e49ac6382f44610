// The compiling of grammars for Python: bytes in and bytes out, which numpy reads as arrays.
#include <cstring>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "automaton/byte_automaton.h"
#include "automaton/token_automaton.h"
#include "torch/python.h"

namespace dgemma {
namespace {

// The bytes of a Python object, while this lives.
class Buffer {
 public:
  explicit Buffer(PyObject* object) {
    python::check(PyObject_GetBuffer(object, &view_, PyBUF_SIMPLE));
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { PyBuffer_Release(&view_); }

  template <typename T>
  std::vector<T> copy() const {
    std::vector<T> values(static_cast<size_t>(view_.len) / sizeof(T));
    if (!values.empty()) std::memcpy(values.data(), view_.buf, values.size() * sizeof(T));
    return values;
  }

 private:
  Py_buffer view_ = {};
};

template <typename T>
python::Object bytes_of(const std::vector<T>& values) {
  return python::Object(
      PyBytes_FromStringAndSize(reinterpret_cast<const char*>(values.data()),
                                static_cast<Py_ssize_t>(values.size() * sizeof(T))));
}

PyObject* compile_bytes(PyObject* /*module*/, PyObject* arguments, PyObject* keywords) {
  return python::guard([&] {
    static const char* const names[] = {"pattern", nullptr};
    PyObject* pattern = nullptr;
    python::parse(arguments, keywords, "O:byte_automaton", names, &pattern);
    const std::vector<int32_t> nodes = Buffer(pattern).copy<int32_t>();
    const ByteAutomaton made = python::unlocked([&] { return byte_automaton(nodes); });
    python::Dict found;
    found.set("states", made.states);
    found.set("start", made.start);
    found.set("byte_classes", made.byte_classes);
    found.set("byte_class", bytes_of(made.byte_class));
    found.set("next", bytes_of(made.next));
    found.set("accepting", bytes_of(made.accepting));
    return found.take();
  });
}

PyObject* compile_tokens(PyObject* /*module*/, PyObject* arguments, PyObject* keywords) {
  return python::guard([&] {
    static const char* const names[] = {"states",       "start",     "byte_class", "next",
                                        "accepting",    "strings",   "offset",     "most_states",
                                        "most_classes", "most_arcs", nullptr};
    int states = 0, start = 0;
    PyObject *byte_class = nullptr, *next = nullptr, *accepting = nullptr, *text = nullptr,
             *offset = nullptr;
    TokenLimits limits = {};
    python::parse(arguments, keywords, "iiOOOOOiii:token_automaton", names, &states, &start,
                  &byte_class, &next, &accepting, &text, &offset, &limits.states, &limits.classes,
                  &limits.arcs);
    ByteAutomaton given;
    given.states = states;
    given.start = start;
    given.byte_class = Buffer(byte_class).copy<uint8_t>();
    given.next = Buffer(next).copy<uint16_t>();
    given.accepting = Buffer(accepting).copy<uint8_t>();
    const std::vector<uint8_t> bytes = Buffer(text).copy<uint8_t>();
    const std::vector<int64_t> offsets = Buffer(offset).copy<int64_t>();
    if (offsets.empty() || given.byte_class.size() != 256)
      throw std::invalid_argument("token_automaton: got arrays of other sizes than it wants");
    const TokenAutomaton made =
        python::unlocked([&] { return token_automaton(given, {bytes, offsets}, limits); });
    python::Dict found;
    found.set("states", made.states);
    found.set("start", made.start);
    found.set("classes", made.classes);
    found.set("vectors", made.vectors);
    found.set("end_class", made.end_class);
    found.set("tail_class", made.tail_class);
    found.set("class_of_string", bytes_of(made.class_of_string));
    found.set("set_begin", bytes_of(made.set_begin));
    found.set("set_class", bytes_of(made.set_class));
    found.set("out_begin", bytes_of(made.out_begin));
    found.set("out_target", bytes_of(made.out_target));
    found.set("out_set", bytes_of(made.out_set));
    found.set("in_begin", bytes_of(made.in_begin));
    found.set("in_source", bytes_of(made.in_source));
    found.set("in_set", bytes_of(made.in_set));
    found.set("distance", bytes_of(made.distance));
    return found.take();
  });
}

}  // namespace

void bind_grammar(PyObject* module) {
  static PyMethodDef methods[] = {
      python::method(
          "byte_automaton", compile_bytes,
          "The least automaton over bytes of a pattern (csrc/automaton/byte_automaton.h)."),
      python::method(
          "token_automaton", compile_tokens,
          "The automaton over tokens of one over bytes (csrc/automaton/token_automaton.h)."),
      {}};
  python::check(PyModule_AddFunctions(module, methods));
}

}  // namespace dgemma
