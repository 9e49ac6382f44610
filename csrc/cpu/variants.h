// A kernel table exists once per instruction set, in a namespace of that name: avx2::moe_kernels.
//
// A family declares its tables with DGEMMA_DECLARE_PER_VARIANT, defines each in cpu/<what>_table.h
// and takes the one that a call runs with DGEMMA_TABLE_OF. cmake/CpuVariants.cmake compiles every
// <what>_table.h once per instruction set, with DGEMMA_VARIANT as the name of its namespace.
#pragma once

#include "dgemma/base.h"

#if defined(__x86_64__) && !defined(DGEMMA_SCALAR_ONLY)  // the test bed has one set

#define DGEMMA_DECLARE_PER_VARIANT(declaration) \
  namespace scalar {                            \
  extern const declaration;                     \
  }                                             \
  namespace avx2 {                              \
  extern const declaration;                     \
  }                                             \
  namespace avx512 {                            \
  extern const declaration;                     \
  }                                             \
  namespace avx512_bf16 {                       \
  extern const declaration;                     \
  }

// The table `name` of `variant`, which resolve_cpu_variant has given: the scalar one for what has
// no other.
#define DGEMMA_TABLE_OF(variant, name)                                 \
  ((variant) == DGEMMA_CPU_AVX2          ? ::dgemma::avx2::name        \
   : (variant) == DGEMMA_CPU_AVX512      ? ::dgemma::avx512::name      \
   : (variant) == DGEMMA_CPU_AVX512_BF16 ? ::dgemma::avx512_bf16::name \
                                         : ::dgemma::scalar::name)

#else

#define DGEMMA_DECLARE_PER_VARIANT(declaration) \
  namespace scalar {                            \
  extern const declaration;                     \
  }
#define DGEMMA_TABLE_OF(variant, name) (static_cast<void>(variant), ::dgemma::scalar::name)

#endif
