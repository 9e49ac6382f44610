// The kernels of the denoise step for AVX2 with FMA and F16C.
#include "denoise/cpu_table.h"

namespace dgemma {

const DenoiseTable denoise_avx2 = denoise_table;

}  // namespace dgemma
