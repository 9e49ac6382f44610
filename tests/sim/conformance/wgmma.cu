// wgmma in all 32 shapes, A from shared memory and from registers, and every layout of its
// operands.
#include "conformance.h"
#include "device/fence.h"
#include "device/shared_memory.h"
#include "device/warp.h"
#include "device/wgmma.h"

namespace conformance {
namespace {

using namespace dgemma::device;

constexpr uint32_t kSteps = 2;  // two products of 16 k, the second added to the first
constexpr uint32_t kK = 16 * kSteps;
constexpr uint32_t kRows = 64;

// The place of a tile and its descriptor.
struct Layout {
  Major major;
  Swizzle swizzle;
  uint32_t rows;

  uint32_t line() const { return swizzle_row_bytes(swizzle); }
  // Tiles are stored piece by piece as matrix_descriptor.h says; these are the two offsets it
  // speaks of.
  uint32_t leading() const {
    if (major == Major::k) return swizzle == Swizzle::none ? rows * 16 : 16;
    return swizzle == Swizzle::none ? rows / 8 * 128 : kK / 8 * 8 * line();
  }
  uint32_t stride() const {
    if (major == Major::k) return 8 * line();
    return swizzle == Swizzle::none ? 128 : 8 * line();
  }
  // A swizzled k-major line that is too short for all k is followed, after all rows, by the next k.
  uint32_t bytes() const {
    return major == Major::k && line() > kK * 2 ? rows * line() : rows * kK * 2;
  }
  // The distance from one product's operand to the next, 16 k further.
  uint32_t step() const {
    if (major == Major::k && swizzle != Swizzle::none) return line() < kK * 2 ? rows * line() : 32;
    return 2 * (swizzle == Swizzle::none ? leading() : stride());
  }
  uint32_t place(uint32_t row, uint32_t k) const {
    if (swizzle == Swizzle::none) {
      const uint32_t inside =
          major == Major::k ? row % 8 * 16 + k % 8 * 2 : row % 8 * 2 + k % 8 * 16;
      return row / 8 * stride() + k / 8 * leading() + inside;
    }
    const uint32_t in_line = line() / 2;  // elements
    if (major == Major::k)
      return k / in_line * rows * line() + swizzled(row * line() + k % in_line * 2, swizzle);
    return swizzled(row / in_line * leading() + row % in_line * 2 + k * line(), swizzle);
  }
  bool fits() const {
    return major == Major::k || swizzle == Swizzle::none || rows % (line() / 2) == 0;
  }
  std::vector<uint16_t> image(const std::vector<float>& matrix) const {
    std::vector<uint16_t> values(bytes() / 2, 0x7fc0);  // NaN where nothing belongs
    for (uint32_t row = 0; row < rows; ++row)
      for (uint32_t k = 0; k < kK; ++k)
        values[place(row, k) / 2] = bfloat16_bits(matrix[row * kK + k]);
    return values;
  }
};

struct Operand {
  const uint16_t* image;
  uint32_t bytes;
  Swizzle swizzle;
  uint32_t leading, stride, step;
};

struct Shared {
  alignas(1024) uint16_t a[kRows * 64];
  alignas(1024) uint16_t b[256 * 64];
};

DGEMMA_DEVICE void copy_in(uint16_t* to, const Operand& operand) {
  for (uint32_t i = threadIdx.x; i < operand.bytes / 2; i += 128) to[i] = operand.image[i];
}

// out (64 x kN) = a (64 x k) b^T (kN x k) + 1. `a_values` is A as a plain matrix, for A in
// registers.
template <int kN, bool kRegisters, Major kMajorA, Major kMajorB>
__global__ void __launch_bounds__(128)
    wgmma_kernel(Operand a, Operand b, const uint16_t* a_values, bool accumulate, float* out) {
  auto& shared = shared_memory<Shared>();
  copy_in(shared.a, a);
  copy_in(shared.b, b);
  fence_proxy_async();
  __syncthreads();
  const uint32_t row = 16 * warp_index() + lane_index() / 4, column = 2 * (lane_index() % 4);
  float d[kN / 2];
#pragma unroll
  for (int i = 0; i < kN / 2; ++i) d[i] = 1.0f;
  uint32_t fragment[kSteps][4];
#pragma unroll
  for (uint32_t i = 0; i < 4 * kSteps; ++i) {
    const uint16_t* from =
        a_values + (row + 8 * (i % 2)) * kK + column + 8 * (i / 2 % 2) + 16 * (i / 4);
    fragment[i / 4][i % 4] = static_cast<uint32_t>(from[0]) | static_cast<uint32_t>(from[1]) << 16;
  }
  const MatrixDescriptor a_tile = matrix_descriptor(shared.a, a.swizzle, a.leading, a.stride);
  const MatrixDescriptor b_tile = matrix_descriptor(shared.b, b.swizzle, b.leading, b.stride);
  wgmma_fence(d);
#pragma unroll
  for (uint32_t i = 0; i < kSteps; ++i) {
    if constexpr (kRegisters)
      wgmma<kN, kMajorB>(d, fragment[i], advanced(b_tile, i * b.step), i > 0 || accumulate);
    else
      wgmma<kN, kMajorA, kMajorB>(d, advanced(a_tile, i * a.step), advanced(b_tile, i * b.step),
                                  i > 0 || accumulate);
  }
  wgmma_commit();
  wgmma_wait<0>(d);
#pragma unroll
  for (int i = 0; i < kN / 2; ++i) {
    const uint32_t at = static_cast<uint32_t>(i);
    out[(row + 8 * (at / 2 % 2)) * kN + column + 8 * (at / 4) + at % 2] = d[i];
  }
}

template <int kN, bool kRegisters, Major kMajorA, Major kMajorB>
std::string product(Swizzle swizzle_a, Swizzle swizzle_b, bool accumulate = true) {
  const Layout a{kMajorA, swizzle_a, kRows}, b{kMajorB, swizzle_b, kN};
  if (!a.fits() || !b.fits()) return {};
  const std::vector<float> a_matrix = small_numbers(kRows * kK, kN),
                           b_matrix = small_numbers(kN * kK, kN + 1);
  std::vector<uint16_t> values(kRows * kK);
  for (size_t i = 0; i < values.size(); ++i) values[i] = bfloat16_bits(a_matrix[i]);
  Buffer<uint16_t> a_image(a.image(a_matrix)), b_image(b.image(b_matrix)), a_values(values);
  Buffer<float> out(kRows * kN);
  const auto operand = [](const Buffer<uint16_t>& image, const Layout& layout) {
    return Operand{image.device(),   layout.bytes(),  layout.swizzle,
                   layout.leading(), layout.stride(), layout.step()};
  };
  std::string problem =
      run(128, sizeof(Shared), 1, wgmma_kernel<kN, kRegisters, kMajorA, kMajorB>,
          operand(a_image, a), operand(b_image, b), a_values.device(), accumulate, out.device());
  if (problem.empty()) {
    std::vector<float> wanted(kRows * kN, accumulate ? 1.0f : 0.0f);
    for (size_t i = 0; i < kRows; ++i)
      for (size_t j = 0; j < kN; ++j)
        for (size_t k = 0; k < kK; ++k)
          wanted[i * kN + j] += a_matrix[i * kK + k] * b_matrix[j * kK + k];
    problem = compare("wgmma", out.fetch(), wanted);
  }
  if (problem.empty()) return {};
  char text[120];
  std::snprintf(text, sizeof text, "N %d, A %s swizzle %u, B %s swizzle %u: ", kN,
                kRegisters            ? "registers"
                : kMajorA == Major::k ? "k-major"
                                      : "m-major",
                static_cast<unsigned>(swizzle_a), kMajorB == Major::k ? "k-major" : "n-major",
                static_cast<unsigned>(swizzle_b));
  return text + problem;
}

template <bool kRegisters, int... kEighths>
std::string all_shapes(std::integer_sequence<int, kEighths...>) {
  std::string first;
  const auto keep = [&](std::string problem) {
    if (first.empty()) first = std::move(problem);
  };
  (keep(product<8 * (kEighths + 1), kRegisters, Major::k, Major::k>(
       Swizzle::bytes_128, Swizzle::bytes_128, kEighths % 2 == 0)),
   ...);
  return first;
}

std::string shapes_shared() { return all_shapes<false>(std::make_integer_sequence<int, 32>()); }
std::string shapes_registers() { return all_shapes<true>(std::make_integer_sequence<int, 32>()); }

constexpr Swizzle kSwizzles[] = {Swizzle::none, Swizzle::bytes_32, Swizzle::bytes_64,
                                 Swizzle::bytes_128};

template <int kN, bool kRegisters, Major kMajorA, Major kMajorB>
std::string layouts_of() {
  for (Swizzle a : kSwizzles)
    for (Swizzle b : kSwizzles)
      if (std::string problem = product<kN, kRegisters, kMajorA, kMajorB>(a, b); !problem.empty())
        return problem;
  return {};
}

template <bool kRegisters, Major kMajorA, Major kMajorB>
std::string layouts() {
  for (const std::string& problem : {layouts_of<8, kRegisters, kMajorA, kMajorB>(),
                                     layouts_of<64, kRegisters, kMajorA, kMajorB>(),
                                     layouts_of<192, kRegisters, kMajorA, kMajorB>()})
    if (!problem.empty()) return problem;
  return {};
}

constexpr uint32_t kKE4m3 = 64;  // two products of 32 k, rows of 64 bytes

struct SharedE4m3 {
  alignas(512) uint8_t a[kRows * kKE4m3];
  alignas(512) uint8_t b[256 * kKE4m3];
};

// out (64 x kN) = a (64 x k) b^T (kN x k) + 1, or without the 1.
template <int kN>
__global__ void __launch_bounds__(128)
    e4m3_kernel(const uint8_t* a, const uint8_t* b, bool accumulate, float* out) {
  auto& shared = shared_memory<SharedE4m3>();
  for (uint32_t i = threadIdx.x; i < kRows * kKE4m3; i += 128)
    shared.a[swizzled(i, Swizzle::bytes_64)] = a[i];
  for (uint32_t i = threadIdx.x; i < kN * kKE4m3; i += 128)
    shared.b[swizzled(i, Swizzle::bytes_64)] = b[i];
  fence_proxy_async();
  __syncthreads();
  float d[kN / 2];
#pragma unroll
  for (int i = 0; i < kN / 2; ++i) d[i] = 1.0f;
  const MatrixDescriptor a_tile = k_major_descriptor(shared.a, Swizzle::bytes_64);
  const MatrixDescriptor b_tile = k_major_descriptor(shared.b, Swizzle::bytes_64);
  wgmma_fence(d);
#pragma unroll
  for (uint32_t k = 0; k < kKE4m3; k += 32)
    wgmma_e4m3<kN>(d, advanced(a_tile, k), advanced(b_tile, k), k > 0 || accumulate);
  wgmma_commit();
  wgmma_wait<0>(d);
  const uint32_t row = 16 * warp_index() + lane_index() / 4, column = 2 * (lane_index() % 4);
#pragma unroll
  for (int i = 0; i < kN / 2; ++i) {
    const uint32_t at = static_cast<uint32_t>(i);
    out[(row + 8 * (at / 2 % 2)) * kN + column + 8 * (at / 4) + at % 2] = d[i];
  }
}

template <int kN>
std::string e4m3_product(bool accumulate) {
  const std::vector<float> a = small_numbers(kRows * kKE4m3, kN),
                           b = small_numbers(kN * kKE4m3, kN + 1);
  std::vector<uint8_t> a_values, b_values;
  for (float x : a) a_values.push_back(e4m3_bits(x));
  for (float x : b) b_values.push_back(e4m3_bits(x));
  Buffer<uint8_t> a_device(a_values), b_device(b_values);
  Buffer<float> out(kRows * kN);
  if (std::string problem = run(128, sizeof(SharedE4m3), 1, e4m3_kernel<kN>, a_device.device(),
                                b_device.device(), accumulate, out.device());
      !problem.empty())
    return problem;
  std::vector<float> wanted(kRows * kN, accumulate ? 1.0f : 0.0f);
  for (size_t i = 0; i < kRows; ++i)
    for (size_t j = 0; j < kN; ++j)
      for (size_t k = 0; k < kKE4m3; ++k)
        wanted[i * kN + j] += a[i * kKE4m3 + k] * b[j * kKE4m3 + k];
  return compare("wgmma_e4m3", out.fetch(), wanted);
}

template <int... kEighths>
std::string all_e4m3_shapes(std::integer_sequence<int, kEighths...>) {
  std::string first;
  const auto keep = [&](std::string problem) {
    if (first.empty()) first = std::move(problem);
  };
  (keep(e4m3_product<8 * (kEighths + 1)>(kEighths % 2 == 0)), ...);
  return first;
}

std::string shapes_e4m3() { return all_e4m3_shapes(std::make_integer_sequence<int, 32>()); }

}  // namespace

std::vector<Case> wgmma_cases() {
  return {{"wgmma shapes, A shared", 90, shapes_shared},
          {"wgmma shapes, A in registers", 90, shapes_registers},
          {"wgmma shapes of e4m3", 90, shapes_e4m3},
          {"wgmma A k-major, B k-major", 90, layouts<false, Major::k, Major::k>},
          {"wgmma A k-major, B n-major", 90, layouts<false, Major::k, Major::mn>},
          {"wgmma A m-major, B k-major", 90, layouts<false, Major::mn, Major::k>},
          {"wgmma A m-major, B n-major", 90, layouts<false, Major::mn, Major::mn>},
          {"wgmma A in registers, B n-major", 90, layouts<true, Major::k, Major::mn>}};
}

}  // namespace conformance
