#include <cstdarg>
#include <cstdio>

#include "cuda/entry.h"
#include "device/properties.h"

namespace dgemma {

dgemma_status fail(dgemma_cuda* cuda, dgemma_status status, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(cuda->message, sizeof cuda->message, format, arguments);
  va_end(arguments);
  return status;
}

dgemma_status find_gpu(Gpu* gpu, dgemma_cuda* cuda) {
  device::Properties properties = {};
  if (const char* error = device::get_properties(&properties))
    return fail(cuda, DGEMMA_CUDA_ERROR, "%s", error);
  const int32_t capability = properties.compute_capability;
  if (capability < 80)
    return fail(cuda, DGEMMA_UNSUPPORTED,
                "this GPU has compute capability %d.%d, wants 8.0 or later", capability / 10,
                capability % 10);
#if defined(DGEMMA_WITH_SM90)
  const CudaPath path = capability == 90 ? CudaPath::kSm90 : CudaPath::kSm80;
#else
  const CudaPath path = CudaPath::kSm80;
#endif
  *gpu = {path, capability, properties.multiprocessors};
  return DGEMMA_OK;
}

dgemma_status launched(const char* error, dgemma_cuda* cuda) {
  return error == nullptr ? DGEMMA_OK : fail(cuda, DGEMMA_CUDA_ERROR, "%s", error);
}

dgemma_status wait_for_stream(dgemma_cuda* cuda) {
  return launched(device::synchronize(cuda->stream), cuda);
}

}  // namespace dgemma
