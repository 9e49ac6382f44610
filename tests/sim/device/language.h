// CUDA C++ on the host: what kernels use of the language itself. See csrc/device/language.h.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../cuda_types.h"
#include "../global_shadow.h"
#include "../operations.h"

#define DGEMMA_DEVICE inline
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ [[gnu::noinline]]
#define __grid_constant__
// The first number is kept in front of the kernel's code, one empty instruction for each warp:
// sim::launch_bound finds it.
#define __launch_bounds__(threads, ...) \
  __attribute__((patchable_function_entry((threads) / 32, (threads) / 32)))
#define __align__(n) alignas(n)

#define threadIdx (::sim::thread_position())
#define blockIdx (::sim::block_position())
#define blockDim (::sim::block_extent())
#define gridDim (::sim::grid_extent())

namespace sim {

// Not watched, as nothing of the machine is.
[[gnu::no_sanitize("thread")]] inline uint3 thread_position() { return {self().index, 0, 0}; }
[[gnu::no_sanitize("thread")]] inline uint3 block_position() { return self().block->index; }
[[gnu::no_sanitize("thread")]] inline dim3 grid_extent() { return machine->shape.blocks; }
[[gnu::no_sanitize("thread")]] inline dim3 block_extent() { return {machine->shape.threads}; }

// Lanes exchange values of 4 or 8 bytes: `choose` says from which lane each takes its own.
template <typename T>
struct Exchange {
  T value, result;
  int operand;
};

template <typename T, typename Evaluate>
T exchange(uint32_t mask, const char* what, T value, int operand, const Source& source,
           Evaluate evaluate) {
  Exchange<T> mine{value, value, operand};
  warp_collective(
      mask, what, &mine,
      [](void* const* argument, uint32_t lanes, void* context) {
        for (uint32_t lane = 0; lane < 32; ++lane)
          if (lanes >> lane & 1)
            static_cast<Exchange<T>*>(argument[lane])->result = (*static_cast<Evaluate*>(context))(
                lane, lanes, reinterpret_cast<Exchange<T>* const*>(argument));
      },
      &evaluate, source);
  return mine.result;
}

// The value of lane `from(lane, operand)`, or the lane's own where that is outside its part of
// `width` lanes.
template <typename T, typename From>
T shuffle(uint32_t mask, const char* what, T value, int operand, int width, const Source& source,
          From from) {
  return exchange(mask, what, value, operand, source,
                  [=](uint32_t lane, uint32_t lanes, Exchange<T>* const* all) {
                    const int first = static_cast<int>(lane) / width * width;
                    const int there = from(static_cast<int>(lane), all[lane]->operand, first);
                    if (there < first || there >= first + width) return all[lane]->value;
                    if (!(lanes >> there & 1))
                      fail(source, "%s: lane %u reads lane %d, which is not in the mask", what,
                           lane, there);
                    return all[there]->value;
                  });
}

template <typename T, typename Combine>
T reduce(uint32_t mask, const char* what, T value, const Source& source, Combine combine) {
  return exchange(mask, what, value, 0, source,
                  [=](uint32_t lane, uint32_t lanes, Exchange<T>* const* all) {
                    T total = all[lane]->value;
                    for (uint32_t other = 0; other < 32; ++other)
                      if (other != lane && lanes >> other & 1)
                        total = combine(total, all[other]->value);
                    return total;
                  });
}

}  // namespace sim

[[gnu::no_sanitize("thread")]] inline void __syncthreads(SIM_SOURCE) {
  sim::barrier_sync(0, sim::machine->shape.threads, source);
}
inline void __syncwarp(uint32_t mask = 0xffffffffu, SIM_SOURCE) {
  sim::reduce<uint32_t>(mask, "__syncwarp", 0, source, [](uint32_t a, uint32_t) { return a; });
}

template <typename T>
T __shfl_sync(uint32_t mask, T value, int lane, int width = 32, SIM_SOURCE) {
  return sim::shuffle(
      mask, "__shfl_sync", value, lane, width, source,
      [width](int, int operand, int first) { return first + (operand & (width - 1)); });
}
template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int lanes, int width = 32, SIM_SOURCE) {
  return sim::shuffle(mask, "__shfl_xor_sync", value, lanes, width, source,
                      [](int lane, int operand, int) { return lane ^ operand; });
}
template <typename T>
T __shfl_up_sync(uint32_t mask, T value, unsigned by, int width = 32, SIM_SOURCE) {
  return sim::shuffle(mask, "__shfl_up_sync", value, static_cast<int>(by), width, source,
                      [](int lane, int operand, int) { return lane - operand; });
}
template <typename T>
T __shfl_down_sync(uint32_t mask, T value, unsigned by, int width = 32, SIM_SOURCE) {
  return sim::shuffle(mask, "__shfl_down_sync", value, static_cast<int>(by), width, source,
                      [](int lane, int operand, int) { return lane + operand; });
}

inline uint32_t __ballot_sync(uint32_t mask, int predicate, SIM_SOURCE) {
  const uint32_t bit = predicate ? 1u << threadIdx.x % 32 : 0;
  return sim::reduce(mask, "__ballot_sync", bit, source,
                     [](uint32_t a, uint32_t b) { return a | b; });
}
inline int __any_sync(uint32_t mask, int predicate, SIM_SOURCE) {
  return sim::reduce(mask, "__any_sync", predicate, source,
                     [](int a, int b) { return int{a || b}; }) != 0;
}
inline int __all_sync(uint32_t mask, int predicate, SIM_SOURCE) {
  return sim::reduce(mask, "__all_sync", predicate, source,
                     [](int a, int b) { return int{a && b}; }) != 0;
}
template <typename T>
uint32_t __match_any_sync(uint32_t mask, T value, SIM_SOURCE) {
  struct Both {
    T value;
    uint32_t lanes;
  };
  return sim::exchange(mask, "__match_any_sync", Both{value, 0}, 0, source,
                       [](uint32_t lane, uint32_t lanes, sim::Exchange<Both>* const* all) {
                         Both both = all[lane]->value;
                         for (uint32_t other = 0; other < 32; ++other)
                           if (lanes >> other & 1 && all[other]->value.value == both.value)
                             both.lanes |= 1u << other;
                         return both;
                       })
      .lanes;
}
template <typename T>
T __reduce_add_sync(uint32_t mask, T value, SIM_SOURCE) {
  return sim::reduce(mask, "__reduce_add_sync", value, source,
                     [](T a, T b) { return static_cast<T>(a + b); });
}
template <typename T>
T __reduce_max_sync(uint32_t mask, T value, SIM_SOURCE) {
  return sim::reduce(mask, "__reduce_max_sync", value, source,
                     [](T a, T b) { return a > b ? a : b; });
}
template <typename T>
T __reduce_min_sync(uint32_t mask, T value, SIM_SOURCE) {
  return sim::reduce(mask, "__reduce_min_sync", value, source,
                     [](T a, T b) { return a < b ? a : b; });
}

// Not watched: the votes are the machine's.
[[gnu::no_sanitize("thread")]] inline int __syncthreads_count(int predicate, SIM_SOURCE) {
  int& votes = sim::self().block->votes;
  __syncthreads(source);
  if (threadIdx.x == 0) votes = 0;
  __syncthreads(source);
  votes += predicate != 0;
  __syncthreads(source);
  return votes;
}
inline int __syncthreads_or(int predicate, SIM_SOURCE) {
  return __syncthreads_count(predicate, source) != 0;
}
inline int __syncthreads_and(int predicate, SIM_SOURCE) {
  return __syncthreads_count(predicate, source) == static_cast<int>(blockDim.x);
}

template <typename T>
T atomicAdd(T* address, std::type_identity_t<T> value, SIM_SOURCE) {
  return sim::atomically(address, source, [=](T old) { return static_cast<T>(old + value); });
}
template <typename T>
T atomicMax(T* address, std::type_identity_t<T> value, SIM_SOURCE) {
  return sim::atomically(address, source, [=](T old) { return old > value ? old : value; });
}
template <typename T>
T atomicMin(T* address, std::type_identity_t<T> value, SIM_SOURCE) {
  return sim::atomically(address, source, [=](T old) { return old < value ? old : value; });
}
template <typename T>
T atomicOr(T* address, std::type_identity_t<T> value, SIM_SOURCE) {
  return sim::atomically(address, source, [=](T old) { return static_cast<T>(old | value); });
}
template <typename T>
T atomicExch(T* address, std::type_identity_t<T> value, SIM_SOURCE) {
  return sim::atomically(address, source, [=](T) { return value; });
}
template <typename T>
T atomicCAS(T* address, std::type_identity_t<T> compare, std::type_identity_t<T> value,
            SIM_SOURCE) {
  return sim::atomically(address, source, [=](T old) { return old == compare ? value : old; });
}

inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __nanosleep(unsigned, SIM_SOURCE) {
  sim::yield([](const sim::Thread&) -> std::string { return "sleeps for a moment"; }, source);
}
template <typename T>
T __ldg(const T* address, SIM_SOURCE) {
  sim::check_noncoherent(address, sizeof(T), source);
  return *address;
}

inline uint32_t __float_as_uint(float x) { return std::bit_cast<uint32_t>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __uint_as_float(uint32_t x) { return std::bit_cast<float>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline int __popc(uint32_t x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<uint32_t>(x)); }
inline int __ffs(int x) { return x == 0 ? 0 : std::countr_zero(static_cast<uint32_t>(x)) + 1; }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float x, float y) { return x / y; }
// Each rounded by itself: volatile, or the compiler would fuse a product and a sum.
inline float __fmul_rn(float x, float y) {
  const volatile float product = x * y;
  return product;
}
inline float __fadd_rn(float x, float y) {
  const volatile float sum = x + y;
  return sum;
}
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

template <typename T>
constexpr T min(T a, std::type_identity_t<T> b) {
  return b < a ? b : a;
}
template <typename T>
constexpr T max(T a, std::type_identity_t<T> b) {
  return a < b ? b : a;
}
