// Values and functions of Python by its limited C interface (PEP 384), so that one build of `_C`
// serves Python 3.11 and later. CMake defines Py_LIMITED_API.
#pragma once

#include <Python.h>

#include <concepts>
#include <cstdint>
#include <exception>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace dgemma::python {

// Thrown where Python has set its error already.
struct ErrorIsSet {};

// Owns one reference.
class Object {
 public:
  explicit Object(PyObject* owned) : object_(owned) {
    if (owned == nullptr) throw ErrorIsSet();
  }
  Object(Object&& other) noexcept : object_(std::exchange(other.object_, nullptr)) {}
  Object& operator=(Object&& other) noexcept {
    std::swap(object_, other.object_);
    return *this;
  }
  ~Object() { Py_XDECREF(object_); }

  PyObject* get() const { return object_; }
  PyObject* release() { return std::exchange(object_, nullptr); }

 private:
  PyObject* object_;
};

inline void check(int status) {
  if (status < 0) throw ErrorIsSet();
}

inline Object to_python(Object object) { return object; }
inline Object to_python(const char* text) { return Object(PyUnicode_FromString(text)); }
inline Object to_python(const std::string& text) {
  return Object(PyUnicode_FromStringAndSize(text.data(), static_cast<Py_ssize_t>(text.size())));
}
template <std::integral Value>
Object to_python(Value value) {
  if constexpr (std::same_as<Value, bool>)
    return Object(PyBool_FromLong(value));
  else if constexpr (std::signed_integral<Value>)
    return Object(PyLong_FromLongLong(value));
  else
    return Object(PyLong_FromUnsignedLongLong(value));
}

class List {
 public:
  template <typename Value>
  void append(Value&& value) {
    check(PyList_Append(list_.get(), to_python(std::forward<Value>(value)).get()));
  }
  Object take() { return std::move(list_); }

 private:
  Object list_{PyList_New(0)};
};

class Dict {
 public:
  template <typename Value>
  void set(const char* key, Value&& value) {
    check(PyDict_SetItemString(dict_.get(), key, to_python(std::forward<Value>(value)).get()));
  }
  Object take() { return std::move(dict_); }

 private:
  Object dict_{PyDict_New()};
};

template <typename... Values>
Object make_tuple(Values&&... values) {
  Object made(PyTuple_New(sizeof...(values)));
  Py_ssize_t index = 0;
  (check(PyTuple_SetItem(made.get(), index++, to_python(std::forward<Values>(values)).release())),
   ...);
  return made;
}

template <typename Value>
Object to_python(const std::vector<Value>& values) {
  List made;
  for (const Value& value : values) made.append(value);
  return made.take();
}

// Anything with __index__; a TypeError or an OverflowError otherwise.
inline int64_t to_integer(PyObject* object) {
  const long long value = PyLong_AsLongLong(object);
  if (value == -1 && PyErr_Occurred() != nullptr) throw ErrorIsSet();
  return value;
}

inline int32_t to_int32(PyObject* object) {
  const int64_t value = to_integer(object);
  if (value != static_cast<int32_t>(value))
    throw std::invalid_argument("got " + std::to_string(value) + ", wants 32 bits");
  return static_cast<int32_t>(value);
}

inline std::string to_string(PyObject* object) {
  Py_ssize_t size = 0;
  const char* text = PyUnicode_AsUTF8AndSize(object, &size);
  if (text == nullptr) throw ErrorIsSet();
  return {text, static_cast<size_t>(size)};
}

// Calls visit(item) for what an iterable gives.
template <typename Visit>
void for_each(PyObject* iterable, Visit visit) {
  const Object iterator(PyObject_GetIter(iterable));
  while (PyObject* item = PyIter_Next(iterator.get())) visit(Object(item).get());
  if (PyErr_Occurred() != nullptr) throw ErrorIsSet();
}

// What a function of a module or a type returns to Python: the value, or NULL with the error set.
// std::invalid_argument is a ValueError, every other exception a RuntimeError.
template <typename Function>
PyObject* guard(Function function) noexcept {
  try {
    return to_python(function()).release();
  } catch (const ErrorIsSet&) {
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

// What a function gives that touches no object of Python's. Other threads of Python's run
// meanwhile.
template <typename Function>
auto unlocked(Function function) {
  struct Lock {
    Lock() = default;
    Lock(const Lock&) = delete;
    Lock& operator=(const Lock&) = delete;
    ~Lock() { PyEval_RestoreThread(state); }
    PyThreadState* state = PyEval_SaveThread();
  };
  const Lock given_away;
  return function();
}

// As PyArg_ParseTupleAndKeywords, with an exception.
template <size_t count, typename... Pointers>
void parse(PyObject* arguments, PyObject* keywords, const char* format,
           const char* const (&names)[count], Pointers... values) {
  static_assert(count == sizeof...(values) + 1, "the names end with NULL");
  if (PyArg_ParseTupleAndKeywords(arguments, keywords, format, const_cast<char**>(names),
                                  values...) == 0)
    throw ErrorIsSet();
}

using KeywordFunction = PyObject* (*)(PyObject* self, PyObject* arguments, PyObject* keywords);

inline PyMethodDef method(const char* name, PyCFunction function, const char* words) {
  return {name, function, METH_NOARGS, words};
}
inline PyMethodDef method(const char* name, KeywordFunction function, const char* words) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)),
          METH_VARARGS | METH_KEYWORDS, words};
}

}  // namespace dgemma::python
