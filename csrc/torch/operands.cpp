#include "torch/operands.h"

#include <cmath>
#include <sstream>
#include <stdexcept>

namespace dgemma {

using torch::stable::detail::from;
using torch::stable::detail::to;

namespace {

Shape shape_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return Shape(sizes.begin(), sizes.end());
}

Shape strides_of(const Tensor& tensor) {
  const auto strides = tensor.strides();
  return Shape(strides.begin(), strides.end());
}

ScalarType type_of(Content content) {
  switch (content) {
    case Content::kFloat32:
      return ScalarType::Float;
    case Content::kFloat64:
      return ScalarType::Double;
    case Content::kInt32:
      return ScalarType::Int;
    case Content::kInt64:
      return ScalarType::Long;
    case Content::kBool:
      return ScalarType::Bool;
    case Content::kBytes:
      return ScalarType::Byte;
    default:
      return ScalarType::Undefined;
  }
}

// Of the types that an output may have.
int bytes_of(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
    case ScalarType::Long:
      return 8;
    case ScalarType::Float:
    case ScalarType::Int:
      return 4;
    case ScalarType::BFloat16:
      return 2;
    default:
      return 1;
  }
}

std::string place_of(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  if (tensor.is_cuda()) return "cuda:" + std::to_string(tensor.get_device_index());
  return "another device";
}

}  // namespace

std::string name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "torch.float32";
    case ScalarType::Double:
      return "torch.float64";
    case ScalarType::Half:
      return "torch.float16";
    case ScalarType::BFloat16:
      return "torch.bfloat16";
    case ScalarType::Int:
      return "torch.int32";
    case ScalarType::Long:
      return "torch.int64";
    case ScalarType::Bool:
      return "torch.bool";
    case ScalarType::Byte:
      return "torch.uint8";
    default:
      return torch::headeronly::toString(type);
  }
}

std::string describe(const Shape& shape) {
  std::ostringstream text;
  text << "[";
  for (size_t i = 0; i < shape.size(); ++i) {
    if (i > 0) text << ", ";
    if (shape[i] == kAnyExtent)
      text << "any";
    else
      text << shape[i];
  }
  text << "]";
  return text.str();
}

void Operands::refuse(const char* name, const std::string& got, const std::string& want) const {
  throw std::invalid_argument(std::string("dgemma::") + op_.name + ": " + name + ": got " + got +
                              ", wants " + want);
}

void Operands::take(StableIValue* stack, bool given) {
  // All of the stack first: what lies there is owned.
  size_t count = 0;
  for (const Argument& argument : op_.arguments) {
    const size_t i = count++;
    if (!argument.is_tensor())
      take_number(argument, stack[i]);
    else if (argument.optional)
      tensors_[i] = to<std::optional<Tensor>>(stack[i]);
    else
      tensors_[i].emplace(to<Tensor>(stack[i]));
  }
  if (given) {
    for (size_t i = 0; i < op_.outputs.size(); ++i, ++count)
      tensors_[count].emplace(to<Tensor>(stack[count]));
    if (op_.operation.workspace.exists()) workspace_ = to<std::optional<Tensor>>(stack[count]);
  }
  for (size_t i = 0; first_ == nullptr && i < count; ++i)
    if (tensors_[i].has_value()) first_ = &*tensors_[i];
}

void Operands::take_number(const Argument& argument, StableIValue value) {
  if (argument.kind == Kind::kFormat) {
    matrix(argument).format = static_cast<dgemma_weight_format>(to<int64_t>(value));
  } else if (argument.content == Content::kReal) {
    at<float>(argument.field) = static_cast<float>(to<double>(value));
  } else if (argument.content == Content::kChoice) {
    // An enumerator that does not exist is refused by its range, before it is looked at.
    at<int32_t>(argument.field) = static_cast<int32_t>(to<int64_t>(value));
  } else {
    learn(argument.field, to<int64_t>(value));
  }
}

bool Operands::is_known(Field field) const {
  for (size_t i = 0; i < known_count_; ++i)
    if (known_[i] == field.offset) return true;
  return false;
}

void Operands::learn(Field field, int64_t value) {
  at<int64_t>(field) = value;
  if (known_count_ < known_.size()) known_[known_count_++] = field.offset;
}

int64_t Operands::value(const Extent& extent) const {
  if (!extent.field.exists()) return extent.times;
  const int64_t product = extent.times * at<int64_t>(extent.field);
  return (product + extent.per - 1) / extent.per + extent.more;
}

Shape Operands::wanted_shape(const Argument& argument) const {
  Shape shape;
  for (const Extent& extent : argument.shape()) shape.push_back(value(extent));
  return shape;
}

// What the tensors' shapes say of extents that are not known yet: at first where a dimension is the
// extent itself, and then where it is a multiple of it.
void Operands::find_extents(bool exactly) {
  for (size_t i = 0; i < tensors(); ++i) {
    if (!tensors_[i].has_value()) continue;
    const Argument& described = argument(i);
    const Tensor& tensor = *tensors_[i];
    if (described.kind == Kind::kGroupScales || described.kind == Kind::kRowScales) continue;
    if (described.any_shape) {
      if (any_shape_ == nullptr) {
        any_shape_ = &tensor;
        learn(described.extents[0].field, tensor.numel());
      }
      continue;
    }
    if (tensor.dim() != described.dimensions)
      refuse(described.name, "shape " + describe(shape_of(tensor)),
             std::to_string(described.dimensions) + " dimensions");
    const auto sizes = tensor.sizes();
    for (size_t d = 0; d < described.dimensions; ++d) {
      const Extent& extent = described.extents[d];
      const bool in_codes = described.kind == Kind::kCodes && d + 1 == described.dimensions;
      if (!extent.tells() || in_codes || (exactly && extent.times != 1)) continue;
      if (!is_known(extent.field)) learn(extent.field, sizes[d] / extent.times);
    }
  }
}

void Operands::check() {
  find_extents(true);
  find_extents(false);
  const Argument* previous = nullptr;
  bool has_previous = false;
  for (size_t i = 0; i < tensors(); ++i) {
    const Argument& described = argument(i);
    if (!described.is_tensor()) {
      check_number(described);
    } else if (tensors_[i].has_value()) {
      if (described.with_previous && !has_previous)
        refuse(previous->name, "None",
               std::string("both it and ") + described.name + " or neither");
      check_tensor(described, *tensors_[i]);
    } else if (described.with_previous && has_previous) {
      refuse(described.name, "None", std::string("both it and ") + previous->name + " or neither");
    }
    previous = &described;
    has_previous = tensors_[i].has_value();
  }
}

void Operands::check_number(const Argument& argument) const {
  if (argument.kind == Kind::kFormat) return check_format(argument);
  const Range& range = argument.range;
  if (argument.content == Content::kReal) {
    if (range.finite && !std::isfinite(at<float>(argument.field)))
      refuse(argument.name, std::to_string(at<float>(argument.field)), "a finite number");
    return;
  }
  const int64_t got = argument.content == Content::kChoice ? at<int32_t>(argument.field)
                                                           : at<int64_t>(argument.field);
  const int64_t most = range.most_of.exists() ? at<int64_t>(range.most_of) : range.most;
  if (got >= range.least && got <= most) return;
  const bool open = most == std::numeric_limits<int64_t>::max();
  refuse(argument.name, std::to_string(got),
         std::to_string(range.least) + (open ? " or more" : " to " + std::to_string(most)));
}

void Operands::check_tensor(const Argument& argument, const Tensor& tensor) {
  check_place(argument, tensor);
  const ScalarType got = tensor.scalar_type(), wanted = wanted_type(argument, tensor);
  if (got != wanted) refuse(argument.name, name_of(got), name_of(wanted));
  switch (argument.kind) {
    case Kind::kCodes:
      check_codes(argument, tensor);
      break;
    case Kind::kGroupScales:
      check_group_scales(argument, tensor);
      break;
    case Kind::kRowScales:
      check_row_scales(argument, tensor);
      break;
    default:
      check_shape(argument, tensor);
  }
  if (argument.is_strided())
    take_strides(argument, tensor);
  else if (!tensor.is_contiguous())
    refuse(argument.name, "strides " + describe(strides_of(tensor)), "a contiguous tensor");
  put(argument, tensor);
}

void Operands::take_strides(const Argument& argument, const Tensor& tensor) {
  const Shape strides = strides_of(tensor);
  const size_t last = argument.strides.size();
  if (tensor.size(static_cast<int64_t>(last)) > 1 && strides[last] != 1)
    refuse(argument.name, "strides " + describe(strides), "a last dimension that is contiguous");
  for (size_t i = 0; i < last; ++i) at<int64_t>(argument.strides[i]) = strides[i];
}

void Operands::check_place(const Argument& argument, const Tensor& tensor) const {
  const bool here = device_ == Device::kCpu ? tensor.is_cpu()
                                            : tensor.is_cuda() && tensor.get_device_index() ==
                                                                      first_->get_device_index();
  if (here) return;
  std::string wanted = "cpu";
  if (device_ == Device::kCuda) wanted = first_->is_cuda() ? place_of(*first_) : "cuda";
  refuse(argument.name, "a tensor on " + place_of(tensor), "one on " + wanted);
}

// The dtype of the call is that of the first tensor of numbers.
ScalarType Operands::wanted_type(const Argument& argument, const Tensor& tensor) {
  if (argument.content == Content::kScales) return tensor.scalar_type();  // its format decides
  if (argument.content != Content::kNumbers) return type_of(argument.content);
  if (numbers_ == ScalarType::Undefined) {
    const ScalarType got = tensor.scalar_type();
    if (got != ScalarType::Float && got != ScalarType::BFloat16)
      refuse(argument.name, name_of(got), "torch.float32 or torch.bfloat16");
    numbers_ = got;
    at<dgemma_dtype>(op_.operation.dtype) =
        got == ScalarType::Float ? DGEMMA_FLOAT32 : DGEMMA_BFLOAT16;
  }
  return numbers_;
}

void Operands::check_shape(const Argument& argument, const Tensor& tensor) {
  if (argument.any_shape) {
    if (any_shape_ != &tensor && shape_of(tensor) != shape_of(*any_shape_))
      refuse(argument.name, "shape " + describe(shape_of(tensor)), describe(shape_of(*any_shape_)));
    return;
  }
  const auto sizes = tensor.sizes();
  for (size_t d = 0; d < argument.dimensions; ++d) {
    const Extent& extent = argument.extents[d];
    const int64_t wanted = value(extent);
    if (wanted != kAnyExtent && sizes[d] != wanted)
      refuse(argument.name, "shape " + describe(shape_of(tensor)),
             describe(wanted_shape(argument)));
    if (sizes[d] < extent.least)
      refuse(argument.name, "shape " + describe(shape_of(tensor)),
             std::string("at least one of ") + extent.field.name);
    if (extent.multiple_of.exists()) {
      const int64_t divisor = at<int64_t>(extent.multiple_of);
      if (divisor > 0 && sizes[d] % divisor != 0)
        refuse(argument.name, std::to_string(sizes[d]) + " " + extent.field.name,
               "a multiple of the " + std::to_string(divisor) + " " + extent.multiple_of.name);
    }
  }
}

void Operands::put(const Argument& argument, const Tensor& tensor) {
  if (argument.kind != Kind::kTensor) return;
  if (argument.field.written)
    at<void*>(argument.field) = tensor.mutable_data_ptr();
  else
    at<const void*>(argument.field) = tensor.const_data_ptr();
}

ScalarType Operands::output_type(const Argument& argument) const {
  return argument.content == Content::kNumbers ? numbers_ : type_of(argument.content);
}

// What torch throws here has lost its type, and before 2.13 its words too, so the size that was
// wanted is told. Python makes a torch.OutOfMemoryError of it (ops/operators.py).
Tensor Operands::new_tensor(const char* name, const Shape& shape, ScalarType type,
                            bool zeroed) const {
  try {
    return zeroed ? torch::stable::new_zeros(*first_, shape, type)
                  : torch::stable::new_empty(*first_, shape, type);
  } catch (const std::exception& error) {
    double bytes = bytes_of(type);
    for (const int64_t extent : shape) bytes *= static_cast<double>(extent);
    throw std::runtime_error(std::string("dgemma::") + op_.name + " failed: no memory of " +
                             std::to_string(static_cast<uint64_t>(bytes)) + " bytes for " + name +
                             ": " + error.what());
  }
}

void Operands::make_outputs() {
  for (size_t i = op_.arguments.size(); i < tensors(); ++i) {
    if (tensors_[i].has_value()) continue;
    const Argument& described = argument(i);
    const Shape shape = described.any_shape ? shape_of(*any_shape_) : wanted_shape(described);
    tensors_[i].emplace(new_tensor(described.name, shape, output_type(described), op_.zeroed));
    put(described, *tensors_[i]);
  }
}

void Operands::provide_workspace(size_t bytes) {
  const Field field = op_.operation.workspace;
  if (!field.exists()) return;
  if (workspace_.has_value()) {
    const Argument described = {.name = "workspace", .content = Content::kBytes};
    const Tensor& tensor = *workspace_;
    check_place(described, tensor);
    if (tensor.dim() != 1 || tensor.scalar_type() != ScalarType::Byte)
      refuse("workspace",
             "shape " + describe(shape_of(tensor)) + " of " + name_of(tensor.scalar_type()),
             "one dimension of torch.uint8");
    if (!tensor.is_contiguous()) refuse("workspace", "strides", "a contiguous tensor");
    if (static_cast<size_t>(tensor.numel()) < bytes)
      refuse("workspace", std::to_string(tensor.numel()) + " bytes",
             "at least " + std::to_string(bytes));
  } else if (bytes > 0) {
    workspace_.emplace(
        new_tensor("workspace", {static_cast<int64_t>(bytes)}, ScalarType::Byte, false));
  } else {
    return;
  }
  at<void*>(field) = workspace_->mutable_data_ptr();
  at<size_t>(op_.operation.workspace_bytes) = static_cast<size_t>(workspace_->numel());
}

void Operands::give_back(StableIValue* stack) const {
  for (size_t i = 0; i < op_.outputs.size(); ++i)
    stack[i] = from(*tensors_[op_.arguments.size() + i]);
}

}  // namespace dgemma
