// The kernels of sm80/w8a8_gate_up.h for e4m3, on 8.9 and 12.0.
#include "grouped_gemm/cuda/fp8.h"
#include "grouped_gemm/sm80/w8a8_gate_up.h"

namespace dgemma {

const char* launch_gate_up_sm89_fp8(const MoeCudaPlan& plan, const MoeQuantizedPass& pass,
                                    void* stream) {
  return launch_gate_up<Encoding::kFp8Activations>(plan, pass, stream);
}

}  // namespace dgemma
