// The pipeline of the kernels over quantized weights, on every GPU from sm_80: a ring of stages in
// shared memory, filled as the checkpoint's bytes lie (sm80/quantized_loader.h), weights decoded to
// bfloat16 in registers and multiplied by mma.sync; and bytes by bytes, multiplied as they are:
// int8 (sm80/int8_*.cu), and e4m3 where mma.sync takes it (sm89/fp8_*.cu).
//
// Weights are mma's A (16 rows), tokens its B (8 columns): a work tile is 128 weight rows, 32 for
// each of four warps, by up to kTokens tokens. A stage is 64 deep. The columns of a stage may be
// taken in any order, since their sum does not depend on it: thread lane % 4 = j of mma's four
// takes the sixteen columns 16 j and on, for four steps of 16. They lie side by side: 8 or 16 bytes
// of a weight row, which a thread loads at once, 32 bytes of a token row, and one scale, whatever
// the group. So nothing is repacked, neither weights nor activations.
//
// Blocks are persistent, and the copies run ahead from one work tile into the next, as in
// sm80/bf16_pipeline.h. What a kernel says of its work tiles is the same too (Scheduler), and of
// its rows: Rows has `matrix`, `tokens`, first_weight_row(work_tile) and, from there,
// weight_row(work_tile, row) or -1; first_token_row(work_tile) and token_row(work_tile, row)
// likewise.
#pragma once

#include <type_traits>

#include "device/mma.h"
#include "device/shared_memory.h"
#include "device/warp.h"
#include "grouped_gemm/sm80/quantized_loader.h"

namespace dgemma::moe_quantized {

// The products of a warp: [16 weight rows][8 tokens][mma's accumulators].
constexpr int32_t kRowTiles = kQuantizedWeightRows / 4 / 16;
template <int kColumns, typename Element = float>
using Sum = Element[kRowTiles][kColumns][4];
template <Encoding kEncoding>
using SumElement = std::conditional_t<kEncoding == Encoding::kInt8, int32_t, float>;

// The first of a work tile's weight rows in a row tile of this warp.
DGEMMA_DEVICE int32_t first_row(int tile) {
  return 32 * static_cast<int32_t>(device::warp_index()) + 16 * tile;
}
// The tile's row that is this thread's, of the upper eight (half 0) or the lower.
DGEMMA_DEVICE int32_t own_row(int tile, int half) {
  return first_row(tile) + 8 * half + static_cast<int32_t>(device::lane_index() / 4);
}

// The two tokens of every eight that a thread has products of.
DGEMMA_DEVICE int32_t own_token(int group, int which) {
  return 8 * group + 2 * static_cast<int32_t>(device::lane_index() % 4) + which;
}

// A thread's rows of the current work tile.
struct OwnRows {
  float factor[kRowTiles][2];    // the sums are multiplied by this
  uint32_t shift[kRowTiles][2];  // where a row's scales begin in a word
};

template <Encoding kEncoding, typename Rows, typename Unit>
DGEMMA_DEVICE OwnRows find_own_rows(const Rows& rows, const Unit& work_tile) {
  OwnRows own;
  const QuantizedMatrix& matrix = rows.matrix;
#pragma unroll
  for (int i = 0; i < 2 * kRowTiles; ++i) {
    const int32_t row = rows.first_weight_row(work_tile) +
                        max(0, rows.weight_row(work_tile, own_row(i / 2, i % 2)));
    own.factor[i / 2][i % 2] = kUnit<kEncoding> * matrix.row_scale(row);
    own.shift[i / 2][i % 2] =
        static_cast<uint32_t>(row) * static_cast<uint32_t>(matrix.scale_bytes) % 4;
  }
  return own;
}

// The offsets of a thread's operands in every stage, so that nothing of them is computed twice.
template <Encoding kEncoding>
struct Places {
  int32_t weights;                         // of its first row
  int32_t scales;                          // likewise, without the row's shift
  int32_t tokens[kTokenParts<kEncoding>];  // of the first eight tokens, by part of the columns

  DGEMMA_DEVICE explicit Places(int32_t group_bits) {
    const int32_t lane = static_cast<int32_t>(device::lane_index()), quad = lane % 4;
    weights = own_row(0, 0) * kRowBytes<kEncoding> + quad * (kRowBytes<kEncoding> / 4);
    scales =
        own_row(0, 0) * kQuantizedScaleBytes + (16 * quad >> group_bits) * kScaleBytes<kEncoding>;
#pragma unroll
    for (int part = 0; part < kTokenParts<kEncoding>; ++part) {
      const int32_t piece = kTokenParts<kEncoding> * quad + part;
      tokens[part] =
          (lane / 4 * kTokenPieces<kEncoding> + place_of<kEncoding>(lane / 4, piece)) * 16;
    }
  }
};

// Adds a stage's products. kColumns: the groups of 8 tokens. `offset` is that of the step's scales
// in their row, in bytes.
template <Encoding kEncoding, int kColumns, int kTokens>
DGEMMA_DEVICE void multiply_stage(const Stage<kEncoding, kTokens>& stage,
                                  const Places<kEncoding>& places, const OwnRows& own,
                                  uint32_t offset, Sum<kColumns>& sum) {
  constexpr int kWords = kRowBytes<kEncoding> / 16;  // a thread's part of a row
  uint32_t word[kRowTiles][2][kWords];
  Scale<kEncoding> scale[kRowTiles][2] = {};
  const uint8_t* weights = stage.weights[0] + places.weights;
#pragma unroll
  for (int tile = 0; tile < kRowTiles; ++tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint8_t* from = weights + (16 * tile + 8 * half) * kRowBytes<kEncoding>;
      uint32_t (&to)[kWords] = word[tile][half];
      if constexpr (kWords == 4) {
        const uint4 values = *reinterpret_cast<const uint4*>(from);
        to[0] = values.x, to[1] = values.y, to[2] = values.z, to[3] = values.w;
      } else {
        const uint2 values = *reinterpret_cast<const uint2*>(from);
        to[0] = values.x, to[1] = values.y;
      }
    }
    if constexpr (kHasScales<kEncoding>) {
      uint32_t bits[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint8_t* from = stage.scales[0] + places.scales +
                              (16 * tile + 8 * half) * kQuantizedScaleBytes +
                              ((own.shift[tile][half] + offset) & 3u);
        if constexpr (kScaleBytes<kEncoding> == 1)
          bits[half] = *from;
        else
          bits[half] = *reinterpret_cast<const uint16_t*>(from);
      }
      decode_scales<kEncoding>(bits[0], bits[1], scale[tile]);
    }
  }

#pragma unroll
  for (int part = 0; part < 2; ++part) {
    // Eight columns of every row: A of two steps.
    uint32_t a[kRowTiles][2][4];
#pragma unroll
    for (int tile = 0; tile < kRowTiles; ++tile) {
      uint32_t pair[2][4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t (&from)[kWords] = word[tile][half];
        decode_weights<kEncoding>(from[part * kWords / 2], from[part * kWords / 2 + kWords / 4],
                                  scale[tile][half], pair[half]);
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) a[tile][i / 4][i % 4] = pair[i % 2][i / 2];
    }
    const uint8_t* tokens = stage.tokens[0][0] + places.tokens[part];
#pragma unroll
    for (int group = 0; group < kColumns; ++group) {
      const uint4 b =
          *reinterpret_cast<const uint4*>(tokens + 8 * group * kTokenPieces<kEncoding> * 16);
      const uint32_t first[2] = {b.x, b.y}, second[2] = {b.z, b.w};
#pragma unroll
      for (int tile = 0; tile < kRowTiles; ++tile) {
        device::mma_m16n8k16(sum[tile][group], a[tile][0], first);
        device::mma_m16n8k16(sum[tile][group], a[tile][1], second);
      }
    }
  }
}

// Of e4m3 the tensor core's sums keep about 14 bits, so a stage's is added in fp32.
DGEMMA_DEVICE void multiply_bytes(float (&sum)[4], const uint32_t (&a)[2][4],
                                  const uint32_t (&first)[2], const uint32_t (&second)[2]) {
  float of_stage[4] = {};
  device::mma_m16n8k32_e4m3(of_stage, a[0], first);
  device::mma_m16n8k32_e4m3(of_stage, a[1], second);
#pragma unroll
  for (int i = 0; i < 4; ++i) sum[i] += of_stage[i];
}
// Sums of int8 are exact: of 16,384 products of at most 2^14 each, 2^28.
DGEMMA_DEVICE void multiply_bytes(int32_t (&sum)[4], const uint32_t (&a)[2][4],
                                  const uint32_t (&first)[2], const uint32_t (&second)[2]) {
  device::mma_m16n8k32_int8(sum, a[0], first);
  device::mma_m16n8k32_int8(sum, a[1], second);
}

// The same of bytes by bytes. A thread's 16 bytes of a row are, as they are, its part of A or of B
// in two steps of 32.
template <Encoding kEncoding, int kColumns, int kTokens, typename Element>
DGEMMA_DEVICE void multiply_stage_of_bytes(const Stage<kEncoding, kTokens>& stage,
                                           const Places<kEncoding>& places,
                                           Sum<kColumns, Element>& sum) {
  static_assert(std::is_same_v<Element, int32_t> == (kEncoding == Encoding::kInt8));
  uint32_t a[kRowTiles][2][4];
#pragma unroll
  for (int i = 0; i < 2 * kRowTiles; ++i) {
    const int tile = i / 2, half = i % 2;
    const uint4 row = *reinterpret_cast<const uint4*>(stage.weights[0] + places.weights +
                                                      8 * i * kRowBytes<kEncoding>);
    a[tile][0][half] = row.x, a[tile][0][half + 2] = row.y;
    a[tile][1][half] = row.z, a[tile][1][half + 2] = row.w;
  }
#pragma unroll
  for (int group = 0; group < kColumns; ++group) {
    const uint4 b = *reinterpret_cast<const uint4*>(stage.tokens[0][0] + places.tokens[0] +
                                                    8 * group * kTokenPieces<kEncoding> * 16);
    const uint32_t first[2] = {b.x, b.y}, second[2] = {b.z, b.w};
#pragma unroll
    for (int tile = 0; tile < kRowTiles; ++tile)
      multiply_bytes(sum[tile][group], a[tile], first, second);
  }
}

template <Encoding kEncoding, int kTokens, typename Scheduler, typename Rows>
struct Pipeline {
  static constexpr int32_t kStages = Ring<kEncoding, kTokens>::kStages;
  // Groups of 8 tokens in a quarter of the tile.
  static constexpr int32_t kQuarter = kTokens / 8 / 4;

  Loader<kEncoding, kTokens, Scheduler, Rows> loader;
  const Places<kEncoding> places;
  int32_t stage = 0;

  DGEMMA_DEVICE Pipeline(Ring<kEncoding, kTokens>& ring, const Scheduler& scheduler,
                         const Rows& rows)
      : loader(ring, scheduler, rows), places(rows.matrix.group_bits) {
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) loader.start();
  }

  // Adds the products of the next `steps` stages, of which `step` is the first one's number.
  template <int kColumns, typename Element>
  DGEMMA_DEVICE void multiply(const OwnRows& own, int32_t step, int32_t steps,
                              Sum<kColumns, Element>& sum) {
    for (const int32_t end = step + steps; step < end; ++step) {
      device::cp_async_wait<kStages - 2>();
      // This step's copies are visible to all, and no warp still reads the stage that is filled
      // next.
      __syncthreads();
      loader.start();
      const auto& here = loader.ring.stage[stage];
      if constexpr (kTokensAreBytes<kEncoding>) {
        multiply_stage_of_bytes<kEncoding, kColumns, kTokens, Element>(here, places, sum);
      } else {
        const uint32_t offset =
            kHasScales<kEncoding>
                ? static_cast<uint32_t>(scales_of<kEncoding>(loader.rows.matrix, step))
                : 0;
        multiply_stage<kEncoding, kColumns>(here, places, own, offset, sum);
      }
      stage = stage + 1 < kStages ? stage + 1 : 0;
    }
  }

  // Calls consume(integral constant, work_tile) for every work tile of this block: how many groups
  // of 8 tokens are multiplied, enough for the work tile's rows.
  template <typename Consume>
  DGEMMA_DEVICE void for_each_work_tile(Consume consume) {
    for (int32_t index = static_cast<int32_t>(blockIdx.x); index < loader.work_tiles;
         index += static_cast<int32_t>(gridDim.x)) {
      const auto work_tile = loader.scheduler.find(kTokens, index);
      const int32_t quarters = (work_tile.rows + kTokens / 4 - 1) / (kTokens / 4);
      if (quarters <= 1)
        consume(std::integral_constant<int, kQuarter>(), work_tile);
      else if (quarters == 2)
        consume(std::integral_constant<int, 2 * kQuarter>(), work_tile);
      else if (quarters == 3)
        consume(std::integral_constant<int, 3 * kQuarter>(), work_tile);
      else
        consume(std::integral_constant<int, 4 * kQuarter>(), work_tile);
    }
  }
};

}  // namespace dgemma::moe_quantized
