// The kernels of this family read a vocabulary tile by a warp, four consecutive entries a lane, so
// that a row of the logits is read 256 bytes at a time.
#pragma once

#include <cmath>
#include <cstdint>

#include "denoise/cuda/kernels.h"
#include "device/bfloat16.h"
#include "device/warp.h"

namespace dgemma {
namespace {

constexpr int32_t kTile = DGEMMA_VOCABULARY_TILE;
constexpr int32_t kLaneEntries = kTile / 32;

// z = outer * tanh(inner * a), or outer * a without a cap. The factors are in two parts: rounding
// them to fp32 would move every z of a row in the same direction.
struct LogitScale {
  float inner, inner_low;
  float outer, outer_low;
  bool capped;

  DGEMMA_DEVICE float operator()(float a) const {
    if (capped) a = tanhf(fmaf(a, inner, a * inner_low));
    return fmaf(a, outer, a * outer_low);
  }
  // Several at once, with one test of whether there is a cap.
  template <int kCount>
  DGEMMA_DEVICE void operator()(const float (&raw)[kCount], float (&z)[kCount]) const {
    if (capped) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) z[i] = tanhf(fmaf(raw[i], inner, raw[i] * inner_low));
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) z[i] = raw[i];
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) z[i] = fmaf(z[i], outer, z[i] * outer_low);
  }
};

DGEMMA_DEVICE LogitScale make_scale(float softcap, float temperature) {
  LogitScale scale;
  scale.capped = softcap > 0.0f;
  const double cap = scale.capped ? static_cast<double>(softcap) : 1.0;
  const double inner = 1.0 / cap, outer = cap / static_cast<double>(temperature);
  scale.inner = static_cast<float>(inner);
  scale.inner_low = static_cast<float>(inner - static_cast<double>(scale.inner));
  scale.outer = static_cast<float>(outer);
  scale.outer_low = static_cast<float>(outer - static_cast<double>(scale.outer));
  return scale;
}

DGEMMA_DEVICE bool is_active(const uint8_t* active, int64_t request) {
  return active == nullptr || active[request] != 0;
}

// The bit row of a position, or null when it may hold every token.
DGEMMA_DEVICE const uint32_t* allowed_bits(const AllowedTokens& allowed, int32_t vocabulary,
                                           int64_t position) {
  if (allowed.mask == nullptr) return nullptr;
  const int32_t row = allowed.row_index[position];
  if (row < 0) return nullptr;
  return allowed.mask + static_cast<int64_t>(row) * ((vocabulary + 31) / 32);
}

// The lowest token that a row allows; it stands where no logit is a number.
DGEMMA_DEVICE int32_t lowest_allowed(const uint32_t* bits, int32_t vocabulary) {
  if (bits != nullptr)
    for (int32_t word = 0; word < (vocabulary + 31) / 32; ++word)
      if (bits[word] != 0) return word * 32 + __ffs(static_cast<int>(bits[word])) - 1;
  return 0;
}

// Four bits: which of a lane's four entries from `first` on exist and are allowed. `first` is a
// multiple of four, so they lie in one word.
DGEMMA_DEVICE uint32_t usable_entries(const uint32_t* bits, int32_t vocabulary, int32_t first) {
  const int32_t left = vocabulary - first;
  if (left <= 0) return 0;
  const uint32_t there = left >= kLaneEntries ? 0xfu : (1u << left) - 1;
  return bits == nullptr ? there : there & (bits[first / 32] >> (first % 32));
}

DGEMMA_DEVICE void read_four(const device::bfloat16* from, float (&raw)[kLaneEntries]) {
  const uint2 packed = *reinterpret_cast<const uint2*>(from);
  raw[0] = device::low_to_float(packed.x);
  raw[1] = device::high_to_float(packed.x);
  raw[2] = device::low_to_float(packed.y);
  raw[3] = device::high_to_float(packed.y);
}
DGEMMA_DEVICE void read_four(const float* from, float (&raw)[kLaneEntries]) {
  const float4 four = *reinterpret_cast<const float4*>(from);
  raw[0] = four.x, raw[1] = four.y, raw[2] = four.z, raw[3] = four.w;
}
DGEMMA_DEVICE float read_one(const device::bfloat16* from) { return device::to_float(*from); }
DGEMMA_DEVICE float read_one(const float* from) { return *from; }

// A lane's four raw logits; what is not usable is not read. Four can be read at once only where the
// vocabulary is a multiple of four, or rows would begin in between.
template <typename T>
DGEMMA_DEVICE void read_entries(const Logits& logits, int64_t row, int32_t first, uint32_t usable,
                                float (&raw)[kLaneEntries]) {
  const T* const from = static_cast<const T*>(logits.raw) + row * logits.vocabulary + first;
  if (usable == 0xfu && logits.vocabulary % kLaneEntries == 0) return read_four(from, raw);
#pragma unroll
  for (int i = 0; i < kLaneEntries; ++i) raw[i] = usable >> i & 1 ? read_one(from + i) : 0.0f;
}

DGEMMA_DEVICE float warp_max(float value) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2)
    value = fmaxf(value, __shfl_xor_sync(device::kAllLanes, value, lanes));
  return value;
}

// The same tree in every lane, so the bits do not depend on who asks.
DGEMMA_DEVICE float warp_sum(float value) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2)
    value += __shfl_xor_sync(device::kAllLanes, value, lanes);
  return value;
}

// The statistics of one tile of one row, the same in all lanes that have the row.
struct TileStatistics {
  float max;      // of z; -infinity where nothing is usable
  float sum;      // of exp(z - max)
  float shifted;  // of exp(z - max) (z - max); NaN where a usable logit is not finite
  float best;     // largest raw logit, NaN apart; -infinity where there is none
  int32_t index;  // the lowest entry that has it
};

// A row of a tile by kLanes lanes side by side: lane l has four entries from 4 l on, and in steps
// of 4 kLanes from there. Sums are made in one tree, whatever the number of lanes.
template <int kLanes>
struct RowOfTile {
  static constexpr int kQuads = 32 / kLanes;
  static constexpr int kEntries = kLaneEntries * kQuads;

  // The distance from a lane's first entry to its i-th.
  static DGEMMA_DEVICE int32_t offset(int i) {
    return i / kLaneEntries * kLaneEntries * kLanes + i % kLaneEntries;
  }
  // A bit for each of a lane's entries that exists and is allowed.
  static DGEMMA_DEVICE uint32_t usable(const uint32_t* bits, int32_t vocabulary, int32_t first) {
    uint32_t usable = 0;
#pragma unroll
    for (int i = 0; i < kEntries; i += kLaneEntries) {
      const int32_t left = ::min(::max(vocabulary - first - offset(i), 0), kLaneEntries);
      usable |= ((1u << left) - 1) << i;
    }
    if (bits == nullptr) return usable;
    uint32_t allowed = 0;
#pragma unroll
    for (int i = 0; i < kEntries; i += kLaneEntries) {
      const int32_t at = first + offset(i);
      const uint32_t word = at < vocabulary ? bits[at / 32] : 0;
      allowed |= (word >> at % 32 & 0xf) << i;
    }
    return usable & allowed;
  }
  static DGEMMA_DEVICE float max(float value) {
#pragma unroll
    for (int lanes = kLanes / 2; lanes > 0; lanes /= 2)
      value = fmaxf(value, __shfl_xor_sync(device::kAllLanes, value, lanes));
    return value;
  }
  static DGEMMA_DEVICE int32_t min(int32_t value) {
    if constexpr (kLanes == 32) {
      return __reduce_min_sync(device::kAllLanes, value);
    } else {
#pragma unroll
      for (int lanes = kLanes / 2; lanes > 0; lanes /= 2)
        value = ::min(value, __shfl_xor_sync(device::kAllLanes, value, lanes));
      return value;
    }
  }
  static DGEMMA_DEVICE float sum(float (&value)[kQuads]) {
#pragma unroll
    for (int half = kQuads / 2; half > 0; half /= 2)
#pragma unroll
      for (int i = 0; i < half; ++i) value[i] += value[i + half];
    float total = value[0];
#pragma unroll
    for (int lanes = kLanes / 2; lanes > 0; lanes /= 2)
      total += __shfl_xor_sync(device::kAllLanes, total, lanes);
    return total;
  }
  static DGEMMA_DEVICE bool any(bool value) {
    const uint32_t lanes = __ballot_sync(device::kAllLanes, value);
    const uint32_t mine = static_cast<uint32_t>((uint64_t{1} << kLanes) - 1);
    return (lanes >> device::lane_index() / kLanes * kLanes & mine) != 0;
  }
};

// The 32 lanes of a warp call this, those of a row side by side. A lane has kEntries of each of
// kGroups rows, one row's after the other's in `raw`. `first` is the lane's first entry, `usable`
// has a bit for each of its entries of a row. There is no branch within, so that the entries'
// chains of tanh and exp run side by side, and one row's sums beside another row's entries.
template <int kEntries, int kGroups>
DGEMMA_DEVICE void tile_statistics(const float (&raw)[kGroups * kEntries],
                                   const uint32_t (&usable)[kGroups], int32_t first,
                                   const LogitScale& scale, TileStatistics (&tile)[kGroups]) {
  using Row = RowOfTile<kTile / kEntries>;
  float z[kGroups * kEntries], best[kGroups];
  int32_t index[kGroups];
  bool finite[kGroups];
  scale(raw, z);
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    tile[g].max = best[g] = -INFINITY;
    index[g] = INT32_MAX;
    finite[g] = true;
#pragma unroll
    for (int i = 0; i < kEntries; ++i) {
      const int at = g * kEntries + i;
      const bool use = (usable[g] >> i & 1) != 0;
      finite[g] = finite[g] && (!use || fabsf(raw[at]) < INFINITY);
      z[at] = use ? z[at] : -INFINITY;
      tile[g].max = fmaxf(tile[g].max, z[at]);
      const bool beats = use && raw[at] > best[g];
      best[g] = beats ? raw[at] : best[g];
      index[g] = beats ? first + Row::offset(i) : index[g];
    }
  }
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    tile[g].max = Row::max(tile[g].max);
    tile[g].best = Row::max(best[g]);
  }
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    tile[g].index = Row::min(best[g] == tile[g].best ? index[g] : INT32_MAX);
    float sum[Row::kQuads] = {}, shifted[Row::kQuads] = {};
    // Every mass of a tile without usable entries is exp(-infinity).
    const float top = tile[g].max > -INFINITY ? tile[g].max : 0.0f;
#pragma unroll
    for (int i = 0; i < kEntries; ++i) {
      const int quad = i / kLaneEntries;
      const float below = z[g * kEntries + i] - top, mass = expf(below);
      sum[quad] += mass;
      // Far below, mass is zero and below may be large; their product is zero.
      shifted[quad] = mass > 0.0f ? fmaf(mass, below, shifted[quad]) : shifted[quad];
    }
    tile[g].sum = Row::sum(sum);
    tile[g].shifted = Row::sum(shifted);
    if (Row::any(!finite[g])) tile[g].shifted = NAN;
  }
}

// The mass of a tile as the row's sum and the sampling count it.
DGEMMA_DEVICE double tile_mass(float tile_max, float tile_sum, float row_max) {
  return tile_sum > 0.0f ? static_cast<double>(tile_sum) * expf(tile_max - row_max) : 0.0;
}

}  // namespace
}  // namespace dgemma
