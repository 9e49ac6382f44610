// The matrix operations of a warp: ldmatrix, stmatrix, mma.sync.
#include <bit>
#include <cmath>
#include <cstring>

#include "operations.h"
#include "shadow.h"

namespace sim {

namespace {

float bfloat16_at(uint32_t packed, int half) {
  return std::bit_cast<float>(half ? packed & 0xffff0000u : packed << 16);
}

struct Tiles {
  uint32_t* tile;
  const uint8_t* row;
};

// Element `half` of the pair that a lane holds of an 8x8 tile.
struct Position {
  uint32_t row, column;
};
Position held_by(uint32_t lane, uint32_t half, bool transposed) {
  const Position plain{lane / 4, 2 * (lane % 4) + half};
  return transposed ? Position{plain.column, plain.row} : plain;
}

struct TileRequest {
  int count;
  bool transposed, store;
};

void move_tiles(void* const* argument, uint32_t, void* context) {
  const auto& request = *static_cast<const TileRequest*>(context);
  for (int t = 0; t < request.count; ++t) {
    for (uint32_t lane = 0; lane < 32; ++lane) {
      auto* half = reinterpret_cast<uint16_t*>(&static_cast<const Tiles*>(argument[lane])->tile[t]);
      for (uint32_t h = 0; h < 2; ++h) {
        const Position at = held_by(lane, h, request.transposed);
        const auto* owner = static_cast<const Tiles*>(argument[8 * t + at.row]);
        auto* place = const_cast<uint8_t*>(owner->row) + 2 * at.column;
        if (request.store)
          std::memcpy(place, half + h, 2);
        else
          std::memcpy(half + h, place, 2);
      }
    }
  }
}

void check_rows(const void* row, int count, bool write, const char* what, const Source& source) {
  if (self().index % 32 >= 8u * static_cast<uint32_t>(count)) return;
  const SharedPlace place = shared_place(row, 16, 16, what, source);
  if (place.block != self().block) fail(source, "%s: a row in another block's shared memory", what);
  self().touched = true;
  touch_or_fail(*place.block, place.offset, 16, write ? kWrite : kRead, actor(self()), source,
                what);
}

template <typename Element>
struct FragmentsOf {
  Element* d;
  const uint32_t *a, *b;
};
using Fragments = FragmentsOf<float>;

float e4m3_to_float(uint8_t bits) {
  const int exponent = bits >> 3 & 15, fraction = bits & 7;
  if ((bits & 0x7f) == 0x7f) return NAN;
  const float magnitude = exponent == 0
                              ? std::ldexp(static_cast<float>(fraction), -9)
                              : std::ldexp(static_cast<float>(8 + fraction), exponent - 10);
  return bits & 0x80 ? -magnitude : magnitude;
}

// Products of bytes, of which a lane holds four columns of A, or rows of B, in a register.
// value_of(byte) is one as a number; after(accumulators) is called when products were added to a
// lane's. Element is uint32_t for integers, which wrap.
template <typename Element, typename ValueOf, typename After>
void multiply_bytes(void* const* argument, const ValueOf& value_of, const After& after) {
  Element a[16][32], b[32][8];
  for (uint32_t lane = 0; lane < 32; ++lane) {
    const auto& f = *static_cast<const FragmentsOf<Element>*>(argument[lane]);
    const uint32_t g = lane / 4, q = 4 * (lane % 4);
    for (uint32_t i = 0; i < 4; ++i) {
      const auto value = [&](uint32_t four) {
        return value_of(static_cast<uint8_t>(four >> 8 * i & 0xff));
      };
      a[g][q + i] = value(f.a[0]);
      a[g + 8][q + i] = value(f.a[1]);
      a[g][q + 16 + i] = value(f.a[2]);
      a[g + 8][q + 16 + i] = value(f.a[3]);
      b[q + i][g] = value(f.b[0]);
      b[q + 16 + i][g] = value(f.b[1]);
    }
  }
  Element d[16][8] = {};
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < 32; ++k)
      for (int j = 0; j < 8; ++j) d[i][j] += a[i][k] * b[k][j];
  for (uint32_t lane = 0; lane < 32; ++lane) {
    Element* out = static_cast<const FragmentsOf<Element>*>(argument[lane])->d;
    const uint32_t g = lane / 4, c = 2 * (lane % 4);
    for (uint32_t i = 0; i < 4; ++i) out[i] += d[g + 8 * (i / 2)][c + i % 2];
    after(out);
  }
  machine->statistics.products += 16 * 8 * 32;
}

void multiply_e4m3(void* const* argument, uint32_t, void*) {
  multiply_bytes<float>(
      argument, [](uint8_t byte) { return e4m3_values[byte]; },
      [](float* sums) { cut_to_14_bits(sums, 4); });
}

void multiply_int8(void* const* argument, uint32_t, void*) {
  const auto value = [](uint8_t byte) {
    return static_cast<uint32_t>(static_cast<int32_t>(static_cast<int8_t>(byte)));
  };
  multiply_bytes<uint32_t>(argument, value, [](uint32_t*) {});
}

void multiply(void* const* argument, uint32_t, void*) {
  float a[16][16], b[16][8];
  for (uint32_t lane = 0; lane < 32; ++lane) {
    const auto& f = *static_cast<const Fragments*>(argument[lane]);
    const uint32_t g = lane / 4, c = 2 * (lane % 4);
    for (uint32_t h = 0; h < 2; ++h) {
      a[g][c + h] = bfloat16_at(f.a[0], h);
      a[g + 8][c + h] = bfloat16_at(f.a[1], h);
      a[g][c + 8 + h] = bfloat16_at(f.a[2], h);
      a[g + 8][c + 8 + h] = bfloat16_at(f.a[3], h);
      b[c + h][g] = bfloat16_at(f.b[0], h);
      b[c + 8 + h][g] = bfloat16_at(f.b[1], h);
    }
  }
  float d[16][8] = {};
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < 16; ++k)
      for (int j = 0; j < 8; ++j) d[i][j] += a[i][k] * b[k][j];
  for (uint32_t lane = 0; lane < 32; ++lane) {
    float* out = static_cast<const Fragments*>(argument[lane])->d;
    const uint32_t g = lane / 4, c = 2 * (lane % 4);
    for (uint32_t i = 0; i < 4; ++i) out[i] += d[g + 8 * (i / 2)][c + i % 2];
  }
  machine->statistics.products += 16 * 8 * 16;
}

}  // namespace

const std::array<float, 256> e4m3_values = [] {
  std::array<float, 256> all;
  for (uint32_t i = 0; i < 256; ++i) all[i] = e4m3_to_float(static_cast<uint8_t>(i));
  return all;
}();

void cut_to_14_bits(float* sums, uint32_t count) {
  for (uint32_t i = 0; i < count; ++i)
    sums[i] = std::bit_cast<float>(std::bit_cast<uint32_t>(sums[i]) & ~0x3ffu);
}

void load_tiles(uint32_t* tile, int count, const void* row, bool transposed, const Source& source) {
  check_rows(row, count, false, "load_tiles", source);
  Tiles tiles{tile, static_cast<const uint8_t*>(row)};
  TileRequest request{count, transposed, false};
  warp_collective(0xffffffffu, "load_tiles", &tiles, move_tiles, &request, source);
}

void store_tiles(void* row, const uint32_t* tile, int count, bool transposed,
                 const Source& source) {
  check_rows(row, count, true, "store_tiles", source);
  Tiles tiles{const_cast<uint32_t*>(tile), static_cast<const uint8_t*>(row)};
  TileRequest request{count, transposed, true};
  warp_collective(0xffffffffu, "store_tiles", &tiles, move_tiles, &request, source);
}

float multiply_add_to_odd(float a, float b, float c) {
  const double product = static_cast<double>(a) * b, sum = product + c;  // the product is exact
  if (!std::isfinite(sum)) return static_cast<float>(sum);
  // The rounding error of the sum (Knuth, "The Art of Computer Programming", 4.2.2).
  const double part = sum - product, lost = (product - (sum - part)) + (c - part);
  float out = static_cast<float>(sum);
  const double over = out - sum;
  if (std::isinf(out) || (over == 0 && lost == 0)) return out;
  // Toward zero, then odd.
  const bool away = over != 0 ? (over > 0) == (sum > 0) : (lost > 0) != (sum > 0);
  if (away) out = std::nextafter(out, 0.0f);
  return std::bit_cast<float>(std::bit_cast<uint32_t>(out) | 1u);
}

void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b, const Source& source) {
  Fragments fragments{d, a, b};
  warp_collective(0xffffffffu, "mma_m16n8k16", &fragments, multiply, nullptr, source);
}

void mma_m16n8k32_e4m3(float* d, const uint32_t* a, const uint32_t* b, const Source& source) {
  Fragments fragments{d, a, b};
  warp_collective(0xffffffffu, "mma_m16n8k32_e4m3", &fragments, multiply_e4m3, nullptr, source);
}

void mma_m16n8k32_int8(int32_t* d, const uint32_t* a, const uint32_t* b, const Source& source) {
  FragmentsOf<uint32_t> fragments{reinterpret_cast<uint32_t*>(d), a, b};
  warp_collective(0xffffffffu, "mma_m16n8k32_int8", &fragments, multiply_int8, nullptr, source);
}

}  // namespace sim
