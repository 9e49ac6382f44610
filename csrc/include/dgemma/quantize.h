/* Quantizes a weight: numbers to the codes and scales of grouped_gemm.h's formats. */
#ifndef DGEMMA_QUANTIZE_H_
#define DGEMMA_QUANTIZE_H_

#include "dgemma/grouped_gemm.h"

#ifdef __cplusplus
extern "C" {
#endif

/* A matrix [rows, columns] of which each columns / groups columns of a row share a scale s, among
 * the numbers that the format stores:
 *
 *   code = the nearest code to x / (s / multiplier), ties to the even one, cut to the format's ends
 *   s    = among those from a part to a multiple of largest |x| / M * multiplier, that with the
 *          least sum over the group of importance * (code * s / multiplier - x)^2
 *
 * with M = 7.5 (INT4), 127.5 (INT8), 448 (FP8), 6 (NVFP4). The scale of largest |x| / M itself is
 * taken where none of the others loses less; where it rounds to zero, all codes are those of zero.
 * The same bits on every machine, whatever the variant. Values that are not finite give no meaning.
 */
typedef struct dgemma_quantize_weight {
  int64_t rows;
  int64_t columns;   /* up to 16,384 */
  int64_t groups;    /* 1 for FP8 and INT8 */
  int64_t row_bytes; /* of values: columns, or columns / 2 for formats of 4 bits */
  dgemma_weight_format format;
  float multiplier; /* of scales before they are rounded: NVFP4's global scale, 1 for the others */
  dgemma_dtype dtype;      /* of weight */
  const void* weight;      /* [rows, columns] */
  const float* importance; /* [columns], 0 or more; NULL stands for 1 */
  uint8_t* values;         /* [rows, row_bytes] */
  float* scales;           /* [rows, groups]: exact numbers of bfloat16, or of e4m3 (NVFP4) */
  double* errors; /* [rows, 3]: sums over a row of importance times the squares of the values, of
                     the errors under largest |x| / M, and of those that are left */
} dgemma_quantize_weight;

/* float32 and bfloat16. There is no function for a GPU: weights are quantized once. */
DGEMMA_API dgemma_status dgemma_cpu_quantize_weight(const dgemma_quantize_weight* op,
                                                    dgemma_cpu* cpu);

#ifdef __cplusplus
}
#endif
#endif /* DGEMMA_QUANTIZE_H_ */
