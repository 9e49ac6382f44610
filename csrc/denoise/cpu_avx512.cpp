// The kernels of the denoise step for AVX-512.
#include "denoise/cpu_table.h"

namespace dgemma {

const DenoiseTable denoise_avx512 = denoise_table;

}  // namespace dgemma
