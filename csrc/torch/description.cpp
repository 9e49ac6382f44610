// The descriptions for Python, which works out from them what a call without data gives
// (ops/description.py). csrc/torch/operator.h says what the words mean.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "torch/registration.h"
#include "torch/workspace.h"

namespace dgemma {
namespace {

namespace py = pybind11;

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

// (name, times, per, least, name of what it is a multiple of); a number and -1 have no name.
py::tuple describe(const Extent& extent) {
  return py::make_tuple(extent.field.name, extent.times, extent.per, extent.least,
                        extent.multiple_of.name);
}

py::dict describe(const Argument& argument) {
  py::dict made;
  made["name"] = argument.name;
  made["optional"] = argument.optional;
  made["with_previous"] = argument.with_previous;
  made["any_shape"] = argument.any_shape;
  made["is_tensor"] = argument.is_tensor();
  if (!argument.is_tensor()) {
    const bool is_real = argument.content == Content::kReal;
    made["dtype"] = is_real ? "real" : "integer";
    made["field"] = argument.content == Content::kInteger ? argument.field.name : "";
    made["most_of"] = argument.range.most_of.name;
    made["least"] = argument.range.least;
    made["most"] = argument.range.most;
    made["finite"] = argument.range.finite;
    return made;
  }
  made["dtype"] = dtype_of(argument.content);
  py::list shape;
  for (const Extent& extent : argument.shape()) shape.append(describe(extent));
  // Bytes of a row of codes are no number of columns, but for those of FP8.
  const bool by_format = argument.kind == Kind::kCodes && argument.format != DGEMMA_WEIGHTS_FP8;
  if (by_format || argument.kind == Kind::kGroupScales)
    shape[shape.size() - 1] = describe(Extent(kAnyExtent));
  made["shape"] = shape;
  // Of scales of rows the name of their matrix.
  made["scales_rows_of"] = argument.kind == Kind::kRowScales ? argument.matrix : "";
  return made;
}

py::list describe(std::span<const Argument> arguments) {
  py::list made;
  for (const Argument& argument : arguments) made.append(describe(argument));
  return made;
}

py::dict describe(const Operator& op) {
  py::dict made;
  made["name"] = op.name;
  made["arguments"] = describe(op.arguments);
  made["outputs"] = describe(op.outputs);
  made["has_out"] = op.form == Form::kNewAndOut;
  return made;
}

}  // namespace

void bind_description(py::module_& module) {
  module.def(
      "operators",
      [] {
        py::list made;
        for (const Operator* op : operators()) made.append(describe(*op));
        return made;
      },
      "The description of every operator.");
  module.def(
      "workspace",
      [](const std::string& name, bool bfloat16, bool cuda, const py::kwargs& sizes) {
        return workspace_bytes(name, bfloat16, cuda, sizes.cast<std::map<std::string, int64_t>>());
      },
      py::arg("name"), py::pos_only(), py::kw_only(), py::arg("bfloat16"), py::arg("cuda"),
      "Bytes of workspace of an operator for these sizes, named as in its description.");
}

}  // namespace dgemma
