#include "torch/workspace.h"

#include <cstddef>
#include <cstring>
#include <stdexcept>

#include "torch/registration.h"

namespace dgemma {
namespace {

const Operator& find_operator(const std::string& name) {
  for (const Operator* op : operators())
    if (name == op->name) return *op;
  throw std::invalid_argument("operator: got " + name + ", wants one of torch.ops.dgemma");
}

// A struct whose extents and numbers are set by name.
class Sizes {
 public:
  template <typename T>
  void put(Field field, T value) {
    std::memcpy(operation_ + field.offset, &value, sizeof value);
  }
  void put_format(Field field, int64_t format);
  bool put_named(const Argument& argument, const std::string& name, int64_t value);
  const void* operation() const { return operation_; }

 private:
  alignas(std::max_align_t) unsigned char operation_[kMostStructBytes] = {};
};

// A matrix of the format: no group changes the size of a workspace.
void Sizes::put_format(Field field, int64_t format) {
  dgemma_quantized matrix = {};
  matrix.format = static_cast<dgemma_weight_format>(format);
  matrix.scale_dtype = DGEMMA_BFLOAT16;
  switch (matrix.format) {
    case DGEMMA_WEIGHTS_FP8:
    case DGEMMA_WEIGHTS_INT8:
      matrix.group = 0;
      break;
    case DGEMMA_WEIGHTS_INT4:
      matrix.group = 32;
      break;
    case DGEMMA_WEIGHTS_NVFP4:
      matrix.group = 16;
      break;
    default:
      throw std::invalid_argument("format: got " + std::to_string(format) + ", wants 1, 2, 3 or 4");
  }
  put(field, matrix);
}

bool Sizes::put_named(const Argument& argument, const std::string& name, int64_t value) {
  bool found = name == argument.name;
  if (found && argument.kind == Kind::kFormat)
    put_format(argument.field, value);
  else if (found && argument.kind == Kind::kNumber)
    put(argument.field, value);
  else if (found)
    put(argument.field, static_cast<const void*>(value != 0 ? operation_ : nullptr));
  for (const Extent& extent : argument.shape()) {
    if (!extent.field.exists() || name != extent.field.name) continue;
    put(extent.field, value);
    found = true;
  }
  return found;
}

}  // namespace

int64_t workspace_bytes(const std::string& name, bool bfloat16, bool cuda,
                        const std::map<std::string, int64_t>& sizes) {
  const Operator& op = find_operator(name);
#if defined(DGEMMA_SIM)
  cuda = true;
#endif
  const Entry& entry = cuda ? op.cuda : op.cpu;
  if (entry.workspace == nullptr) return 0;
  Sizes made;
  if (op.operation.dtype.exists())
    made.put(op.operation.dtype, bfloat16 ? DGEMMA_BFLOAT16 : DGEMMA_FLOAT32);
  for (const Argument& argument : op.arguments)
    if (argument.format != dgemma_weight_format{}) made.put_format(argument.field, argument.format);
  for (const auto& [size, value] : sizes) {
    bool found = false;
    for (const Argument& argument : op.arguments)
      found = made.put_named(argument, size, value) || found;
    if (!found)
      throw std::invalid_argument(name + ": got a size named " + size +
                                  ", wants those of its description");
  }
  return static_cast<int64_t>(entry.workspace(made.operation()));
}

}  // namespace dgemma
