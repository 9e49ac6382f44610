// The CPU entry points of every family share these: error messages, the cutting of a workspace into
// parts, and the spreading of tasks over the host's threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>

#include "common/operands.h"
#include "dgemma/base.h"

namespace dgemma {

// The alignment of the workspace and of each part of it: a cache line, and the widest vector.
constexpr size_t kAlignment = 64;

// Writes the message ("argument: got this, wants that") and returns the status.
__attribute__((format(printf, 3, 4))) dgemma_status fail(dgemma_cpu* cpu, dgemma_status status,
                                                         const char* format, ...);

// A NULL struct: a status, and a message where there is a context to hold it. The first check of
// all.
dgemma_status check_call(const void* op, dgemma_cpu* cpu);

// No single extent may be larger, so that products of two are exact.
constexpr int64_t kLargestSize = INT32_MAX;

struct SizeArgument {
  const char* name;
  int64_t value;
  int64_t least;
  int64_t most = kLargestSize;
};
dgemma_status check_sizes(std::initializer_list<SizeArgument> sizes, dgemma_cpu* cpu);

// float32 or bfloat16, else DGEMMA_UNSUPPORTED.
dgemma_status check_dtype(dgemma_dtype dtype, dgemma_cpu* cpu);

constexpr size_t bytes_of(dgemma_dtype dtype) { return dtype == DGEMMA_BFLOAT16 ? 2 : 4; }

// The tensors of a call and its workspace (common/operands.h).
inline dgemma_status check_operands(const OperandList& operands, dgemma_cpu* cpu) {
  return check_operands(operands, Memory::kCpu, {cpu->message, sizeof cpu->message});
}
inline dgemma_status check_workspace(const OperandList& operands, const void* workspace,
                                     size_t bytes, size_t wanted, dgemma_cpu* cpu) {
  return check_workspace(operands, workspace, bytes, wanted, kAlignment,
                         {cpu->message, sizeof cpu->message});
}

// Cuts a workspace into parts; without a base only the size is counted.
struct Carver {
  char* base;
  size_t used = 0;

  template <typename T>
  T* take(int64_t count) {
    T* part = base != nullptr ? reinterpret_cast<T*>(base + used) : nullptr;
    used += (static_cast<size_t>(count) * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    return part;
  }
};

// Calls task(i) for every i in [0, tasks) on the host's threads.
template <typename Task>
void run_tasks(dgemma_cpu* cpu, int64_t tasks, const Task& task) {
  if (cpu->parallel_for == nullptr || tasks < 2) {
    for (int64_t i = 0; i < tasks; ++i) task(i);
    return;
  }
  cpu->parallel_for(
      cpu->pool, tasks,
      [](void* state, int64_t index) { (*static_cast<const Task*>(state))(index); },
      const_cast<void*>(static_cast<const void*>(&task)));
}

}  // namespace dgemma
