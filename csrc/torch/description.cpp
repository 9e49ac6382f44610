// The descriptions for Python, which works out from them what a call without data gives
// (ops/description.py). csrc/torch/operator.h says what the words mean.
#include "torch/python.h"
#include "torch/registration.h"
#include "torch/workspace.h"

namespace dgemma {
namespace {

using python::Dict;
using python::List;
using python::Object;

// Attributes of torch; "number" is float32 or bfloat16, "" depends on the weights' format.
const char* dtype_of(Content content) {
  switch (content) {
    case Content::kNumbers:
      return "number";
    case Content::kFloat32:
      return "float32";
    case Content::kFloat64:
      return "float64";
    case Content::kInt32:
      return "int32";
    case Content::kInt64:
      return "int64";
    case Content::kBool:
      return "bool";
    case Content::kBytes:
      return "uint8";
    default:
      return "";
  }
}

// (name, times, per, more, least, name of what it is a multiple of); a number and -1 have no name.
Object describe(const Extent& extent) {
  return python::make_tuple(extent.field.name, extent.times, extent.per, extent.more, extent.least,
                            extent.multiple_of.name);
}

Object describe_shape(const Argument& argument) {
  // Bytes of a row of codes are no number of columns, but for those of FP8.
  const bool by_format = argument.kind == Kind::kCodes && argument.format != DGEMMA_WEIGHTS_FP8;
  const bool any_row = by_format || argument.kind == Kind::kGroupScales;
  const std::span<const Extent> shape = argument.shape();
  List made;
  for (const Extent& extent : shape)
    made.append(describe(any_row && &extent == &shape.back() ? Extent(kAnyExtent) : extent));
  return made.take();
}

Object describe(const Argument& argument) {
  Dict made;
  made.set("name", argument.name);
  made.set("optional", argument.optional);
  made.set("with_previous", argument.with_previous);
  made.set("any_shape", argument.any_shape);
  made.set("strided", argument.is_strided());
  made.set("is_tensor", argument.is_tensor());
  if (!argument.is_tensor()) {
    made.set("dtype", argument.content == Content::kReal ? "real" : "integer");
    made.set("field", argument.content == Content::kInteger ? argument.field.name : "");
    made.set("most_of", argument.range.most_of.name);
    made.set("least", argument.range.least);
    made.set("most", argument.range.most);
    made.set("finite", argument.range.finite);
    return made.take();
  }
  made.set("dtype", dtype_of(argument.content));
  made.set("shape", describe_shape(argument));
  // Of scales of rows the name of their matrix.
  made.set("scales_rows_of", argument.kind == Kind::kRowScales ? argument.matrix : "");
  return made.take();
}

Object describe(std::span<const Argument> arguments) {
  List made;
  for (const Argument& argument : arguments) made.append(describe(argument));
  return made.take();
}

Object describe(const Operator& op) {
  Dict made;
  made.set("name", op.name);
  made.set("arguments", describe(op.arguments));
  made.set("outputs", describe(op.outputs));
  made.set("has_out", op.form == Form::kNewAndOut);
  return made.take();
}

PyObject* describe_operators(PyObject* /*module*/, PyObject* /*none*/) {
  return python::guard([] {
    List made;
    for (const Operator* op : operators()) made.append(describe(*op));
    return made.take();
  });
}

PyObject* workspace(PyObject* /*module*/, PyObject* arguments, PyObject* keywords) {
  return python::guard([&] {
    const char* name = nullptr;
    if (PyArg_ParseTuple(arguments, "s:workspace", &name) == 0) throw python::ErrorIsSet();
    std::map<std::string, int64_t> sizes;
    PyObject *key, *value;
    for (Py_ssize_t at = 0; keywords != nullptr && PyDict_Next(keywords, &at, &key, &value);)
      sizes[python::to_string(key)] = python::to_integer(value);
    const auto take = [&](const char* wanted) {
      const auto found = sizes.extract(wanted);
      if (found.empty())
        throw std::invalid_argument(std::string("workspace: got no ") + wanted +
                                    ", wants it by name");
      return found.mapped() != 0;
    };
    const bool bfloat16 = take("bfloat16"), cuda = take("cuda");
    return workspace_bytes(name, bfloat16, cuda, sizes);
  });
}

}  // namespace

void bind_description(PyObject* module) {
  static PyMethodDef methods[] = {
      python::method("operators", describe_operators, "The description of every operator."),
      python::method("workspace", workspace,
                     "Bytes of workspace of an operator for these sizes, named as in its "
                     "description."),
      {}};
  python::check(PyModule_AddFunctions(module, methods));
}

}  // namespace dgemma
