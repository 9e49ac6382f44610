// The kernels of sm80/w8a8_down.h for e4m3, on 8.9 and 12.0.
#include "grouped_gemm/cuda/fp8.h"
#include "grouped_gemm/sm80/w8a8_down.h"

namespace dgemma {

const char* launch_down_sm89_fp8(const MoeCudaPlan& plan, const MoeQuantizedPass& pass,
                                 void* stream) {
  return launch_down<Encoding::kFp8Activations>(plan, pass, stream);
}

}  // namespace dgemma
