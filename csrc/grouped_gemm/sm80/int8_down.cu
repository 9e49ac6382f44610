// The kernels of sm80/w8a8_down.h for int8, on every GPU.
#include "grouped_gemm/sm80/w8a8_down.h"

namespace dgemma {

const char* launch_down_sm80_int8(const MoeCudaPlan& plan, const MoeQuantizedPass& pass,
                                  void* stream) {
  return launch_down<Encoding::kInt8>(plan, pass, stream);
}

}  // namespace dgemma
