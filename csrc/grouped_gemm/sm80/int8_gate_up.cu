// The kernels of sm80/w8a8_gate_up.h for int8, on every GPU.
#include "grouped_gemm/sm80/w8a8_gate_up.h"

namespace dgemma {

const char* launch_gate_up_sm80_int8(const MoeCudaPlan& plan, const MoeQuantizedPass& pass,
                                     void* stream) {
  return launch_gate_up<Encoding::kInt8>(plan, pass, stream);
}

}  // namespace dgemma
