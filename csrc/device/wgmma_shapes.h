// The 32 shapes of wgmma: one instruction text each, because a text names its registers one by one.
//
// Macros, since the number of operands differs. DGEMMA_NAMES_n is the text of n accumulator
// registers, DGEMMA_FLOATS_n the operands themselves; DGEMMA_WGMMA(N, n, numbers) gives both forms
// for n = N / 2 registers, the numbers being those of the operands that follow them.
#pragma once

#include "device/language.h"

namespace dgemma::device {

template <int kN>
struct WgmmaShape {
  static_assert(kN < 0, "wgmma's N is a multiple of 8 from 8 to 256");
};

// clang-format off
#define DGEMMA_NAMES_4 "%0, %1, %2, %3"
#define DGEMMA_NAMES_8 DGEMMA_NAMES_4 ", %4, %5, %6, %7"
#define DGEMMA_NAMES_12 DGEMMA_NAMES_8 ", %8, %9, %10, %11"
#define DGEMMA_NAMES_16 DGEMMA_NAMES_12 ", %12, %13, %14, %15"
#define DGEMMA_NAMES_20 DGEMMA_NAMES_16 ", %16, %17, %18, %19"
#define DGEMMA_NAMES_24 DGEMMA_NAMES_20 ", %20, %21, %22, %23"
#define DGEMMA_NAMES_28 DGEMMA_NAMES_24 ", %24, %25, %26, %27"
#define DGEMMA_NAMES_32 DGEMMA_NAMES_28 ", %28, %29, %30, %31"
#define DGEMMA_NAMES_36 DGEMMA_NAMES_32 ", %32, %33, %34, %35"
#define DGEMMA_NAMES_40 DGEMMA_NAMES_36 ", %36, %37, %38, %39"
#define DGEMMA_NAMES_44 DGEMMA_NAMES_40 ", %40, %41, %42, %43"
#define DGEMMA_NAMES_48 DGEMMA_NAMES_44 ", %44, %45, %46, %47"
#define DGEMMA_NAMES_52 DGEMMA_NAMES_48 ", %48, %49, %50, %51"
#define DGEMMA_NAMES_56 DGEMMA_NAMES_52 ", %52, %53, %54, %55"
#define DGEMMA_NAMES_60 DGEMMA_NAMES_56 ", %56, %57, %58, %59"
#define DGEMMA_NAMES_64 DGEMMA_NAMES_60 ", %60, %61, %62, %63"
#define DGEMMA_NAMES_68 DGEMMA_NAMES_64 ", %64, %65, %66, %67"
#define DGEMMA_NAMES_72 DGEMMA_NAMES_68 ", %68, %69, %70, %71"
#define DGEMMA_NAMES_76 DGEMMA_NAMES_72 ", %72, %73, %74, %75"
#define DGEMMA_NAMES_80 DGEMMA_NAMES_76 ", %76, %77, %78, %79"
#define DGEMMA_NAMES_84 DGEMMA_NAMES_80 ", %80, %81, %82, %83"
#define DGEMMA_NAMES_88 DGEMMA_NAMES_84 ", %84, %85, %86, %87"
#define DGEMMA_NAMES_92 DGEMMA_NAMES_88 ", %88, %89, %90, %91"
#define DGEMMA_NAMES_96 DGEMMA_NAMES_92 ", %92, %93, %94, %95"
#define DGEMMA_NAMES_100 DGEMMA_NAMES_96 ", %96, %97, %98, %99"
#define DGEMMA_NAMES_104 DGEMMA_NAMES_100 ", %100, %101, %102, %103"
#define DGEMMA_NAMES_108 DGEMMA_NAMES_104 ", %104, %105, %106, %107"
#define DGEMMA_NAMES_112 DGEMMA_NAMES_108 ", %108, %109, %110, %111"
#define DGEMMA_NAMES_116 DGEMMA_NAMES_112 ", %112, %113, %114, %115"
#define DGEMMA_NAMES_120 DGEMMA_NAMES_116 ", %116, %117, %118, %119"
#define DGEMMA_NAMES_124 DGEMMA_NAMES_120 ", %120, %121, %122, %123"
#define DGEMMA_NAMES_128 DGEMMA_NAMES_124 ", %124, %125, %126, %127"

#define DGEMMA_FLOATS_4 "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
#define DGEMMA_FLOATS_8 DGEMMA_FLOATS_4, "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
#define DGEMMA_FLOATS_12 DGEMMA_FLOATS_8, "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11])
#define DGEMMA_FLOATS_16 DGEMMA_FLOATS_12, "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
#define DGEMMA_FLOATS_20 DGEMMA_FLOATS_16, "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19])
#define DGEMMA_FLOATS_24 DGEMMA_FLOATS_20, "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23])
#define DGEMMA_FLOATS_28 DGEMMA_FLOATS_24, "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27])
#define DGEMMA_FLOATS_32 DGEMMA_FLOATS_28, "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define DGEMMA_FLOATS_36 DGEMMA_FLOATS_32, "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35])
#define DGEMMA_FLOATS_40 DGEMMA_FLOATS_36, "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39])
#define DGEMMA_FLOATS_44 DGEMMA_FLOATS_40, "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43])
#define DGEMMA_FLOATS_48 DGEMMA_FLOATS_44, "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47])
#define DGEMMA_FLOATS_52 DGEMMA_FLOATS_48, "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51])
#define DGEMMA_FLOATS_56 DGEMMA_FLOATS_52, "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55])
#define DGEMMA_FLOATS_60 DGEMMA_FLOATS_56, "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59])
#define DGEMMA_FLOATS_64 DGEMMA_FLOATS_60, "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define DGEMMA_FLOATS_68 DGEMMA_FLOATS_64, "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67])
#define DGEMMA_FLOATS_72 DGEMMA_FLOATS_68, "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71])
#define DGEMMA_FLOATS_76 DGEMMA_FLOATS_72, "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75])
#define DGEMMA_FLOATS_80 DGEMMA_FLOATS_76, "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79])
#define DGEMMA_FLOATS_84 DGEMMA_FLOATS_80, "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83])
#define DGEMMA_FLOATS_88 DGEMMA_FLOATS_84, "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87])
#define DGEMMA_FLOATS_92 DGEMMA_FLOATS_88, "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91])
#define DGEMMA_FLOATS_96 DGEMMA_FLOATS_92, "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95])
#define DGEMMA_FLOATS_100 DGEMMA_FLOATS_96, "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99])
#define DGEMMA_FLOATS_104 DGEMMA_FLOATS_100, "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103])
#define DGEMMA_FLOATS_108 DGEMMA_FLOATS_104, "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107])
#define DGEMMA_FLOATS_112 DGEMMA_FLOATS_108, "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111])
#define DGEMMA_FLOATS_116 DGEMMA_FLOATS_112, "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115])
#define DGEMMA_FLOATS_120 DGEMMA_FLOATS_116, "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119])
#define DGEMMA_FLOATS_124 DGEMMA_FLOATS_120, "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123])
#define DGEMMA_FLOATS_128 DGEMMA_FLOATS_124, "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])

// %p0.. are the operands after the accumulators. Scales of A and B are 1; d is added where the predicate holds.
#define DGEMMA_WGMMA(N, n, p0, p1, p2, p3, p4, p5, p6)                                            \
  template <>                                                                                     \
  struct WgmmaShape<N> {                                                                          \
    template <int kMajorA, int kMajorB>                                                           \
    static DGEMMA_DEVICE void shared(float (&d)[n], uint64_t a, uint64_t b, bool accumulate) {    \
      asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #p2 ", 0;"                                  \
                   " wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" DGEMMA_NAMES_##n \
                   "}, %" #p0 ", %" #p1 ", p, 1, 1, %" #p3 ", %" #p4 "; }"                        \
                   : DGEMMA_FLOATS_##n                                                            \
                   : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(kMajorA), "n"(kMajorB)); \
    }                                                                                             \
    static DGEMMA_DEVICE void shared_e4m3(float (&d)[n], uint64_t a, uint64_t b,                  \
                                          bool accumulate) {                                      \
      asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #p2 ", 0;"                                  \
                   " wgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3.e4m3 {" DGEMMA_NAMES_##n \
                   "}, %" #p0 ", %" #p1 ", p, 1, 1; }"                                            \
                   : DGEMMA_FLOATS_##n                                                            \
                   : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));                          \
    }                                                                                             \
    template <int kMajorB>                                                                        \
    static DGEMMA_DEVICE void registers(float (&d)[n], const uint32_t (&a)[4], uint64_t b,        \
                                        bool accumulate) {                                        \
      asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #p5 ", 0;"                                  \
                   " wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" DGEMMA_NAMES_##n \
                   "}, {%" #p0 ", %" #p1 ", %" #p2 ", %" #p3 "}, %" #p4 ", p, 1, 1, %" #p6 "; }"  \
                   : DGEMMA_FLOATS_##n                                                            \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b),                          \
                     "r"(static_cast<int>(accumulate)), "n"(kMajorB));                            \
    }                                                                                             \
  };

DGEMMA_WGMMA(8, 4, 4, 5, 6, 7, 8, 9, 10)
DGEMMA_WGMMA(16, 8, 8, 9, 10, 11, 12, 13, 14)
DGEMMA_WGMMA(24, 12, 12, 13, 14, 15, 16, 17, 18)
DGEMMA_WGMMA(32, 16, 16, 17, 18, 19, 20, 21, 22)
DGEMMA_WGMMA(40, 20, 20, 21, 22, 23, 24, 25, 26)
DGEMMA_WGMMA(48, 24, 24, 25, 26, 27, 28, 29, 30)
DGEMMA_WGMMA(56, 28, 28, 29, 30, 31, 32, 33, 34)
DGEMMA_WGMMA(64, 32, 32, 33, 34, 35, 36, 37, 38)
DGEMMA_WGMMA(72, 36, 36, 37, 38, 39, 40, 41, 42)
DGEMMA_WGMMA(80, 40, 40, 41, 42, 43, 44, 45, 46)
DGEMMA_WGMMA(88, 44, 44, 45, 46, 47, 48, 49, 50)
DGEMMA_WGMMA(96, 48, 48, 49, 50, 51, 52, 53, 54)
DGEMMA_WGMMA(104, 52, 52, 53, 54, 55, 56, 57, 58)
DGEMMA_WGMMA(112, 56, 56, 57, 58, 59, 60, 61, 62)
DGEMMA_WGMMA(120, 60, 60, 61, 62, 63, 64, 65, 66)
DGEMMA_WGMMA(128, 64, 64, 65, 66, 67, 68, 69, 70)
DGEMMA_WGMMA(136, 68, 68, 69, 70, 71, 72, 73, 74)
DGEMMA_WGMMA(144, 72, 72, 73, 74, 75, 76, 77, 78)
DGEMMA_WGMMA(152, 76, 76, 77, 78, 79, 80, 81, 82)
DGEMMA_WGMMA(160, 80, 80, 81, 82, 83, 84, 85, 86)
DGEMMA_WGMMA(168, 84, 84, 85, 86, 87, 88, 89, 90)
DGEMMA_WGMMA(176, 88, 88, 89, 90, 91, 92, 93, 94)
DGEMMA_WGMMA(184, 92, 92, 93, 94, 95, 96, 97, 98)
DGEMMA_WGMMA(192, 96, 96, 97, 98, 99, 100, 101, 102)
DGEMMA_WGMMA(200, 100, 100, 101, 102, 103, 104, 105, 106)
DGEMMA_WGMMA(208, 104, 104, 105, 106, 107, 108, 109, 110)
DGEMMA_WGMMA(216, 108, 108, 109, 110, 111, 112, 113, 114)
DGEMMA_WGMMA(224, 112, 112, 113, 114, 115, 116, 117, 118)
DGEMMA_WGMMA(232, 116, 116, 117, 118, 119, 120, 121, 122)
DGEMMA_WGMMA(240, 120, 120, 121, 122, 123, 124, 125, 126)
DGEMMA_WGMMA(248, 124, 124, 125, 126, 127, 128, 129, 130)
DGEMMA_WGMMA(256, 128, 128, 129, 130, 131, 132, 133, 134)

#undef DGEMMA_WGMMA
// clang-format on

}  // namespace dgemma::device
