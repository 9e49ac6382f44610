// The kernels of the denoise step for any machine.
#include "denoise/cpu_table.h"

namespace dgemma {

const DenoiseTable denoise_scalar = denoise_table;

}  // namespace dgemma
