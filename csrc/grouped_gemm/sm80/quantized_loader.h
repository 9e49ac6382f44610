// The copies of the kernels over quantized weights by mma.sync: a ring of stages in shared memory,
// filled by cp.async as the checkpoint's bytes lie. What the stages are for, and how a kernel
// describes its rows, is in sm80/quantized_pipeline.h.
#pragma once

#include "device/cp_async.h"
#include "device/language.h"
#include "grouped_gemm/cuda/moe_scheduler.h"
#include "grouped_gemm/cuda/quantized.h"

namespace dgemma::moe_quantized {

using device::bfloat16;

template <Encoding kEncoding>
constexpr bool kTokensAreBytes =
    kEncoding == Encoding::kFp8Activations || kEncoding == Encoding::kInt8;
template <Encoding kEncoding>
constexpr int32_t kRowBytes = quantized_row_bytes(kFormat<kEncoding>);

// 16-byte pieces of a row in a stage, and the rows that the block's threads copy at once.
template <Encoding kEncoding>
constexpr int32_t kPieces = kRowBytes<kEncoding> / 16;
template <Encoding kEncoding>
constexpr int32_t kRowsAtOnce = kQuantizedThreads / kPieces<kEncoding>;
// Bytes of a token's value.
template <Encoding kEncoding>
constexpr int32_t kTokenBytes = kTokensAreBytes<kEncoding> ? 1 : 2;
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
  uint8_t scales[kHasScales<kEncoding> ? kQuantizedWeightRows : 0][kQuantizedScaleBytes];
};
template <Encoding kEncoding, int kTokens>
struct Ring {
  static constexpr int32_t kStages = quantized_stages(kTokens);
  Stage<kEncoding, kTokens> stage[kStages];
};
static_assert(sizeof(Ring<Encoding::kFp8, 64>) <= 49152);

// The place of a piece of a token row. The four threads that share a row read the pieces 2 j, then
// the pieces 2 j + 1: those side by side, and two rows that follow each other in different banks.
// With tokens in bytes they read the piece j, and two rows lie in different banks as they are.
template <Encoding kEncoding>
DGEMMA_DEVICE int32_t place_of(int32_t row, int32_t piece) {
  return kTokensAreBytes<kEncoding> ? piece : (piece % 2 * 4 + piece / 2) ^ (row % 2 * 4);
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
    if constexpr (kHasScales<kEncoding>) {
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
      if constexpr (kHasScales<kEncoding>) start_scales(to);
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

}  // namespace dgemma::moe_quantized
