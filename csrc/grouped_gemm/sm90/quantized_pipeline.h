// The pipeline of the sm90 kernels over 4-bit weights: a ring of stages in shared memory, filled by
// one warpgroup; two warpgroups decode its weights into registers and multiply.
//
// Roles, work tiles and the ring's barriers are those of sm90/bf16_pipeline.h. A step is 128
// columns deep, and a stage one or two of them. Weights come as the checkpoint's bytes lie, by TMA,
// scales by cp.async, and tokens in the order of permuted_k.h, gathered by cp.async. A thread's
// weights of a row are 16 bytes: one load, without a swizzle and without bank conflicts. They
// become A of eight steps in two sets of registers: while the products of one set run, the other is
// decoded. What a kernel says of its matrix is Rows: `matrix`, and matrix_row(work_tile, row) of
// the tile's row, any row of the same expert where there is none.
#pragma once

#include "grouped_gemm/cuda/permuted_k.h"
#include "grouped_gemm/cuda/quantized.h"
#include "grouped_gemm/sm90/bf16_pipeline.h"
#include "grouped_gemm/sm90/quantized_decode.h"

namespace dgemma::moe_sm90_quantized {

using namespace moe_sm90;  // the roles; the stages are this file's
using device::bfloat16;
using device::Swizzle;

constexpr uint32_t kValueBytes = kPermutedBlock / 2;  // of a row in a step
constexpr uint32_t kBoxRows = kMoeWeightRows / 2;     // one copy's

template <int kTokens>
struct Stage {
  static constexpr int kSteps = quantized_steps_90(kTokens);
  alignas(1024) bfloat16 tokens[kSteps][2][kTokens][kMoeDepth];  // by 64 columns; swizzled
  alignas(128) uint8_t weights[kSteps][kMoeWeightRows][kValueBytes];
  // Words of four bytes, beginning with the one in which the row's scales of this stage begin.
  alignas(16) uint8_t scales[kMoeWeightRows][kSteps * kQuantizedScaleBytes90];
};

template <int kTokens>
struct WeightRing {
  static constexpr uint32_t kStages = quantized_stages_90(kTokens);
  using State = sm90::PipelineState<kStages>;
  static constexpr int kSteps = Stage<kTokens>::kSteps;
  static_assert(sizeof(Stage<kTokens>) == quantized_stage_bytes_90(kTokens));

  Stage<kTokens> stage[kStages];
  sm90::Pipeline<kStages> pipeline;
  // The first pieces, of 16 bytes, of the token rows of the work tile that is being gathered.
  uint32_t source[kTokens];
};

// One thread calls this; __syncthreads follows. The weights' bytes and every copying thread fill a
// stage.
template <int kTokens>
DGEMMA_DEVICE void initialise(WeightRing<kTokens>& ring) {
  ring.pipeline.initialise(1 + 32 + kGatheringThreads, kConsumerWarps);
  device::fence_mbarrier_init();
}

// Bytes of so many columns' scales.
template <Encoding kEncoding>
DGEMMA_DEVICE int32_t scale_bytes_of(const QuantizedMatrix& matrix, int32_t columns) {
  return (columns >> matrix.group_bits) * kScaleBytes<kEncoding>;
}

// The scales that a lane of the four producer warps copies: those of one row.
template <Encoding kEncoding, int kTokens, typename Rows>
struct ScaleCopies {
  static constexpr int kColumns = Stage<kTokens>::kSteps * kPermutedBlock;  // of a stage

  const Rows& rows;
  const int32_t tile_row, bytes;  // of a row in a stage, 2 to 16
  int32_t together;               // bytes that one copy brings: 16, 8 or 4
  const uint8_t* row;

  DGEMMA_DEVICE explicit ScaleCopies(const Rows& rows)
      : rows(rows),
        tile_row(static_cast<int32_t>(threadIdx.x - kConsumerWarps * 32)),
        bytes(scale_bytes_of<kEncoding>(rows.matrix, kColumns)) {
    const uint64_t all = static_cast<uint64_t>(bytes | rows.matrix.scale_bytes | 16) |
                         reinterpret_cast<uintptr_t>(rows.matrix.scales);
    const int32_t lowest = static_cast<int32_t>(all & 28);
    together = lowest & -lowest;
    if (rows.matrix.scale_bytes % 4 == 0 && bytes < 4) together = 4;
  }

  DGEMMA_DEVICE void begin(const MoeWorkTile& work_tile) {
    const QuantizedMatrix& matrix = rows.matrix;
    row = matrix.scales +
          static_cast<int64_t>(rows.matrix_row(work_tile, tile_row)) * matrix.scale_bytes;
  }

  // Starts the copies for the stage that begins with this step.
  DGEMMA_DEVICE void start(Stage<kTokens>& stage, int32_t step) const {
    const QuantizedMatrix& matrix = rows.matrix;
    uint8_t* to = stage.scales[tile_row];
    const int32_t before = scale_bytes_of<kEncoding>(matrix, step * kPermutedBlock);
    const int32_t word = before & ~3;
    const uint8_t* from = row + word;
    if (matrix.scale_bytes % 4 != 0 || word + max(bytes, 4) > matrix.scale_bytes) {
      start_words(to, before);
    } else if (together == 16) {
      device::cp_async_16(to, from);
    } else {
      for (int32_t at = 0; at < bytes; at += together)
        if (together == 8)
          device::cp_async_8(to + at, from + at);
        else
          device::cp_async_4(to + at, from + at);
    }
  }

  // Copies scales that begin within a word, or lie at the end of the row: with the bytes in front
  // of them, and zeros past the end.
  DGEMMA_DEVICE void start_words(uint8_t* to, int32_t before) const {
    const uint8_t* first = row + before;
    const int32_t in_front = static_cast<int32_t>(reinterpret_cast<uintptr_t>(first) % 4);
    const uint8_t* word = first - in_front;
    int32_t left = rows.matrix.scale_bytes - before + in_front;
    for (int32_t at = 0; at < bytes + in_front; at += 4, word += 4, left -= 4)
      device::cp_async_4(to + at, left > 0 ? word : rows.matrix.scales,
                         static_cast<uint32_t>(max(0, min(4, left))));
  }
};

// One warp calls this. It brings weight tiles and a quarter of their scales: nothing that the
// previous kernel writes. load(destination, barrier, work_tile, first byte of the rows) starts the
// copies of a step's values.
template <Encoding kEncoding, int kTokens, typename Rows, typename Load>
DGEMMA_DEVICE void load_weights(WeightRing<kTokens>& ring, const MoeTileScheduler& scheduler,
                                const Rows& rows, Load load) {
  ScaleCopies<kEncoding, kTokens, Rows> scales(rows);
  typename WeightRing<kTokens>::State at;
  for_each_work_tile<kTokens>(scheduler, [&](const MoeWorkTile& work_tile, bool) {
    scales.begin(work_tile);
    for (int32_t step = 0; step < scheduler.k_steps; step += ring.kSteps, at.advance()) {
      Stage<kTokens>& stage = ring.stage[at.stage];
      device::Mbarrier* const full = ring.pipeline.producer_acquire(at);
      if (device::elect_one()) {  // here, where it also brings the lanes together again
        device::mbarrier_arrive_expect_bytes(full, sizeof stage.weights);
        // A step past the last is zero.
        for (int32_t i = 0; i < ring.kSteps; ++i)
          load(stage.weights[i], full, work_tile, (step + i) * static_cast<int32_t>(kValueBytes));
      }
      scales.start(stage, step);
      device::cp_async_mbarrier_arrive(full);
    }
  });
  device::cp_async_commit();  // a thread may not end while its copies are under way
  device::cp_async_wait<0>();
}

// Three warps call this. It brings token rows row_of(position) for the work tile's sorted
// positions, out of a matrix of permuted columns, and the other scales. A warp brings eight rows at
// a time: every lane a piece of 16 bytes out of every 64 columns of two rows. Rows of the tile past
// the work tile's are left as they are: a product's columns do not mix, and those are not stored.
template <Encoding kEncoding, int kTokens, typename Rows, typename RowOf>
DGEMMA_DEVICE void gather_tokens(WeightRing<kTokens>& ring, const MoeTileScheduler& scheduler,
                                 const Rows& rows, const bfloat16* tokens, RowOf row_of) {
  constexpr uint32_t kHalf = sizeof ring.stage[0].tokens[0][0];
  const uint32_t thread = threadIdx.x - (kMoeThreads - kGatheringThreads);
  const uint32_t lane = device::lane_index(), warp = thread / 32;
  const int32_t row_pieces = bytes_of(permuted_width(rows.matrix.columns)) / 16;
  const uint32_t first_row = lane / kPiecesPerRow, piece = lane % kPiecesPerRow;
  uint32_t place[2];
#pragma unroll
  for (uint32_t i = 0; i < 2; ++i)
    place[i] =
        device::swizzled(((first_row + 4 * i) * kPiecesPerRow + piece) * 16, Swizzle::bytes_128);
  ScaleCopies<kEncoding, kTokens, Rows> scales(rows);
  typename WeightRing<kTokens>::State at;
  for_each_work_tile<kTokens>(scheduler, [&](const MoeWorkTile& work_tile, bool new_rows) {
    const uint32_t count = static_cast<uint32_t>(work_tile.rows);
    if (new_rows) {
      device::named_barrier_sync(kGathering, kGatheringThreads);  // those before are no longer read
      for (uint32_t row = thread; row < count; row += kGatheringThreads)
        ring.source[row] =
            static_cast<uint32_t>(row_of(work_tile.first + static_cast<int32_t>(row)) * row_pieces);
      device::named_barrier_sync(kGathering, kGatheringThreads);
    }

    scales.begin(work_tile);
    const uint4* from = reinterpret_cast<const uint4*>(tokens) + piece;
    for (int32_t step = 0; step < scheduler.k_steps; step += ring.kSteps, at.advance()) {
      Stage<kTokens>& stage = ring.stage[at.stage];
      char* tile = reinterpret_cast<char*>(stage.tokens);
      const bool whole = step + ring.kSteps <= scheduler.k_steps;
      device::Mbarrier* const full = ring.pipeline.producer_acquire(at);
      scales.start(stage, step);
      for (uint32_t eight = 8 * warp; eight < count; eight += 8 * kGatheringThreads / 32) {
#pragma unroll
        for (uint32_t i = 0; i < 2; ++i) {
          const uint32_t row = eight + first_row + 4 * i;
          if (row >= count) break;
          const uint4* pieces = from + ring.source[row];
          char* to = tile + eight * (kPiecesPerRow * 16) + place[i];
#pragma unroll
          for (uint32_t half = 0; half < 2 * ring.kSteps; ++half) {
            if (half == 2 && !whole) break;
            device::cp_async_16(to + half * kHalf, pieces + half * kPiecesPerRow);
          }
        }
      }
      device::cp_async_mbarrier_arrive(full);
      from += ring.kSteps * 2 * kPiecesPerRow;
    }
  });
  device::cp_async_commit();  // a thread may not end while its copies are under way
  device::cp_async_wait<0>();
}

// A thread's two rows of its warp's 16: their offsets in a stage, and their scales.
struct OwnRows {
  uint32_t weights[2], scales[2];  // offsets in bytes
  uint32_t shift[2];               // where the row's scales begin in a word
  float row_scale[2];              // used at the end alone, so that nothing waits for its load

  // `place` is the row's place in a stage's weights, `row` its number in the tile.
  template <Encoding kEncoding, int kSteps, typename Rows>
  DGEMMA_DEVICE void find(int which, const Rows& rows, const MoeWorkTile& work_tile, uint32_t place,
                          int32_t row) {
    const QuantizedMatrix& matrix = rows.matrix;
    const int32_t quad = static_cast<int32_t>(device::lane_index() % 4);
    const int32_t matrix_row = rows.matrix_row(work_tile, row);
    weights[which] = place * kValueBytes + static_cast<uint32_t>(quad) * 16;
    scales[which] =
        static_cast<uint32_t>(row * kSteps * kQuantizedScaleBytes90 +
                              scale_bytes_of<kEncoding>(matrix, quad * kPermutedBlock / 4));
    shift[which] =
        static_cast<uint32_t>(matrix_row) * static_cast<uint32_t>(matrix.scale_bytes) % 4;
    row_scale[which] = matrix.row_scale(matrix_row);
  }
};

// A warpgroup's 64 rows of a work tile, times its first kN pairs.
template <Encoding kEncoding, int kN, int kTokens>
DGEMMA_DEVICE void multiply(WeightRing<kTokens>& ring, typename WeightRing<kTokens>::State& at,
                            const OwnRows& own, const QuantizedMatrix& matrix,
                            const DecodeTable& table, int32_t k_steps, float (&sum)[kN / 2]) {
  uint32_t a[2][4][4] = {};  // four steps of 16 columns in each set
  const auto first_b = device::k_major_descriptor(ring.stage[0].tokens, Swizzle::bytes_128);
  const int32_t step_bytes = scale_bytes_of<kEncoding>(matrix, kPermutedBlock);
  typename WeightRing<kTokens>::State previous = at;
  for (int32_t first = 0; first < k_steps; first += ring.kSteps) {
    const Stage<kTokens>& stage = ring.stage[at.stage];
    ring.pipeline.consumer_wait(at);
#pragma unroll
    for (int i = 0; i < ring.kSteps; ++i) {
      if (i > 0 && first + i >= k_steps) break;
      uint32_t word[2][4], bits[2];
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const uint4 values =
            *reinterpret_cast<const uint4*>(stage.weights[i][0] + own.weights[row]);
        word[row][0] = values.x, word[row][1] = values.y;
        word[row][2] = values.z, word[row][3] = values.w;
        // Two steps' scales are whole words, so that the row's shift stays; one step's may not be.
        const uint32_t before = ring.kSteps == 1 ? static_cast<uint32_t>(first * step_bytes) : 0;
        bits[row] = *reinterpret_cast<const uint16_t*>(
            stage.scales[0] + own.scales[row] + ((own.shift[row] + before) & 3u) + i * step_bytes);
      }
      // cp.async wrote the tokens, wgmma reads them. The weights' loads need not wait for it.
      if (i == 0) device::fence_proxy_async();
      GroupScale<kEncoding> scale[2][kGroups<kEncoding>];
      decode_scales<kEncoding>(bits[0], bits[1], scale);

#pragma unroll
      for (int half = 0; half < 2; ++half) {
        // The products of the half before run on; those before it, whose set this is, are done.
        device::wgmma_wait<1>(a[half]);
        if (i == 0 && half == 1 && first > 0) ring.pipeline.consumer_release(previous);
#pragma unroll
        for (int w = 0; w < 2; ++w) {
#pragma unroll
          for (int row = 0; row < 2; ++row) {
            uint32_t pair[4];
            decode_word<kEncoding>(word[row][2 * half + w],
                                   scale[row][kGroups<kEncoding> == 1 ? 0 : half], table, pair);
            a[half][2 * w][row] = pair[0], a[half][2 * w][2 + row] = pair[1];
            a[half][2 * w + 1][row] = pair[2], a[half][2 * w + 1][2 + row] = pair[3];
          }
        }
        const auto b = device::advanced(
            first_b, at.stage * sizeof stage + (2 * i + half) * sizeof stage.tokens[0][0]);
        device::wgmma_fence(sum, a[half]);
#pragma unroll
        for (uint32_t k = 0; k < 4; ++k)
          device::wgmma<kN>(sum, a[half][k], device::advanced(b, k * 32));
        device::wgmma_commit();
      }
    }
    previous = at;
    at.advance();
  }
  device::wgmma_wait<0>(sum, a);
  // Ordinary loads read the stage, bulk copies overwrite it. Of the stages before, the next one's
  // fence stood in front of their release.
  device::fence_proxy_async();
  ring.pipeline.consumer_release(previous);
  const float factor[2] = {kSumUnit<kEncoding> * own.row_scale[0],
                           kSumUnit<kEncoding> * own.row_scale[1]};
#pragma unroll
  for (int i = 0; i < kN / 2; ++i) sum[i] *= factor[i / 2 % 2];
}

}  // namespace dgemma::moe_sm90_quantized
