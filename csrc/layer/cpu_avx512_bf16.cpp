#include "layer/cpu_kernel.h"

namespace dgemma {

const LayerKernels kLayerKernelsAvx512Bf16[2] = DGEMMA_LAYER_KERNELS;

}  // namespace dgemma
