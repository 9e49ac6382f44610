#include "cpu/dispatch.h"

#include <cstdio>

namespace dgemma {

bool cpu_variant_available(dgemma_cpu_variant variant) {
  if (variant == DGEMMA_CPU_SCALAR) return true;
#if defined(__x86_64__) && !defined(DGEMMA_SCALAR_ONLY)
  // The compiler's run-time library asks XGETBV too: a set counts only when the operating system
  // saves its registers.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (variant == DGEMMA_CPU_AVX2) return avx2;
  if (variant == DGEMMA_CPU_AVX512) return avx512;
  if (variant == DGEMMA_CPU_AVX512_BF16)
    return avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
#endif
  return false;
}

dgemma_status resolve_cpu_variant(dgemma_cpu* cpu, dgemma_cpu_variant* variant) {
  *variant = cpu->variant == DGEMMA_CPU_BEST ? dgemma_cpu_best_variant() : cpu->variant;
  if (cpu_variant_available(*variant)) return DGEMMA_OK;
  std::snprintf(cpu->message, sizeof cpu->message,
                "variant: got %d (%s), which this machine does not have; the best it has is %d "
                "(%s)",
                static_cast<int>(*variant), dgemma_cpu_variant_name(*variant),
                static_cast<int>(dgemma_cpu_best_variant()),
                dgemma_cpu_variant_name(dgemma_cpu_best_variant()));
  return DGEMMA_UNSUPPORTED;
}

}  // namespace dgemma

const char* dgemma_version(void) { return DGEMMA_VERSION; }

int dgemma_version_number(void) { return DGEMMA_VERSION_NUMBER; }

int dgemma_abi_version(void) { return DGEMMA_ABI_VERSION; }

const char* dgemma_status_name(dgemma_status status) {
  switch (status) {
    case DGEMMA_OK:
      return "ok";
    case DGEMMA_INVALID_ARGUMENT:
      return "invalid argument";
    case DGEMMA_UNSUPPORTED:
      return "unsupported";
    case DGEMMA_WORKSPACE_TOO_SMALL:
      return "workspace too small";
    case DGEMMA_CUDA_ERROR:
      return "CUDA error";
    default:
      return "unknown";
  }
}

int dgemma_cpu_has_variant(dgemma_cpu_variant variant) {
  return variant == DGEMMA_CPU_BEST || dgemma::cpu_variant_available(variant) ? 1 : 0;
}

dgemma_cpu_variant dgemma_cpu_best_variant(void) {
  for (int variant = dgemma::kCpuVariants - 1; variant > 0; --variant)
    if (dgemma::cpu_variant_available(static_cast<dgemma_cpu_variant>(variant)))
      return static_cast<dgemma_cpu_variant>(variant);
  return DGEMMA_CPU_SCALAR;
}

const char* dgemma_cpu_variant_name(dgemma_cpu_variant variant) {
  switch (variant) {
    case DGEMMA_CPU_SCALAR:
      return "scalar";
    case DGEMMA_CPU_AVX2:
      return "avx2";
    case DGEMMA_CPU_AVX512:
      return "avx512";
    case DGEMMA_CPU_AVX512_BF16:
      return "avx512_bf16";
    default:
      return "unknown";
  }
}

int dgemma_has_cuda(void) {
#if defined(DGEMMA_WITH_CUDA)
  return 1;
#else
  return 0;
#endif
}
