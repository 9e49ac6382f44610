// The two example kernels on one small case, as a program of its own for the sanitizers. With an
// argument, one array is an element too short: AddressSanitizer must find that.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "entry.h"

SIM_ENTRY sm90_bf16_tile_product(const uint16_t* weights, const uint16_t* tokens, float* out,
                                 int rows, int token_count, int depth, int blocks, int mistake,
                                 void* stream);
SIM_ENTRY sm80_bf16_tile_product(const uint16_t* weights, const uint16_t* tokens, float* out,
                                 int rows, int token_count, int depth, int mistake, void* stream);

namespace {

constexpr int kRows = 100, kTokens = 11, kDepth = 328;

float value(int i) { return static_cast<float>((i * 37 + i / 7 * 11) % 9 - 4); }

// Exactly as many bytes as asked for, aligned as cudaMalloc does.
template <typename T>
std::unique_ptr<T, decltype(&std::free)> array(int count) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 256, static_cast<size_t>(count) * sizeof(T)) != 0) std::abort();
  return {static_cast<T*>(memory), &std::free};
}

uint16_t bfloat16_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return static_cast<uint16_t>(bits >> 16);
}

}  // namespace

int main(int count, char** arguments) {
  const bool short_output = count > 1 && std::strcmp(arguments[1], "short_output") == 0;
  const bool short_weights = count > 1 && std::strcmp(arguments[1], "short_weights") == 0;
  const auto weights = array<uint16_t>(kRows * kDepth - short_weights);
  const auto tokens = array<uint16_t>(kTokens * kDepth);
  const auto out = array<float>(kTokens * kRows - short_output);
  for (int i = 0; i < kRows * kDepth - short_weights; ++i) weights.get()[i] = bfloat16_of(value(i));
  for (int i = 0; i < kTokens * kDepth; ++i) tokens.get()[i] = bfloat16_of(value(3 * i + 1));
  for (int kernel = 0; kernel < 2; ++kernel) {
    for (int i = 0; i < kTokens * kRows - short_output; ++i) out.get()[i] = NAN;
    const char* error = kernel == 0 ? sm90_bf16_tile_product(weights.get(), tokens.get(), out.get(),
                                                             kRows, kTokens, kDepth, 1, 0, nullptr)
                                    : sm80_bf16_tile_product(weights.get(), tokens.get(), out.get(),
                                                             kRows, kTokens, kDepth, 0, nullptr);
    if (error) {
      std::printf("%s\n", error);
      return 2;
    }
    for (int token = 0; token < kTokens; ++token) {
      for (int row = 0; row < kRows; ++row) {
        double wanted = 0;  // whole numbers: every product and sum is exact
        for (int k = 0; k < kDepth; ++k)
          wanted +=
              static_cast<double>(value(row * kDepth + k)) * value(3 * (token * kDepth + k) + 1);
        if (out.get()[token * kRows + row] != wanted) {
          std::printf("kernel %d, token %d, row %d: %g, wanted %g\n", kernel, token, row,
                      out.get()[token * kRows + row], wanted);
          return 3;
        }
      }
    }
  }
  std::puts("right");
}
