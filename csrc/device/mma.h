// mma.sync. m16n8k16: a warp adds a 16x16 by 16x8 product of bfloat16 to a 16x8 accumulator of fp32
// (sm_80).
//
// With g = lane / 4 and c = 2 (lane % 4), a lane holds
//
//   a[0] (g, c)  a[1] (g + 8, c)  a[2] (g, c + 8)  a[3] (g + 8, c + 8)
//   b[0] (c, g)  b[1] (c + 8, g)
//   d[0] (g, c)  d[1] (g, c + 1)  d[2] (g + 8, c)  d[3] (g + 8, c + 1)
//
// as (row, column), the row of B being k. A register of a has the next column of A too, one of b
// the next row of B. So load_tiles gives `a` from row-major A and `b` from B stored column by
// column (k contiguous). PTX ISA, "Warp-level Matrix Instructions: mma", fragments for .m16n8k16.
#pragma once

#include "device/language.h"

namespace dgemma::device {

DGEMMA_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7},"
      " {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// mma.sync m16n8k32 of e4m3 (8.9 and later; 9.0 and 10.0 have it in name only: nvcc makes products
// of float16 of it). A lane's register holds four columns of A, or rows of B, where it held two:
// with q = 4 (lane % 4)
//   a[0] (g, q)  a[1] (g + 8, q)  a[2] (g, q + 16)  a[3] (g + 8, q + 16)
//   b[0] (q, g)  b[1] (q + 16, g)                     each with the next three; d as above
// The sums keep about 14 bits on 8.9 as on 9.0 (SageAttention2, arXiv 2411.10958, section 3.3): a
// sign, 8 bits of exponent and 13 of fraction. Add them up elsewhere. PTX ISA, the same chapter.
DGEMMA_DEVICE void mma_m16n8k32_e4m3(float (&d)[4], const uint32_t (&a)[4],
                                     const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7},"
      " {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// mma.sync m16n8k32 of int8 (sm_80), both sides signed: integers in 32 bits, exact as long as they
// fit, a sum that does not wraps. Fragments are those of e4m3 above, d being integers. PTX ISA, the
// same chapter, fragments for .m16n8k32.
DGEMMA_DEVICE void mma_m16n8k32_int8(int32_t (&d)[4], const uint32_t (&a)[4],
                                     const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7},"
      " {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace dgemma::device
