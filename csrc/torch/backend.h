// Where an operator's call runs. A binding is written once, as a template over one of these; the
// dispatcher has chosen which by the tensors' device.
#pragma once

#include <atomic>
#include <stdexcept>
#include <string>

#include "dgemma/base.h"
#include "torch/tensors.h"

namespace dgemma {

// The variant that the environment variable DGEMMA_CPU names, or the best. Throws
// std::invalid_argument, with the choices, for a name that is unknown or not available.
dgemma_cpu_variant cpu_variant_from_environment();

// Throws unless the call returned DGEMMA_OK: std::invalid_argument where an argument was at fault.
inline void check_status(const char* op, dgemma_status status, const char* message) {
  if (status == DGEMMA_OK) return;
  const std::string text = std::string("dgemma::") + op + ": " + message;
  if (status == DGEMMA_INVALID_ARGUMENT) throw std::invalid_argument(text);
  throw std::runtime_error(text);
}

// On the CPU: torch's threads, the variant of the environment.
class OnCpu {
 public:
  static constexpr Device kDevice = Device::kCpu;

  // The tensor is one of the op's arguments.
  OnCpu(const char* op, const Tensor& /*tensor*/) : op_(op) {
    cpu_.parallel_for = &OnCpu::parallel_for;
    cpu_.pool = nullptr;
    cpu_.variant = cpu_variant_from_environment();
    cpu_.message[0] = '\0';
  }

  template <typename Op>
  void run(dgemma_status (*entry)(const Op*, dgemma_cpu*), const Op& op) {
    check_status(op_, entry(&op, &cpu_), cpu_.message);
  }

 private:
  // Every thread takes the next task when it is done with one, so that tasks of unequal size, or a
  // core that another process keeps busy, do not hold up the rest. Inside a parallel region torch
  // runs the one range that it is given in the calling thread.
  static void parallel_for(void* /*pool*/, int64_t tasks, void (*task)(void*, int64_t),
                           void* state) {
    const int64_t threads = torch::stable::get_num_threads();
    std::atomic<int64_t> next{0};
    torch::stable::parallel_for(0, tasks < threads ? tasks : threads, 1, [&](int64_t, int64_t) {
      for (int64_t i = next++; i < tasks; i = next++) task(state, i);
    });
  }

  const char* op_;
  dgemma_cpu cpu_;
};

#if defined(DGEMMA_SIM)
// The CUDA kernels on the host: the suite's build (cmake/Sim.cmake) hands tensors of the CPU to
// them.
class OnCuda {
 public:
  static constexpr Device kDevice = Device::kCpu;

  OnCuda(const char* op, const Tensor& /*tensor*/) : op_(op), cuda_{} {}

  template <typename Op>
  void run(dgemma_status (*entry)(const Op*, dgemma_cuda*), const Op& op) {
    check_status(op_, entry(&op, &cuda_), cuda_.message);
  }

 private:
  const char* op_;
  dgemma_cuda cuda_;
};
#elif defined(DGEMMA_WITH_CUDA)
// On the tensors' GPU, in the stream that is torch's current one there.
class OnCuda {
 public:
  static constexpr Device kDevice = Device::kCuda;

  OnCuda(const char* op, const Tensor& tensor);

  template <typename Op>
  void run(dgemma_status (*entry)(const Op*, dgemma_cuda*), const Op& op) {
    finish(entry(&op, &cuda_));
  }

 private:
  // Nothing waits for the kernels, so what fails in one is told by a later call. With DGEMMA_SYNC=1
  // in the environment every operator waits for its own, and the message names the right one.
  void finish(dgemma_status status);

  const char* op_;
  torch::stable::accelerator::DeviceGuard guard_;
  dgemma_cuda cuda_;
};
#endif

// Registers a family's operators: `implement` is a function template over a backend that takes the
// library, `Cpu` and `Cuda` are its backends.
#if defined(DGEMMA_SIM)
#define DGEMMA_REGISTER(implement, Cpu, Cuda) \
  STABLE_TORCH_LIBRARY_IMPL(dgemma, CPU, library) { implement<Cuda>(library); }
#elif defined(DGEMMA_WITH_CUDA)
#define DGEMMA_REGISTER(implement, Cpu, Cuda)                                  \
  STABLE_TORCH_LIBRARY_IMPL(dgemma, CPU, library) { implement<Cpu>(library); } \
  STABLE_TORCH_LIBRARY_IMPL(dgemma, CUDA, library) { implement<Cuda>(library); }
#else
#define DGEMMA_REGISTER(implement, Cpu, Cuda) \
  STABLE_TORCH_LIBRARY_IMPL(dgemma, CPU, library) { implement<Cpu>(library); }
#endif

// Which of the two a question about workspace is asked of, for tensors on a GPU or not.
#if defined(DGEMMA_SIM)
constexpr bool served_by_cuda(bool /*on_gpu*/) { return true; }
#else
constexpr bool served_by_cuda(bool on_gpu) { return on_gpu; }
#endif

}  // namespace dgemma
