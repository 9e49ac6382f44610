// The kernels of the denoise step for AVX-512 with bf16 dot products.
#include "denoise/cpu_table.h"

namespace dgemma {

const DenoiseTable denoise_avx512_bf16 = denoise_table;

}  // namespace dgemma
