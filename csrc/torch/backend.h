// Where an operator's call runs: on the CPU with torch's threads, or on the tensors' GPU in torch's
// stream. The dispatcher has chosen which by the tensors' device.
#pragma once

#include <atomic>
#include <stdexcept>
#include <string>

#include "dgemma/base.h"
#include "torch/operands.h"

namespace dgemma {

// The variant that the environment variable DGEMMA_CPU names, or the best. Throws
// std::invalid_argument, with the choices, for a name that is unknown or not available.
dgemma_cpu_variant cpu_variant_from_environment();

// Throws unless the call returned DGEMMA_OK: std::invalid_argument where what was asked for is at
// fault, "dgemma::op: argument: ...", and std::runtime_error where the call failed,
// "dgemma::op failed: ...". torch before 2.13 makes a RuntimeError of both, so Python tells them
// apart by these words (ops/operators.py).
inline void check_status(const char* op, dgemma_status status, const char* message) {
  if (status == DGEMMA_OK) return;
  const std::string name = std::string("dgemma::") + op;
  if (status == DGEMMA_CUDA_ERROR) throw std::runtime_error(name + " failed: " + message);
  throw std::invalid_argument(name + ": " + message);
}

// On the CPU: torch's threads, the variant of the environment.
class OnCpu {
 public:
  static constexpr Device kDevice = Device::kCpu;
  static constexpr Entry Operator::* kEntry = &Operator::cpu;

  // The tensor is one of the op's arguments.
  OnCpu(const char* op, const Tensor& /*tensor*/) : op_(op) {
    cpu_.parallel_for = &OnCpu::parallel_for;
    cpu_.pool = nullptr;
    cpu_.variant = chosen_variant(op);
    cpu_.message[0] = '\0';
  }

  void run(const Entry& entry, const void* operation) {
    check_status(op_, entry.run(operation, &cpu_), cpu_.message);
  }

 private:
  static dgemma_cpu_variant chosen_variant(const char* op) {
    try {
      return cpu_variant_from_environment();
    } catch (const std::invalid_argument& refusal) {
      check_status(op, DGEMMA_INVALID_ARGUMENT, refusal.what());
      throw;
    }
  }

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
// A report of the test bed is longer than the C interface has room for: this is the last one,
// whole.
extern "C" const char* sim_last_error();
// Takes the stream of the calls that follow: a launch in another is refused.
extern "C" void* sim_set_stream(void* stream);

// The CUDA kernels on the host: the suite's build (cmake/Sim.cmake) hands tensors of the CPU to
// them.
class OnCuda {
 public:
  static constexpr Device kDevice = Device::kCpu;
  static constexpr Entry Operator::* kEntry = &Operator::cuda;

  // No stream is here; any number but the default stream's.
  OnCuda(const char* op, const Tensor& /*tensor*/)
      : op_(op), cuda_{.stream = sim_set_stream(reinterpret_cast<void*>(1)), .message = {}} {}

  void run(const Entry& entry, const void* operation) {
    const dgemma_status status = entry.run(operation, &cuda_);
    check_status(op_, status, status == DGEMMA_CUDA_ERROR ? sim_last_error() : cuda_.message);
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
  static constexpr Entry Operator::* kEntry = &Operator::cuda;

  OnCuda(const char* op, const Tensor& tensor);

  // Nothing waits for the kernels, so a later call reports a kernel that fails. With DGEMMA_SYNC=1
  // in the environment every operator waits for its own, and the message names the right one.
  void run(const Entry& entry, const void* operation);

 private:
  const char* op_;
  torch::stable::accelerator::DeviceGuard guard_;
  dgemma_cuda cuda_;
};
#endif

}  // namespace dgemma
