#include "torch/backend.h"

#if defined(DGEMMA_WITH_CUDA) && !defined(DGEMMA_SIM)
#include <dlfcn.h>

#include <cstdlib>
#include <cstring>

#include "cuda/entry.h"

namespace dgemma {
namespace {

using CurrentStream = AOTITorchError (*)(int32_t device_index, void** stream);

// The one function of the stable interface that a CPU-only torch lacks. It is looked up in the
// library that torch has loaded, so that this module needs no symbol of CUDA's to load.
CurrentStream find_current_stream() {
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  if (library == nullptr) return nullptr;
  return reinterpret_cast<CurrentStream>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
}

void* current_stream(const char* op, int32_t device_index) {
  static const CurrentStream find = find_current_stream();
  void* stream = nullptr;
  if (find == nullptr || find(device_index, &stream) != AOTI_TORCH_SUCCESS)
    throw std::runtime_error(std::string("dgemma::") + op +
                             ": this torch does not tell its CUDA stream");
  return stream;
}

bool waits_for_kernels() {
  const char* value = std::getenv("DGEMMA_SYNC");
  return value != nullptr && *value != '\0' && std::strcmp(value, "0") != 0;
}

}  // namespace

OnCuda::OnCuda(const char* op, const Tensor& tensor) : op_(op), guard_(tensor.get_device_index()) {
  cuda_.stream = current_stream(op, tensor.get_device_index());
  cuda_.message[0] = '\0';
}

void OnCuda::run(const Entry& entry, const void* operation) {
  const bool waits = waits_for_kernels();
  dgemma_status status = entry.run(operation, &cuda_);
  if (status == DGEMMA_OK && waits) status = wait_for_stream(&cuda_);
  if (status == DGEMMA_CUDA_ERROR && !waits)
    throw std::runtime_error(std::string("dgemma::") + op_ + " failed: " + cuda_.message +
                             " (possibly of an earlier operator: DGEMMA_SYNC=1 tells which)");
  check_status(op_, status, cuda_.message);
}

}  // namespace dgemma
#endif
