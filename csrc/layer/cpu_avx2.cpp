#include "layer/cpu_kernel.h"

namespace dgemma {

const LayerKernels kLayerKernelsAvx2[2] = DGEMMA_LAYER_KERNELS;

}  // namespace dgemma
