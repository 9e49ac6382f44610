// From torch's tensors to the C interface's pointers, and from its status back to an error.
//
// Wrappers in Python have checked the caller's arguments and named them; what stands here keeps a
// raw call of an op (torch.ops.dgemma...) from reading out of bounds. Every error names the op, the
// argument, what it got and what it wants; a std::invalid_argument reaches Python as a ValueError.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "dgemma/base.h"

namespace dgemma {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// In a wanted shape: an extent that may be anything.
constexpr int64_t kAny = -1;
using Shape = std::vector<int64_t>;

template <typename T>
inline constexpr ScalarType kScalarType = ScalarType::Undefined;
template <>
inline constexpr ScalarType kScalarType<float> = ScalarType::Float;
template <>
inline constexpr ScalarType kScalarType<double> = ScalarType::Double;
template <>
inline constexpr ScalarType kScalarType<int32_t> = ScalarType::Int;
template <>
inline constexpr ScalarType kScalarType<int64_t> = ScalarType::Long;
template <>
inline constexpr ScalarType kScalarType<uint8_t> = ScalarType::Bool;  // a mask: one byte, 0 or 1

inline ScalarType scalar_type(dgemma_dtype dtype) {
  return dtype == DGEMMA_BFLOAT16 ? ScalarType::BFloat16 : ScalarType::Float;
}

inline std::string describe(const Shape& shape) {
  std::ostringstream text;
  text << "[";
  for (size_t i = 0; i < shape.size(); ++i) {
    if (i > 0) text << ", ";
    if (shape[i] == kAny)
      text << "any";
    else
      text << shape[i];
  }
  text << "]";
  return text.str();
}

enum class Device { kCpu, kCuda };

// The tensor arguments of one op. Every function checks device, dtype, shape and that the tensor is
// contiguous, and gives its data.
class Arguments {
 public:
  explicit Arguments(const char* op, Device device = Device::kCpu) : op_(op), device_(device) {}

  // The data type of a tensor that may be float32 or bfloat16.
  dgemma_dtype dtype(const Tensor& tensor, const char* name) const {
    const ScalarType got = tensor.scalar_type();
    if (got == ScalarType::Float) return DGEMMA_FLOAT32;
    if (got == ScalarType::BFloat16) return DGEMMA_BFLOAT16;
    fail(name, std::string("dtype ") + torch::headeronly::toString(got), "Float or BFloat16");
  }

  // The extent of one dimension, for a tensor of `dimensions` dimensions.
  int64_t size(const Tensor& tensor, const char* name, int64_t dimensions, int64_t index) const {
    if (tensor.dim() != dimensions)
      fail(name, std::to_string(tensor.dim()) + " dimensions", std::to_string(dimensions));
    return tensor.size(index);
  }

  // Data of a float32 or bfloat16 tensor.
  const void* in(const Tensor& tensor, const char* name, const Shape& shape,
                 dgemma_dtype dtype) const {
    check(tensor, name, shape, scalar_type(dtype));
    return tensor.const_data_ptr();
  }
  void* out(const Tensor& tensor, const char* name, const Shape& shape, dgemma_dtype dtype) const {
    check(tensor, name, shape, scalar_type(dtype));
    return tensor.mutable_data_ptr();
  }

  // Data of a tensor with a fixed element type: float, double, int32_t, int64_t, or uint8_t for a
  // bool tensor.
  template <typename T>
  const T* in(const Tensor& tensor, const char* name, const Shape& shape) const {
    check(tensor, name, shape, kScalarType<T>);
    return static_cast<const T*>(tensor.const_data_ptr());
  }
  template <typename T>
  T* out(const Tensor& tensor, const char* name, const Shape& shape) const {
    check(tensor, name, shape, kScalarType<T>);
    return static_cast<T*>(tensor.mutable_data_ptr());
  }

  // Data of a tensor of bytes (torch.uint8), or of a type that is named.
  const void* in_bytes(const Tensor& tensor, const char* name, const Shape& shape) const {
    return in_type(tensor, name, shape, ScalarType::Byte);
  }
  const void* in_type(const Tensor& tensor, const char* name, const Shape& shape,
                      ScalarType type) const {
    check(tensor, name, shape, type);
    return tensor.const_data_ptr();
  }

  // NULL where the tensor is not given.
  template <typename T>
  const T* in(const std::optional<Tensor>& tensor, const char* name, const Shape& shape) const {
    return tensor.has_value() ? in<T>(*tensor, name, shape) : nullptr;
  }

  // A workspace: a contiguous tensor of bytes (torch.uint8).
  void* workspace(const Tensor& tensor, size_t* bytes) const {
    check(tensor, "workspace", {kAny}, ScalarType::Byte);
    *bytes = static_cast<size_t>(tensor.numel());
    return tensor.mutable_data_ptr();
  }

  [[noreturn]] void fail(const char* name, const std::string& got, const std::string& want) const {
    throw std::invalid_argument(std::string("dgemma::") + op_ + ": " + name + ": got " + got +
                                ", wants " + want);
  }

 private:
  void check(const Tensor& tensor, const char* name, const Shape& shape, ScalarType dtype) const {
    if (device_ == Device::kCpu ? !tensor.is_cpu() : !tensor.is_cuda())
      fail(name, "a tensor on another device",
           device_ == Device::kCpu ? "one on the CPU" : "one on the GPU");
    if (tensor.scalar_type() != dtype)
      fail(name, std::string("dtype ") + torch::headeronly::toString(tensor.scalar_type()),
           torch::headeronly::toString(dtype));
    const auto sizes = tensor.sizes();
    const Shape got(sizes.begin(), sizes.end());
    bool matches = got.size() == shape.size();
    for (size_t i = 0; matches && i < shape.size(); ++i)
      matches = shape[i] == kAny || shape[i] == got[i];
    if (!matches) fail(name, "shape " + describe(got), describe(shape));
    if (!tensor.is_contiguous()) fail(name, "strides of another layout", "a contiguous tensor");
  }

  const char* op_;
  Device device_;
};

}  // namespace dgemma
