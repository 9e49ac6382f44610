// The tensors and numbers of one call: checked against the operator's description, and put into the
// struct that the C interface takes. Nothing is read or written before all of them were checked.
//
// Every refusal is a std::invalid_argument that names the operator, the argument, what it got and
// what it wants. Python makes a ValueError of it (ops/operators.py).
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <optional>
#include <string>
#include <vector>

#include "torch/operator.h"

namespace dgemma {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Shape = std::vector<int64_t>;

enum class Device { kCpu, kCuda };

class Operands {
 public:
  Operands(const Operator& op, Device device) : op_(op), device_(device) {}

  // Takes the arguments off the stack, in the order of the schema; `given` is the form `out`.
  void take(StableIValue* stack, bool given);

  // Checks everything that was taken and fills the struct but for what is made anew.
  void check();

  // Makes what was not given. `bytes` of workspace are wanted.
  void make_outputs();
  void provide_workspace(size_t bytes);

  // Puts the outputs that were made onto the stack.
  void give_back(StableIValue* stack) const;

  const void* operation() const { return operation_; }
  // A tensor that stands for the place of all.
  const Tensor& first() const { return *first_; }

 private:
  void take_number(const Argument& argument, StableIValue value);
  void find_extents(bool exactly);
  void check_number(const Argument& argument) const;
  void check_tensor(const Argument& argument, const Tensor& tensor);
  void check_place(const Argument& argument, const Tensor& tensor) const;
  void check_shape(const Argument& argument, const Tensor& tensor);
  void take_strides(const Argument& argument, const Tensor& tensor);
  ScalarType wanted_type(const Argument& argument, const Tensor& tensor);
  void put(const Argument& argument, const Tensor& tensor);
  // Of a quantized matrix (quantized.cpp).
  void check_format(const Argument& argument) const;
  void check_codes(const Argument& argument, const Tensor& tensor);
  void check_group_scales(const Argument& argument, const Tensor& tensor);
  void check_row_scales(const Argument& argument, const Tensor& tensor);
  dgemma_quantized& matrix(const Argument& argument);

  const Argument& argument(size_t index) const {
    const size_t inputs = op_.arguments.size();
    return index < inputs ? op_.arguments[index] : op_.outputs[index - inputs];
  }
  size_t tensors() const { return op_.arguments.size() + op_.outputs.size(); }
  Tensor new_tensor(const char* name, const Shape& shape, ScalarType type, bool zeroed) const;
  int64_t value(const Extent& extent) const;
  Shape wanted_shape(const Argument& argument) const;
  ScalarType output_type(const Argument& argument) const;

  template <typename T>
  T& at(Field field) {
    return *reinterpret_cast<T*>(operation_ + field.offset);
  }
  template <typename T>
  const T& at(Field field) const {
    return *reinterpret_cast<const T*>(operation_ + field.offset);
  }
  bool is_known(Field field) const;
  void learn(Field field, int64_t value);

  [[noreturn]] void refuse(const char* name, const std::string& got, const std::string& want) const;

  const Operator& op_;
  const Device device_;
  alignas(std::max_align_t) unsigned char operation_[kMostStructBytes] = {};
  // By the number of the argument, then of the output; the workspace comes last.
  std::array<std::optional<Tensor>, kMostArguments> tensors_ = {};
  const Tensor* first_ = nullptr;
  std::optional<Tensor> workspace_;
  // Offsets of the extents whose value is known.
  std::array<uint16_t, kMostArguments> known_ = {};
  size_t known_count_ = 0;
  ScalarType numbers_ = ScalarType::Undefined;
  // Of the tensors that may have any.
  const Tensor* any_shape_ = nullptr;
};

// As a message tells them.
std::string name_of(ScalarType type);
std::string describe(const Shape& shape);

}  // namespace dgemma
