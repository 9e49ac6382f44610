// The tensors of a call of the C interface, and the one check of them: the entry points of both
// devices make it for every function, after the sizes and the dtype, before anything is read.
//
// csrc/<family>/operands.h lists the tensors of each struct as its header describes them. What is
// written and how wide an element is follow from the field's type.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <initializer_list>
#include <span>
#include <type_traits>

#include "dgemma/base.h"

namespace dgemma {

struct Operand {
  const char* name;
  const void* pointer;
  uint64_t bytes;
  size_t alignment;       // on a CPU: its elements'
  size_t aligned_on_gpu;  // 16 where a kernel moves 16 bytes at a time
  bool written;
  bool may_be_null = false;
  bool must_be_null = false;
  bool looked_at = true;
  bool interleaved = false;

  Operand& optional() {
    may_be_null = true;
    return *this;
  }
  // Neither read nor written where the condition does not hold.
  Operand& only_if(bool condition) {
    looked_at = condition;
    return *this;
  }
  // Its rows and those of other such tensors may take turns in memory.
  Operand& may_interleave() {
    interleaved = true;
    return *this;
  }
  Operand& aligned_on_gpu_to(size_t wanted) {
    aligned_on_gpu = wanted;
    return *this;
  }
};

class OperandList {
 public:
  // `dtype` is that of tensors whose field is a pointer to void; it and all sizes were checked.
  explicit OperandList(dgemma_dtype dtype = DGEMMA_FLOAT32)
      : element_(dtype == DGEMMA_BFLOAT16 ? 2 : 4) {}

  template <typename T>
  Operand& add(const char* name, T* pointer, std::initializer_list<int64_t> shape) {
    constexpr bool numbers = std::is_void_v<T>;
    size_t element = element_;
    if constexpr (!numbers) element = sizeof(T);
    return add_bytes(name, pointer, element, shape, !std::is_const_v<T>, numbers ? 16 : element);
  }

  // Rows of `row` elements, which lie apart by strides of elements. The sizes and strides were
  // checked not to be negative.
  template <typename T>
  Operand& add_strided(const char* name, T* pointer, std::initializer_list<int64_t> shape,
                       std::initializer_list<int64_t> strides, int64_t row) {
    uint64_t elements = static_cast<uint64_t>(row);  // from the first to the last
    const int64_t* stride = strides.begin();
    bool none = row == 0;
    for (const int64_t extent : shape) {
      uint64_t step = 0;
      none = none || extent == 0;
      if (none) continue;
      if (__builtin_mul_overflow(static_cast<uint64_t>(extent - 1),
                                 static_cast<uint64_t>(*stride++), &step) ||
          __builtin_add_overflow(elements, step, &elements) || elements > INT64_MAX)
        elements = INT64_MAX;
    }
    return add(name, pointer, {none ? 0 : static_cast<int64_t>(elements)});
  }

  // A part of a quantized matrix, whose elements the format tells.
  Operand& add_part(const char* name, const void* pointer, size_t element,
                    std::initializer_list<int64_t> shape, size_t aligned_on_gpu) {
    return add_bytes(name, pointer, element, shape, false, aligned_on_gpu);
  }

  // A weight that quantized ones take the place of.
  void add_absent(const char* name, const void* pointer) {
    add_bytes(name, pointer, 1, {0}, false, 1).must_be_null = true;
  }

  std::span<const Operand> all() const { return {operands_.data(), count_}; }

 private:
  // Of update_canvas and constrain, which have the most.
  static constexpr size_t kMost = 24;

  Operand& add_bytes(const char* name, const void* pointer, size_t element,
                     std::initializer_list<int64_t> shape, bool written, size_t aligned_on_gpu) {
    uint64_t bytes = element;
    for (const int64_t extent : shape)
      if (__builtin_mul_overflow(bytes, static_cast<uint64_t>(extent), &bytes)) bytes = UINT64_MAX;
    for (const int64_t extent : shape)
      if (extent == 0) bytes = 0;
    return operands_[count_++] = {name, pointer, bytes, element, aligned_on_gpu, written};
  }

  size_t element_;
  size_t count_ = 0;
  std::array<Operand, kMost> operands_;
};

enum class Memory : uint8_t { kCpu, kGpu };

// Where a message goes: "argument: got this, wants that".
struct Message {
  char* text;
  size_t bytes;
};

inline bool overlap(const void* pointer, uint64_t bytes, const Operand& other) {
  if (!other.looked_at || other.pointer == nullptr || bytes == 0 || other.bytes == 0) return false;
  const auto first = reinterpret_cast<uintptr_t>(pointer);
  const auto second = reinterpret_cast<uintptr_t>(other.pointer);
  return first < second ? second - first < bytes : first - second < other.bytes;
}

inline dgemma_status check_operand(const Operand& operand, Memory memory, Message message) {
  const auto [name, pointer, bytes, on_cpu, on_gpu, written, may_be_null, must_be_null, looked_at,
              interleaved] = operand;
  const auto refuse = [&](const char* format, auto... values) {
    std::snprintf(message.text, message.bytes, format, name, values...);
    return DGEMMA_INVALID_ARGUMENT;
  };
  if (must_be_null)
    return pointer == nullptr ? DGEMMA_OK
                              : refuse("%s: got a pointer, wants NULL beside quantized weights");
  if (!looked_at || bytes == 0) return DGEMMA_OK;
  if (pointer == nullptr) return may_be_null ? DGEMMA_OK : refuse("%s: got NULL, wants a pointer");
  const size_t alignment = memory == Memory::kCpu ? on_cpu : on_gpu;
  if (reinterpret_cast<uintptr_t>(pointer) % alignment != 0)
    return refuse("%s: got %p, wants a multiple of %zu bytes", pointer, alignment);
  if (bytes > UINTPTR_MAX - reinterpret_cast<uintptr_t>(pointer))
    return refuse("%s: got more bytes than there are addresses, wants less");
  return DGEMMA_OK;
}

// NULL where there must be a tensor, a misaligned pointer, or an output that overlaps another
// tensor.
inline dgemma_status check_operands(const OperandList& list, Memory memory, Message message) {
  for (const Operand& operand : list.all())
    if (const auto status = check_operand(operand, memory, message)) return status;
  for (const Operand& output : list.all())
    for (const Operand& other : list.all()) {
      if (!output.written || !output.looked_at || &output == &other || output.pointer == nullptr ||
          (output.interleaved && other.interleaved) ||
          !overlap(output.pointer, output.bytes, other))
        continue;
      std::snprintf(message.text, message.bytes,
                    "%s: got %p, which overlaps %s, wants memory of its own", output.name,
                    output.pointer, other.name);
      return DGEMMA_INVALID_ARGUMENT;
    }
  return DGEMMA_OK;
}

// The same of a workspace of which a call uses `wanted` bytes; with 0 it is not looked at.
inline dgemma_status check_workspace(const OperandList& list, const void* workspace, size_t bytes,
                                     size_t wanted, size_t alignment, Message message) {
  const auto refuse = [&](dgemma_status status, const char* format, auto... values) {
    std::snprintf(message.text, message.bytes, format, values...);
    return status;
  };
  if (wanted == 0) return DGEMMA_OK;
  if (workspace == nullptr)
    return refuse(DGEMMA_INVALID_ARGUMENT, "workspace: got NULL, wants %zu bytes", wanted);
  if (reinterpret_cast<uintptr_t>(workspace) % alignment != 0)
    return refuse(DGEMMA_INVALID_ARGUMENT, "workspace: got %p, wants a multiple of %zu bytes",
                  workspace, alignment);
  if (bytes < wanted)
    return refuse(DGEMMA_WORKSPACE_TOO_SMALL, "workspace_bytes: got %zu, wants at least %zu", bytes,
                  wanted);
  for (const Operand& operand : list.all())
    if (overlap(workspace, wanted, operand))
      return refuse(DGEMMA_INVALID_ARGUMENT,
                    "workspace: got %p, which overlaps %s, wants memory of its own", workspace,
                    operand.name);
  return DGEMMA_OK;
}

}  // namespace dgemma
