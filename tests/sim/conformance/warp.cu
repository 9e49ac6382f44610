// The operations of a whole warp: votes and shuffles, elect, ldmatrix and stmatrix, mma, rounding,
// the special functions.
#include <cmath>

#include "conformance.h"
#include "device/barrier.h"
#include "device/bytes.h"
#include "device/ldmatrix.h"
#include "device/math.h"
#include "device/mma.h"
#include "device/shared_memory.h"
#include "device/warp.h"

namespace conformance {
namespace {

using namespace dgemma::device;

__global__ void exchange_kernel(uint32_t* out) {
  const uint32_t lane = lane_index(), mine = lane * lane + 7;
  uint32_t* to = out + lane;
  to[0 * 32] = __shfl_sync(kAllLanes, mine, 5);
  to[1 * 32] = __shfl_sync(kAllLanes, mine, 3, 8);
  to[2 * 32] = __shfl_xor_sync(kAllLanes, mine, 9);
  to[3 * 32] = __shfl_up_sync(kAllLanes, mine, 3u, 16);
  to[4 * 32] = __shfl_down_sync(kAllLanes, mine, 20u);
  to[5 * 32] = __ballot_sync(kAllLanes, lane % 3 == 0);
  to[6 * 32] = static_cast<uint32_t>(__any_sync(kAllLanes, lane == 31) +
                                     2 * __all_sync(kAllLanes, lane < 31));
  to[7 * 32] = __match_any_sync(kAllLanes, lane % 5);
  to[8 * 32] = __reduce_add_sync(kAllLanes, mine);
  to[9 * 32] = __reduce_max_sync(kAllLanes, lane ^ 21u);
  to[10 * 32] = lane % 2 ? __ballot_sync(0xaaaaaaaau, 1) : __ballot_sync(0x55555555u, lane < 16);
  to[11 * 32] = elect_one() ? 1 : 0;
  to[12 * 32] = warp_index() + 10 * warpgroup_index();
}

std::string exchange() {
  Buffer<uint32_t> out(13 * 32);
  if (std::string problem = run(32, 0, 1, exchange_kernel, out.device()); !problem.empty())
    return problem;
  std::vector<uint32_t> got = out.fetch(), wanted(13 * 32);
  const auto mine = [](uint32_t lane) { return lane * lane + 7; };
  uint32_t elected = 0;
  for (uint32_t lane = 0; lane < 32; ++lane) elected += got[11 * 32 + lane];
  if (elected != 1) return "elect_one chose not one lane";
  uint32_t sum = 0, multiples_of_3 = 0;
  for (uint32_t lane = 0; lane < 32; ++lane) {
    sum += mine(lane);
    multiples_of_3 |= (lane % 3 == 0 ? 1u : 0u) << lane;
  }
  for (uint32_t lane = 0; lane < 32; ++lane) {
    uint32_t same = 0;
    for (uint32_t other = 0; other < 32; ++other)
      same |= (other % 5 == lane % 5 ? 1u : 0u) << other;
    const uint32_t row[13] = {mine(5),
                              mine(lane / 8 * 8 + 3),
                              mine(lane ^ 9),
                              mine(lane % 16 < 3 ? lane : lane - 3),
                              mine(lane + 20 < 32 ? lane + 20 : lane),
                              multiples_of_3,
                              1,
                              same,
                              sum,
                              31,
                              lane % 2 ? 0xaaaaaaaau : 0x5555u,
                              got[11 * 32 + lane],
                              0};
    for (uint32_t i = 0; i < 13; ++i) wanted[i * 32 + lane] = row[i];
  }
  return compare("exchange", got, wanted);
}

// Element (row, column) of tile t holds 64 t + 8 row + column.
struct TileMemory {
  alignas(16) uint16_t in[4][8][8];
  alignas(16) uint16_t out[4][8][8];
};

template <int kCount, bool kTransposed>
__global__ void tiles_kernel(uint32_t* registers, uint16_t* stored) {
  auto& shared = shared_memory<TileMemory>();
  const uint32_t lane = lane_index();
  for (uint32_t i = lane; i < 256; i += 32) {
    shared.in[i / 64][i / 8 % 8][i % 8] = static_cast<uint16_t>(i);
    shared.out[i / 64][i / 8 % 8][i % 8] = 0xffff;
  }
  __syncwarp();
  uint32_t tile[kCount];
  if (kTransposed)
    load_tiles_transposed(tile, shared.in[lane / 8][lane % 8]);
  else
    load_tiles(tile, shared.in[lane / 8][lane % 8]);
  for (int t = 0; t < kCount; ++t) registers[static_cast<uint32_t>(t) * 32 + lane] = tile[t];
#if defined(DGEMMA_SIM) || __CUDA_ARCH__ >= 900
  if (kTransposed)
    store_tiles_transposed(shared.out[lane / 8][lane % 8], tile);
  else
    store_tiles(shared.out[lane / 8][lane % 8], tile);
#endif
  __syncwarp();
  for (uint32_t i = lane; i < 256; i += 32) stored[i] = shared.out[i / 64][i / 8 % 8][i % 8];
}

template <int kCount, bool kTransposed>
std::string tiles_of(bool check_stored) {
  Buffer<uint32_t> registers(kCount * 32);
  Buffer<uint16_t> stored(256);
  std::string problem = run(32, sizeof(TileMemory), 1, tiles_kernel<kCount, kTransposed>,
                            registers.device(), stored.device());
  if (!problem.empty()) return problem;
  std::vector<uint32_t> wanted(kCount * 32);
  std::vector<uint16_t> copied(256, 0xffff);
  for (uint32_t t = 0; t < kCount; ++t) {
    for (uint32_t lane = 0; lane < 32; ++lane) {
      const uint32_t row = lane / 4, column = 2 * (lane % 4);
      const uint32_t low = kTransposed ? 8 * column + row : 8 * row + column;
      const uint32_t high = kTransposed ? 8 * (column + 1) + row : 8 * row + column + 1;
      wanted[t * 32 + lane] = (64 * t + low) | (64 * t + high) << 16;
    }
    for (uint32_t i = 0; i < 64; ++i) copied[64 * t + i] = static_cast<uint16_t>(64 * t + i);
  }
  problem = compare("load_tiles", registers.fetch(), wanted);
  return problem.empty() && check_stored ? compare("store_tiles", stored.fetch(), copied) : problem;
}

template <bool kStored>
std::string tiles() {
  for (const std::string& problem :
       {tiles_of<1, false>(kStored), tiles_of<2, false>(kStored), tiles_of<4, false>(kStored),
        tiles_of<1, true>(kStored), tiles_of<2, true>(kStored), tiles_of<4, true>(kStored)})
    if (!problem.empty()) return problem;
  return {};
}

// d (16x8) = a (16x16) b (16x8) + d, all three row-major; lanes take and give what mma.h says.
__global__ void mma_kernel(const float* a, const float* b, const float* c, float* d) {
  const uint32_t g = lane_index() / 4, t = 2 * (lane_index() % 4);
  uint32_t a_fragment[4], b_fragment[2];
  float sum[4];
  for (uint32_t i = 0; i < 4; ++i) {
    const float* from = a + (g + 8 * (i % 2)) * 16 + t + 8 * (i / 2);
    a_fragment[i] = pack_bfloat16(from[0], from[1]);
    sum[i] = c[(g + 8 * (i / 2)) * 8 + t + i % 2];
  }
  for (uint32_t i = 0; i < 2; ++i) {
    const float* from = b + (t + 8 * i) * 8 + g;
    b_fragment[i] = pack_bfloat16(from[0], from[8]);
  }
  mma_m16n8k16(sum, a_fragment, b_fragment);
  for (uint32_t i = 0; i < 4; ++i) d[(g + 8 * (i / 2)) * 8 + t + i % 2] = sum[i];
}

std::string mma() {
  const std::vector<float> a = small_numbers(256, 1), b = small_numbers(128, 2),
                           c = small_numbers(128, 3);
  Buffer<float> a_device(a), b_device(b), c_device(c), d(128);
  if (std::string problem = run(32, 0, 1, mma_kernel, a_device.device(), b_device.device(),
                                c_device.device(), d.device());
      !problem.empty())
    return problem;
  std::vector<float> wanted = c;
  for (size_t i = 0; i < 16; ++i)
    for (size_t j = 0; j < 8; ++j)
      for (size_t k = 0; k < 16; ++k) wanted[i * 8 + j] += a[i * 16 + k] * b[k * 8 + j];
  return compare("mma_m16n8k16", d.fetch(), wanted);
}

// The same of e4m3, with a k of 32.
__global__ void mma_e4m3_kernel(const uint8_t* a, const uint8_t* b, const float* c, float* d) {
  const uint32_t g = lane_index() / 4, t = 2 * (lane_index() % 4), q = 2 * t;
  uint32_t a_fragment[4] = {}, b_fragment[2] = {};
  float sum[4];
  for (uint32_t i = 0; i < 4; ++i) {
    for (uint32_t k = 0; k < 4; ++k)
      a_fragment[i] |= uint32_t{a[(g + 8 * (i % 2)) * 32 + q + 16 * (i / 2) + k]} << 8 * k;
    sum[i] = c[(g + 8 * (i / 2)) * 8 + t + i % 2];
  }
  for (uint32_t i = 0; i < 2; ++i)
    for (uint32_t k = 0; k < 4; ++k)
      b_fragment[i] |= uint32_t{b[(q + 16 * i + k) * 8 + g]} << 8 * k;
#if defined(DGEMMA_SIM) || __CUDA_ARCH__ >= 890
  mma_m16n8k32_e4m3(sum, a_fragment, b_fragment);
#endif
  for (uint32_t i = 0; i < 4; ++i) d[(g + 8 * (i / 2)) * 8 + t + i % 2] = sum[i];
}

std::string mma_e4m3() {
  const std::vector<float> a = small_numbers(512, 1), b = small_numbers(256, 2),
                           c = small_numbers(128, 3);
  std::vector<uint8_t> a_values, b_values;
  for (float x : a) a_values.push_back(e4m3_bits(x));
  for (float x : b) b_values.push_back(e4m3_bits(x));
  Buffer<uint8_t> a_device(a_values), b_device(b_values);
  Buffer<float> c_device(c), d(128);
  if (std::string problem = run(32, 0, 1, mma_e4m3_kernel, a_device.device(), b_device.device(),
                                c_device.device(), d.device());
      !problem.empty())
    return problem;
  std::vector<float> wanted = c;
  for (size_t i = 0; i < 16; ++i)
    for (size_t j = 0; j < 8; ++j)
      for (size_t k = 0; k < 32; ++k) wanted[i * 8 + j] += a[i * 32 + k] * b[k * 8 + j];
  return compare("mma_m16n8k32_e4m3", d.fetch(), wanted);
}

// The same of int8.
__global__ void mma_int8_kernel(const int8_t* a, const int8_t* b, const int32_t* c, int32_t* d) {
  const uint32_t g = lane_index() / 4, t = 2 * (lane_index() % 4), q = 2 * t;
  uint32_t a_fragment[4] = {}, b_fragment[2] = {};
  int32_t sum[4];
  const auto bits = [](int8_t x) { return uint32_t{static_cast<uint8_t>(x)}; };
  for (uint32_t i = 0; i < 4; ++i) {
    for (uint32_t k = 0; k < 4; ++k)
      a_fragment[i] |= bits(a[(g + 8 * (i % 2)) * 32 + q + 16 * (i / 2) + k]) << 8 * k;
    sum[i] = c[(g + 8 * (i / 2)) * 8 + t + i % 2];
  }
  for (uint32_t i = 0; i < 2; ++i)
    for (uint32_t k = 0; k < 4; ++k) b_fragment[i] |= bits(b[(q + 16 * i + k) * 8 + g]) << 8 * k;
  mma_m16n8k32_int8(sum, a_fragment, b_fragment);
  for (uint32_t i = 0; i < 4; ++i) d[(g + 8 * (i / 2)) * 8 + t + i % 2] = sum[i];
}

std::string mma_int8() {
  // All 256 codes on both sides; rows and columns of the least, whose products are the largest;
  // sums of more than 24 bits; and one that wraps.
  std::vector<int8_t> a(512), b(256);
  for (size_t i = 0; i < 512; ++i)
    a[i] = static_cast<int8_t>(i / 32 == 3 ? -128 : static_cast<int>(37 * i + 11));
  for (size_t i = 0; i < 256; ++i)
    b[i] = static_cast<int8_t>(i % 8 == 5 ? -128 : static_cast<int>(73 * i + 5));
  std::vector<int32_t> c(128);
  for (size_t i = 0; i < 128; ++i) c[i] = static_cast<int32_t>(i * 16777259u);
  c[3 * 8 + 5] = INT32_MAX;
  Buffer<int8_t> a_device(a), b_device(b);
  Buffer<int32_t> c_device(c), d(128);
  if (std::string problem = run(32, 0, 1, mma_int8_kernel, a_device.device(), b_device.device(),
                                c_device.device(), d.device());
      !problem.empty())
    return problem;
  std::vector<int32_t> wanted(128);
  for (size_t i = 0; i < 16; ++i)
    for (size_t j = 0; j < 8; ++j) {
      int64_t sum = c[i * 8 + j];
      for (size_t k = 0; k < 32; ++k) sum += int64_t{a[i * 32 + k]} * b[k * 8 + j];
      wanted[i * 8 + j] = static_cast<int32_t>(static_cast<uint32_t>(sum));
    }
  return compare("mma_m16n8k32_int8", d.fetch(), wanted);
}

__global__ void rounding_kernel(const float* in, uint32_t* out) {
  const uint32_t lane = lane_index();
  out[lane] = pack_bfloat16(in[lane], in[31 - lane]);
  out[32 + lane] = round_to_bfloat16(in[lane]).bits;
  out[64 + lane] =
      __float_as_uint(high_to_float(out[lane])) ^ __float_as_uint(low_to_float(out[lane]));
}

std::string rounding() {
  // Ties to even both ways, just above and below a tie, carries into the exponent, overflow,
  // subnormal, signed zero.
  const uint32_t bits[32] = {0x3f808000, 0x3f818000, 0x3f808001, 0x3f807fff, 0x3fffffff, 0x7f7fffff,
                             0x00000001, 0x80000000, 0x7f800000, 0xff800000, 0x00008000, 0x00018000,
                             0x80008001, 0x3f800000, 0xbf800000, 0x42f60000, 0xc2f6ffff, 0x7f7f7fff,
                             0x7f7f8000, 0x33333333, 0xb3333333, 0x12345678, 0x92345678, 0x7f000000,
                             0x007fffff, 0x00800000, 0x3fff7fff, 0x3fff8000, 0x40490fdb, 0xc0490fdb,
                             0x00000000, 0x461c4000};
  const auto rounded = [](uint32_t x) { return (x + 0x7fff + (x >> 16 & 1)) >> 16; };
  std::vector<float> in(32);
  for (size_t i = 0; i < 32; ++i) __builtin_memcpy(&in[i], &bits[i], 4);
  Buffer<float> device(in);
  Buffer<uint32_t> out(96);
  if (std::string problem = run(32, 0, 1, rounding_kernel, device.device(), out.device());
      !problem.empty())
    return problem;
  std::vector<uint32_t> wanted(96);
  for (size_t i = 0; i < 32; ++i) {
    wanted[i] = rounded(bits[31 - i]) << 16 | rounded(bits[i]);
    wanted[32 + i] = rounded(bits[i]);
    wanted[64 + i] = (wanted[i] & 0xffff0000) ^ (wanted[i] << 16);
  }
  return compare("rounding", out.fetch(), wanted);
}

__global__ void multiply_add_kernel(const uint32_t* in, uint32_t* out) {
  const uint32_t lane = lane_index();
  out[lane] = multiply_add_bfloat16(in[lane], in[32 + lane], in[64 + lane]);
}

// With an addend of -0 that the compiler knows, as in decoding: HMUL2, another instruction than
// HFMA2; once with a factor out of memory and once with one that the compiler knows, 2^120.
__global__ void multiply_kernel(const uint32_t* in, uint32_t* out) {
  const uint32_t lane = lane_index();
  out[lane] = multiply_add_bfloat16(in[lane], in[32 + lane], 0x80008000u);
  out[32 + lane] = multiply_add_bfloat16(in[lane], 0x7b807b80u, 0x80008000u);
}

std::string multiply() {
  // a, b, a b and a 2^120, as bits: normal numbers of subnormal ones; subnormal results, exact,
  // tied both ways and rounded to nothing; signs of zeros.
  const uint16_t rows[16][4] = {{0x0001, 0x7b80, 0x3900, 0x3900}, {0x0002, 0x7b80, 0x3980, 0x3980},
                                {0x0003, 0x7b80, 0x39c0, 0x39c0}, {0x0008, 0x7b80, 0x3a80, 0x3a80},
                                {0x0010, 0x7b80, 0x3b00, 0x3b00}, {0x0020, 0x7b80, 0x3b80, 0x3b80},
                                {0x0070, 0x7b80, 0x3c60, 0x3c60}, {0x807f, 0x7b80, 0xbc7e, 0xbc7e},
                                {0x0004, 0x3f80, 0x0004, 0x3a00}, {0x0080, 0x3f00, 0x0040, 0x3c80},
                                {0x0081, 0x3f00, 0x0040, 0x3c81}, {0x0083, 0x3f00, 0x0042, 0x3c83},
                                {0x0001, 0x3e80, 0x0000, 0x3900}, {0x8001, 0x3f80, 0x8001, 0xb900},
                                {0x0000, 0xc000, 0x8000, 0x0000}, {0x8000, 0xc000, 0x0000, 0x8000}};
  std::vector<uint32_t> in(64), wanted(64);
  for (uint32_t lane = 0; lane < 32; ++lane) {
    const uint16_t* low = rows[lane % 16];
    const uint16_t* high = rows[(lane * 5 + lane / 16 + 3) % 16];
    const auto both = [&](int i) {
      return static_cast<uint32_t>(low[i]) | static_cast<uint32_t>(high[i]) << 16;
    };
    in[lane] = both(0), in[32 + lane] = both(1);
    wanted[lane] = both(2), wanted[32 + lane] = both(3);
  }
  Buffer<uint32_t> device(in), out(64);
  if (std::string problem = run(32, 0, 1, multiply_kernel, device.device(), out.device());
      !problem.empty())
    return problem;
  return compare("multiply_add_bfloat16 with -0", out.fetch(), wanted);
}

std::string multiply_add() {
  // a, b, c and the sum rounded once, as bits: a power of two that makes a normal number of a
  // subnormal one, alone and with a constant taken away; subnormal results, also from normal
  // numbers; the keeper of a product's sign; ties to even both ways; a product that c lifts over a
  // tie and one that it keeps below, though the sum in float is the tie; overflow.
  const uint16_t rows[16][4] = {{0x0001, 0x7f00, 0xbe00, 0xbde0}, {0x000f, 0x7f00, 0xbe00, 0x3de0},
                                {0x0040, 0x7e80, 0x8000, 0x3f00}, {0x8040, 0x7e80, 0x8000, 0xbf00},
                                {0x00c0, 0x7e80, 0x8000, 0x3fc0}, {0x0010, 0x7b80, 0x8000, 0x3b00},
                                {0x3f00, 0x0002, 0x8000, 0x0001}, {0x0080, 0x3f00, 0x8000, 0x0040},
                                {0x0000, 0xc000, 0x8000, 0x8000}, {0x0000, 0x4000, 0x8000, 0x0000},
                                {0x3f81, 0x3fc0, 0x8000, 0x3fc2}, {0x3f83, 0x3fc0, 0x8000, 0x3fc4},
                                {0x3f80, 0x3f80, 0x3b80, 0x3f80}, {0x3f81, 0x3f81, 0x2f80, 0x3f82},
                                {0x3f81, 0x3fc0, 0x2f80, 0x3fc2}, {0x7f7f, 0x4000, 0x0000, 0x7f80}};
  // Each row in the low half once and in the high half once, beside another one.
  std::vector<uint32_t> in(96), wanted(32);
  for (uint32_t lane = 0; lane < 32; ++lane) {
    const uint16_t* low = rows[lane % 16];
    const uint16_t* high = rows[(lane * 5 + lane / 16 + 3) % 16];
    for (uint32_t i = 0; i < 3; ++i)
      in[32 * i + lane] = static_cast<uint32_t>(low[i]) | static_cast<uint32_t>(high[i]) << 16;
    wanted[lane] = static_cast<uint32_t>(low[3]) | static_cast<uint32_t>(high[3]) << 16;
  }
  Buffer<uint32_t> device(in), out(32);
  if (std::string problem = run(32, 0, 1, multiply_add_kernel, device.device(), out.device());
      !problem.empty())
    return problem;
  return compare("multiply_add_bfloat16", out.fetch(), wanted);
}

__global__ void permute_kernel(uint32_t* out) {
  constexpr uint32_t kSelectors[8] = {0x3210, 0x7654, 0x1100, 0x3377,
                                      0xc480, 0xf7b3, 0x89ab, 0x5d6e};
  const uint32_t lane = lane_index();
  if (lane < 8) out[lane] = permute_bytes(0x83720160, 0x15e4d3c2, kSelectors[lane]);
}

std::string permute() {
  Buffer<uint32_t> out(8);
  if (std::string problem = run(32, 0, 1, permute_kernel, out.device()); !problem.empty())
    return problem;
  const std::vector<uint32_t> wanted = {0x83720160, 0x15e4d3c2, 0x01016060, 0x83831515,
                                        0xffc20060, 0x0015ff83, 0x000000ff, 0xd3ffe4ff};
  return compare("permute_bytes", out.fetch(), wanted);
}

__global__ void functions_kernel(const float* in, float* out) {
  const uint32_t lane = lane_index();
  const float x = in[lane];
  out[lane] = exp2_approximate(x);
  out[32 + lane] = log2_approximate(x * x + 1.5f);
  out[64 + lane] = tanh_approximate(x);
  out[96 + lane] = reciprocal_approximate(x);
  out[128 + lane] = reciprocal_sqrt_approximate(x * x);
}

std::string functions() {
  std::vector<float> in(32);
  for (size_t i = 0; i < 32; ++i) in[i] = 0.37f * static_cast<float>(i) - 5.9f;
  Buffer<float> device(in), out(160);
  if (std::string problem = run(32, 0, 1, functions_kernel, device.device(), out.device());
      !problem.empty())
    return problem;
  const std::vector<float>& got = out.fetch();
  // Relative errors that the PTX ISA states, doubled for the rounding of what stands around them.
  const double bound[5] = {0x1p-21, 0x1p-21, 0x1p-10, 0x1p-22, 0x1p-21};
  for (size_t i = 0; i < 32; ++i) {
    const double x = in[i];
    const double wanted[5] = {std::exp2(x), std::log2(x * x + 1.5), std::tanh(x), 1 / x,
                              1 / std::fabs(x)};
    for (size_t f = 0; f < 5; ++f) {
      const double error = std::fabs(got[32 * f + i] - wanted[f]) / std::fabs(wanted[f]);
      if (!(error <= bound[f])) {
        char text[120];
        std::snprintf(text, sizeof text, "function %zu of %g: relative error %.3g, bound %.3g", f,
                      x, error, bound[f]);
        return text;
      }
    }
  }
  return {};
}

// Warp 0 waits for warps 1 and 2, which go on; then all three meet.
__global__ void barriers_kernel(uint32_t* out) {
  auto& seen = shared_memory<uint32_t[4]>();
  const uint32_t warp = warp_index();
  if (warp == 0) {
    named_barrier_sync(3, 96);
    if (lane_index() == 0) out[0] = seen[1] + seen[2];
  } else {
    if (lane_index() == 0) seen[warp] = 10 * warp;
    named_barrier_arrive(3, 96);
  }
  named_barrier_sync(4, 96);
  const int even = __syncthreads_count(threadIdx.x % 2 == 0);
  if (threadIdx.x == 95) out[1] = static_cast<uint32_t>(even);
}

std::string barriers() {
  Buffer<uint32_t> out(2);
  if (std::string problem = run(96, 16, 1, barriers_kernel, out.device()); !problem.empty())
    return problem;
  return compare("barriers", out.fetch(), std::vector<uint32_t>{30, 48});
}

}  // namespace

std::vector<Case> warp_cases() {
  return {{"shuffles and votes", 90, exchange},
          {"load_tiles", 80, tiles<false>},
          {"store_tiles", 90, tiles<true>},
          {"mma_m16n8k16", 80, mma},
          {"mma_m16n8k32_e4m3", 89, mma_e4m3},
          {"mma_m16n8k32_int8", 80, mma_int8},
          {"rounding to bfloat16", 80, rounding},
          {"multiply-add of bfloat16", 80, multiply_add},
          {"multiplication of bfloat16", 80, multiply},
          {"permuted bytes", 80, permute},
          {"special functions", 80, functions},
          {"named barriers", 80, barriers}};
}

}  // namespace conformance
