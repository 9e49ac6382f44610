// The pipeline of the kernels over quantized weights, on every GPU from sm_80: a ring of stages in
// shared memory, filled by cp.async as the checkpoint's bytes lie, weights decoded to bfloat16 in
// registers and multiplied by mma.sync; and, where mma.sync multiplies e4m3 (sm89/fp8_*.cu),
// weights and tokens of FP8 multiplied as they are.
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

#include "device/cp_async.h"
#include "device/mma.h"
#include "device/shared_memory.h"
#include "device/warp.h"
#include "grouped_gemm/cuda/moe_scheduler.h"
#include "grouped_gemm/cuda/quantized.h"

namespace dgemma::moe_quantized {

using device::bfloat16;

template <Encoding kEncoding>
constexpr bool kTokensAreFp8 = kEncoding == Encoding::kFp8Activations;
template <Encoding kEncoding>
constexpr int32_t kRowBytes = quantized_row_bytes(kFormat<kEncoding>);

// 16-byte pieces of a row in a stage, and the rows that the block's threads copy at once.
template <Encoding kEncoding>
constexpr int32_t kPieces = kRowBytes<kEncoding> / 16;
template <Encoding kEncoding>
constexpr int32_t kRowsAtOnce = kQuantizedThreads / kPieces<kEncoding>;
// Bytes of a token's value.
template <Encoding kEncoding>
constexpr int32_t kTokenBytes = kTokensAreFp8<kEncoding> ? 1 : 2;
template <Encoding kEncoding>
constexpr int32_t kTokenPieces = kMoeDepth * kTokenBytes<kEncoding> / 16;
// Pieces of a token row that a thread takes.
template <Encoding kEncoding>
constexpr int32_t kTokenParts = kTokenPieces<kEncoding> / 4;
template <Encoding kEncoding>
constexpr int32_t kTokensAtOnce = kQuantizedThreads / kTokenPieces<kEncoding>;
static_assert(kQuantizedThreads == kQuantizedWeightRows);  // a thread copies the scales of its row

template <Encoding kEncoding, int kTokens>
struct Stage {
  alignas(128) uint8_t weights[kQuantizedWeightRows][kRowBytes<kEncoding>];
  alignas(128) uint8_t tokens[kTokens][kTokenPieces<kEncoding>][16];  // pieces by place_of
  uint8_t scales[kIsFp8<kEncoding> ? 0 : kQuantizedWeightRows][kQuantizedScaleBytes];
};
template <Encoding kEncoding, int kTokens>
struct Ring {
  static constexpr int32_t kStages = quantized_stages(kTokens);
  Stage<kEncoding, kTokens> stage[kStages];
};
static_assert(sizeof(Ring<Encoding::kFp8, 64>) <= 49152);

// The place of a piece of a token row. The four threads that share a row read the pieces 2 j, then
// the pieces 2 j + 1: those side by side, and two rows that follow each other in different banks.
// With tokens in FP8 they read the piece j, and two rows lie in different banks as they are.
template <Encoding kEncoding>
DGEMMA_DEVICE int32_t place_of(int32_t row, int32_t piece) {
  return kTokensAreFp8<kEncoding> ? piece : (piece % 2 * 4 + piece / 2) ^ (row % 2 * 4);
}

// The offset of a step's scales in their row, in bytes.
template <Encoding kEncoding>
DGEMMA_DEVICE int32_t scales_of(const QuantizedMatrix& matrix, int32_t step) {
  return ((step * kMoeDepth) >> matrix.group_bits) * kScaleBytes<kEncoding>;
}

// A thread's share of the copies, stage after stage, work tile after work tile. Where they begin is
// kept as one address for the work tile and offsets in 32 bits: an expert has at most 2^31 bytes of
// weights, its tokens less. An address for every copy would take more registers than there are.
template <Encoding kEncoding, int kTokens, typename Scheduler, typename Rows>
struct Loader {
  using Unit = decltype(Scheduler().find(kTokens, 0));
  static constexpr int kWeightCopies = kQuantizedWeightRows / kRowsAtOnce<kEncoding>;
  static constexpr int kTokenCopies = kTokens / kTokensAtOnce<kEncoding>;
  static constexpr uint32_t kNone = UINT32_MAX;

  Ring<kEncoding, kTokens>& ring;
  const Scheduler& scheduler;
  const Rows& rows;
  const int32_t work_tiles;
  int32_t index;           // of the work tile
  int32_t step, end_step;  // of the work tile
  int32_t stage = 0;
  const uint8_t* weights;  // of the work tile's matrix, at this step
  const uint8_t* scales;   // likewise, at the first step
  const char* tokens;      // of the work tile's first row, at this step
  uint32_t weight_offset[kWeightCopies], token_offset[kTokenCopies], scale_offset;  // or kNone

  DGEMMA_DEVICE Loader(Ring<kEncoding, kTokens>& ring, const Scheduler& scheduler, const Rows& rows)
      : ring(ring),
        scheduler(scheduler),
        rows(rows),
        work_tiles(scheduler.count()),
        index(static_cast<int32_t>(blockIdx.x)) {
    begin_work_tile();
  }

  DGEMMA_DEVICE void begin_work_tile() {
    if (index >= work_tiles) return;
    const Unit work_tile = scheduler.find(kTokens, index);
    const QuantizedMatrix& matrix = rows.matrix;
    const int32_t thread = static_cast<int32_t>(threadIdx.x);
    step = scheduler.first_step(work_tile);
    end_step = step + scheduler.steps(work_tile);
    const int64_t first = rows.first_weight_row(work_tile);
    weights = matrix.values + first * matrix.value_bytes + step * kRowBytes<kEncoding>;
#pragma unroll
    for (int i = 0; i < kWeightCopies; ++i) {
      const int32_t row =
          rows.weight_row(work_tile, thread / kPieces<kEncoding> + i * kRowsAtOnce<kEncoding>);
      weight_offset[i] =
          row < 0 ? kNone
                  : static_cast<uint32_t>(row) * static_cast<uint32_t>(matrix.value_bytes) +
                        static_cast<uint32_t>(thread % kPieces<kEncoding> * 16);
    }
    tokens = reinterpret_cast<const char*>(
        rows.tokens + rows.first_token_row(work_tile) * matrix.columns + step * kMoeDepth);
#pragma unroll
    for (int i = 0; i < kTokenCopies; ++i) {
      const int32_t at = thread / kTokenPieces<kEncoding> + i * kTokensAtOnce<kEncoding>;
      token_offset[i] =
          at >= work_tile.rows
              ? kNone
              : static_cast<uint32_t>(rows.token_row(work_tile, at)) *
                        static_cast<uint32_t>(kTokenBytes<kEncoding> * matrix.columns) +
                    static_cast<uint32_t>(thread % kTokenPieces<kEncoding> * 16);
    }
    if constexpr (!kIsFp8<kEncoding>) {
      const int32_t row = rows.weight_row(work_tile, thread);
      scales = matrix.scales + first * matrix.scale_bytes;
      scale_offset =
          row < 0 ? kNone : static_cast<uint32_t>(row) * static_cast<uint32_t>(matrix.scale_bytes);
    }
  }

  // Starts the copies of the next stage. Weights and tokens past the last column or weight row
  // become zero; rows past the work tile's tokens are left as they are: a product's columns do not
  // mix, and those are not stored. When no work is left the group is empty, so that there are as
  // many groups as stages.
  DGEMMA_DEVICE void start() {
    if (index < work_tiles) {
      const int32_t thread = static_cast<int32_t>(threadIdx.x);
      const QuantizedMatrix& matrix = rows.matrix;
      Stage<kEncoding, kTokens>& to = ring.stage[stage];
      {
        const int32_t row = thread / kPieces<kEncoding>, piece = thread % kPieces<kEncoding>;
        const bool inside = step * kRowBytes<kEncoding> + piece * 16 < matrix.value_bytes;
#pragma unroll
        for (int i = 0; i < kWeightCopies; ++i) {
          const bool there = inside && weight_offset[i] != kNone;
          device::cp_async_16(&to.weights[row + i * kRowsAtOnce<kEncoding>][piece * 16],
                              weights + (there ? weight_offset[i] : 0), there ? 16 : 0);
        }
      }
      const int32_t row = thread / kTokenPieces<kEncoding>;
      const int32_t piece = thread % kTokenPieces<kEncoding>;
      const bool inside = step * kMoeDepth + piece * (16 / kTokenBytes<kEncoding>) < matrix.columns;
#pragma unroll
      for (int i = 0; i < kTokenCopies; ++i) {
        if (token_offset[i] == kNone) continue;
        // Rows that are an even number apart have their pieces in the same places.
        device::cp_async_16(
            to.tokens[row + i * kTokensAtOnce<kEncoding>][place_of<kEncoding>(row, piece)],
            tokens + (inside ? token_offset[i] : 0), inside ? 16 : 0);
      }
      if constexpr (!kIsFp8<kEncoding>) start_scales(to);
      weights += kRowBytes<kEncoding>;
      tokens += kTokenBytes<kEncoding> * kMoeDepth;
      stage = stage + 1 < Ring<kEncoding, kTokens>::kStages ? stage + 1 : 0;
      if (++step == end_step) {
        index += static_cast<int32_t>(gridDim.x);
        begin_work_tile();
      }
    }
    device::cp_async_commit();
  }

  // Words of four bytes, beginning with the one in which the row's scales begin; zero where there
  // is no row. Where rows are whole words, as the model's nearly all are, one word holds them.
  // Elsewhere they may reach into a second one, of which nothing past the row is read, and the
  // first may begin with what lies in front of them.
  DGEMMA_DEVICE void start_scales(Stage<kEncoding, kTokens>& to) {
    const QuantizedMatrix& matrix = rows.matrix;
    const bool there = scale_offset != kNone;
    const uint32_t offset = there ? scale_offset : 0;
    const int32_t of_step = scales_of<kEncoding>(matrix, step);
    uint8_t* place = to.scales[threadIdx.x];
    if (matrix.scale_bytes % 4 == 0) {
      device::cp_async_4(place, scales + (offset + (static_cast<uint32_t>(of_step) & ~3u)),
                         there ? 4 : 0);
      return;
    }
    const uint8_t* first = scales + offset + of_step;
    const uint8_t* end = scales + offset + matrix.scale_bytes;
    const uint8_t* word = first - reinterpret_cast<uintptr_t>(first) % 4;
#pragma unroll
    for (int i = 0; i < 2; ++i, word += 4) {
      if (i == 1 && word == first + 4) break;
      const int32_t left = there ? static_cast<int32_t>(end - word) : 0;
      device::cp_async_4(place + 4 * i, left > 0 ? word : matrix.scales,
                         left <= 0  ? 0
                         : left < 4 ? static_cast<uint32_t>(left)
                                    : 4);
    }
  }
};

// The products of a warp: [16 weight rows][8 tokens][mma's accumulators].
constexpr int32_t kRowTiles = kQuantizedWeightRows / 4 / 16;
template <int kColumns>
using Sum = float[kRowTiles][kColumns][4];

// The first of a work tile's weight rows in a row tile of this warp.
DGEMMA_DEVICE int32_t first_row(int tile) {
  return 32 * static_cast<int32_t>(device::warp_index()) + 16 * tile;
}
// The tile's row that is this thread's, of the upper eight (half 0) or the lower.
DGEMMA_DEVICE int32_t own_row(int tile, int half) {
  return first_row(tile) + 8 * half + static_cast<int32_t>(device::lane_index() / 4);
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
  constexpr int kWords = kIsFp8<kEncoding> ? 4 : 2;  // a thread's part of a row
  uint32_t word[kRowTiles][2][kWords];
  Scale<kEncoding> scale[kRowTiles][2] = {};
  const uint8_t* weights = stage.weights[0] + places.weights;
#pragma unroll
  for (int tile = 0; tile < kRowTiles; ++tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint8_t* from = weights + (16 * tile + 8 * half) * kRowBytes<kEncoding>;
      uint32_t (&to)[kWords] = word[tile][half];
      if constexpr (kIsFp8<kEncoding>) {
        const uint4 values = *reinterpret_cast<const uint4*>(from);
        to[0] = values.x, to[1] = values.y, to[2] = values.z, to[3] = values.w;
      } else {
        const uint2 values = *reinterpret_cast<const uint2*>(from);
        to[0] = values.x, to[1] = values.y;
      }
    }
    if constexpr (!kIsFp8<kEncoding>) {
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

// The same of FP8 by FP8. A thread's 16 bytes of a row are, as they are, its part of A or of B in
// two steps of 32. The tensor core's sums keep about 14 bits, so a stage's is added in fp32.
template <int kColumns, int kTokens>
DGEMMA_DEVICE void multiply_stage_e4m3(const Stage<Encoding::kFp8Activations, kTokens>& stage,
                                       const Places<Encoding::kFp8Activations>& places,
                                       Sum<kColumns>& sum) {
  constexpr Encoding kEncoding = Encoding::kFp8Activations;
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
    for (int tile = 0; tile < kRowTiles; ++tile) {
      float of_stage[4] = {};
      device::mma_m16n8k32_e4m3(of_stage, a[tile][0], first);
      device::mma_m16n8k32_e4m3(of_stage, a[tile][1], second);
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[tile][group][i] += of_stage[i];
    }
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
  template <int kColumns>
  DGEMMA_DEVICE void multiply(const OwnRows& own, int32_t step, int32_t steps, Sum<kColumns>& sum) {
    for (const int32_t end = step + steps; step < end; ++step) {
      device::cp_async_wait<kStages - 2>();
      // This step's copies are visible to all, and no warp still reads the stage that is filled
      // next.
      __syncthreads();
      loader.start();
      const auto& here = loader.ring.stage[stage];
      if constexpr (kTokensAreFp8<kEncoding>) {
        multiply_stage_e4m3<kColumns>(here, places, sum);
      } else {
        const uint32_t offset =
            kIsFp8<kEncoding>
                ? 0
                : static_cast<uint32_t>(scales_of<kEncoding>(loader.rows.matrix, step));
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
