// The conformance table: what each device wrapper does, as small kernels with inputs and the
// results that are claimed. The same sources run on the host (the suite runs them in the test bed)
// and on a GPU:
//
//   nvcc -std=c++20 -gencode arch=compute_90a,code=sm_90a -Icsrc tests/sim/conformance/*.cu -o
//   conformance && ./conformance
//
// Results are computed here plainly, from the definition, and not by the test bed. Inputs are small
// whole numbers, so that products and sums are exact and results are compared bit for bit, where
// nothing else is said.
#pragma once

#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>
#ifdef DGEMMA_SIM
#include <algorithm>
#include <new>
#endif

#include "device/bfloat16.h"
#include "device/launch.h"

namespace conformance {

struct Case {
  const char* name;
  int architecture;      // compute capability that it needs: 80 or 90
  std::string (*run)();  // what is wrong; empty where nothing is
};

std::vector<Case> warp_cases();
std::vector<Case> copy_cases();
std::vector<Case> tensor_copy_cases();
std::vector<Case> wgmma_cases();

// Memory that kernels see: in the test bed the host's, else the device's, copied back after the
// launch.
template <typename T>
class Buffer {
 public:
  explicit Buffer(std::vector<T> values);
  explicit Buffer(size_t count) : Buffer(std::vector<T>(count)) {}
  ~Buffer();
  Buffer(const Buffer&) = delete;
  T* device() const { return device_; }
  std::vector<T>& fetch();  // waits for what runs

 private:
  std::vector<T> host_;
  T* device_;
};

#ifdef DGEMMA_SIM
inline std::string finish() { return {}; }
template <typename T>
Buffer<T>::Buffer(std::vector<T> values) : host_(std::move(values)) {
  // The alignment of cudaMalloc.
  device_ = static_cast<T*>(::operator new(host_.size() * sizeof(T), std::align_val_t(256)));
  std::copy(host_.begin(), host_.end(), device_);
}
template <typename T>
Buffer<T>::~Buffer() {
  ::operator delete(device_, std::align_val_t(256));
}
template <typename T>
std::vector<T>& Buffer<T>::fetch() {
  std::copy(device_, device_ + host_.size(), host_.begin());
  return host_;
}
#else
inline std::string finish() {
  const cudaError_t error = cudaDeviceSynchronize();
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}
template <typename T>
Buffer<T>::Buffer(std::vector<T> values) : host_(std::move(values)) {
  device_ = nullptr;
  cudaMalloc(&device_, host_.size() * sizeof(T));
  cudaMemcpy(device_, host_.data(), host_.size() * sizeof(T), cudaMemcpyHostToDevice);
}
template <typename T>
Buffer<T>::~Buffer() {
  cudaFree(device_);
}
template <typename T>
std::vector<T>& Buffer<T>::fetch() {
  cudaMemcpy(host_.data(), device_, host_.size() * sizeof(T), cudaMemcpyDeviceToHost);
  return host_;
}
#endif

// Runs a kernel on one block, or one cluster, and waits. Empty, or the error's text.
template <typename... Parameters, typename... Arguments>
std::string run(uint32_t threads, uint32_t shared_bytes, uint32_t cluster_blocks,
                void (*kernel)(Parameters...), const Arguments&... arguments) {
  dgemma::device::LaunchShape shape;
  shape.grid = dim3(cluster_blocks);
  shape.threads = threads;
  shape.shared_bytes = shared_bytes;
  shape.cluster_blocks = cluster_blocks;
  if (const char* problem = dgemma::device::launch(shape, nullptr, kernel, arguments...))
    return problem;
  return finish();
}

// The first difference, or empty.
template <typename T>
std::string compare(const char* what, const std::vector<T>& got, const std::vector<T>& wanted) {
  for (size_t i = 0; i < wanted.size(); ++i) {
    if (got.size() == wanted.size() && got[i] == wanted[i]) continue;
    char text[200];
    std::snprintf(text, sizeof text, "%s: element %zu of %zu is %.9g, wanted %.9g", what, i,
                  wanted.size(), i < got.size() ? static_cast<double>(got[i]) : 0.0,
                  static_cast<double>(wanted[i]));
    return text;
  }
  return {};
}

// Whole numbers from -4 to 4, different for every seed: exact in bfloat16.
inline std::vector<float> small_numbers(size_t count, uint32_t seed) {
  std::vector<float> numbers(count);
  uint32_t state = seed * 2654435761u + 12345;
  for (float& number : numbers) {
    state = state * 1664525u + 1013904223u;
    number = static_cast<float>(static_cast<int>((state >> 16) % 9) - 4);
  }
  return numbers;
}

// Such a number as e4m3.
inline uint8_t e4m3_bits(float whole_number) {
  static constexpr uint8_t kMagnitudes[5] = {0x00, 0x38, 0x40, 0x44, 0x48};
  const int number = static_cast<int>(whole_number);
  return static_cast<uint8_t>(number < 0 ? kMagnitudes[-number] | 0x80 : kMagnitudes[number]);
}

inline uint16_t bfloat16_bits(float whole_number) {
  uint32_t bits;
  static_assert(sizeof bits == sizeof whole_number);
  __builtin_memcpy(&bits, &whole_number, sizeof bits);
  return static_cast<uint16_t>(bits >> 16);
}

}  // namespace conformance
