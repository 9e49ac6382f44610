/* What every function of the library shares: status codes, data types, and how a host lends its
 * threads. docs/embedding.md is the guide; these headers are the reference.
 *
 * The library allocates nothing, keeps no state and starts no thread. A function takes one struct
 * that says what to compute and one that says where; any thread may call it. Two calls share no
 * output, workspace or context. In a call an output (what is not const, also where it is read) and
 * the workspace overlap no other tensor; inputs may overlap. Pointers are multiples of an element's
 * size, on a GPU of 16 bytes where it says so. What is wrong gives a status and a message, never a
 * crash, as far as the host sees it: not what lies on a GPU, and a NULL struct on the CPU alone.
 *
 * ABI. The interface is C11 and C++17 and is frozen. DGEMMA_ABI_VERSION, which is also the shared
 * library's SOVERSION, counts the breaks; a host built with one number runs with every later
 * library of that number. Within a number
 *   - functions, structs, enumerators and macros may be added;
 *   - a function keeps its name, its arguments and its meaning;
 *   - a struct keeps its size, and every field its place, type and meaning; there is no size field:
 *     an operation that comes to need more gets a struct and a function of its own beside the old;
 *   - an enumerator keeps its number; later libraries may return new ones.
 * Only with a new number may a struct grow, at its end, and 0 in a new field then means what there
 * was without it. So fill structs by name from {0}, and they keep their meaning when they are
 * compiled against a later header.
 * A host that loads the library at run time compares dgemma_abi_version() with DGEMMA_ABI_VERSION.
 * Names that begin with dgemma_ or DGEMMA_ belong to the library; no other symbol is exported.
 */
#ifndef DGEMMA_BASE_H_
#define DGEMMA_BASE_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* The version of these headers, and their ABI number. */
#define DGEMMA_VERSION_MAJOR 0
#define DGEMMA_VERSION_MINOR 1
#define DGEMMA_VERSION_PATCH 0
#define DGEMMA_VERSION_NUMBER \
  (DGEMMA_VERSION_MAJOR * 10000 + DGEMMA_VERSION_MINOR * 100 + DGEMMA_VERSION_PATCH)
#define DGEMMA_ABI_VERSION 1

/* On every function of the interface; all else of the library is hidden. */
#if defined(__GNUC__)
#define DGEMMA_API __attribute__((visibility("default")))
#else
#define DGEMMA_API
#endif

typedef enum dgemma_status {
  DGEMMA_OK = 0,
  DGEMMA_INVALID_ARGUMENT = 1, /* a size, pointer or value that the function does not take */
  DGEMMA_UNSUPPORTED =
      2, /* a data type, head dimension or machine that this build does not serve */
  DGEMMA_WORKSPACE_TOO_SMALL =
      3,                /* workspace_bytes is below what the matching _workspace function says */
  DGEMMA_CUDA_ERROR = 4 /* a launch failed; the message has the CUDA error */
} dgemma_status;

typedef enum dgemma_dtype {
  DGEMMA_FLOAT32 = 0,
  DGEMMA_BFLOAT16 = 1,
  DGEMMA_FLOAT16 = 2 /* of the scales of quantized weights alone */
} dgemma_dtype;

/* The instruction sets that a CPU kernel is compiled for. BEST picks the last one the machine has.
 */
typedef enum dgemma_cpu_variant {
  DGEMMA_CPU_BEST = -1,
  DGEMMA_CPU_SCALAR = 0,     /* plain C++: the same bits on every machine */
  DGEMMA_CPU_AVX2 = 1,       /* AVX2, FMA, F16C */
  DGEMMA_CPU_AVX512 = 2,     /* AVX-512 F, BW, DQ, VL */
  DGEMMA_CPU_AVX512_BF16 = 3 /* the same with dot products of bf16 and of int8 */
} dgemma_cpu_variant;

/* Where a CPU call runs.
 *
 * parallel_for(pool, tasks, task, state) must call task(state, i) once for every i in [0, tasks),
 * in any order and from any threads, and return when all are done. NULL runs them in the calling
 * thread. Results do not depend on how tasks are spread over threads.
 */
typedef struct dgemma_cpu {
  void (*parallel_for)(void* pool, int64_t tasks, void (*task)(void* state, int64_t index),
                       void* state);
  void* pool;
  dgemma_cpu_variant variant;
  char message[256]; /* written when a call returns anything but DGEMMA_OK */
} dgemma_cpu;

/* A dgemma_cpu that runs everything in the calling thread, on the machine's best variant:
 *   dgemma_cpu cpu = DGEMMA_CPU_SERIAL;
 */
#define DGEMMA_CPU_SERIAL {NULL, NULL, DGEMMA_CPU_BEST, {0}}

/* Where a CUDA call runs: everything is enqueued on `stream` (a cudaStream_t) and nothing waits. */
typedef struct dgemma_cuda {
  void* stream;
  char message[256];
} dgemma_cuda;

/* "0.1.0", of the library that runs. */
DGEMMA_API const char* dgemma_version(void);

/* Its DGEMMA_VERSION_NUMBER and DGEMMA_ABI_VERSION. */
DGEMMA_API int dgemma_version_number(void);
DGEMMA_API int dgemma_abi_version(void);

/* "ok", "invalid argument", "unsupported", "workspace too small", "CUDA error"; "unknown" for
 * anything else. */
DGEMMA_API const char* dgemma_status_name(dgemma_status status);

/* The variant that BEST stands for on this machine. */
DGEMMA_API dgemma_cpu_variant dgemma_cpu_best_variant(void);

/* 1 when this build has the variant and this machine runs it; BEST always. */
DGEMMA_API int dgemma_cpu_has_variant(dgemma_cpu_variant variant);

/* "scalar", "avx2", "avx512", "avx512_bf16"; "unknown" for anything else. */
DGEMMA_API const char* dgemma_cpu_variant_name(dgemma_cpu_variant variant);

/* 1 when this build has CUDA kernels. */
DGEMMA_API int dgemma_has_cuda(void);

#ifdef __cplusplus
}
#endif
#endif /* DGEMMA_BASE_H_ */
