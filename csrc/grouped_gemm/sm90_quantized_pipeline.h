// What the two sm90 kernels over 4-bit weights have in common: a ring of stages in shared memory,
// filled by one warpgroup; two warpgroups decode its weights into registers and multiply.
//
// Roles, units and the ring's barriers are those of sm90_bf16_pipeline.h. A stage is 128 columns
// deep. Weights come as the checkpoint's bytes lie, by the copy engine, scales by cp.async, and
// tokens in the order of arranged_columns.h, gathered by cp.async. A thread's weights of a row are
// 16 bytes, one load without a swizzle and without a bank met twice. They become A of eight steps
// in two sets of registers: while the products of one set run, the other is decoded. What a kernel
// says of its matrix is Rows: `matrix`, and matrix_row(unit, row) of the tile's row, any row of the
// same expert where there is none.
#pragma once

#include "grouped_gemm/arranged_columns.h"
#include "grouped_gemm/cuda_quantized.h"
#include "grouped_gemm/sm90_bf16_pipeline.h"
#include "grouped_gemm/sm90_quantized_decode.h"

namespace dgemma::moe_sm90_quantized {

using namespace moe_sm90;  // the roles; Ring and what goes with it are this file's
using device::bfloat16;
using device::Swizzle;

constexpr uint32_t kValueBytes = kArrangedBlock / 2;  // of a row in a stage
constexpr uint32_t kBoxRows = kMoeWeightRows / 2;     // one copy's

template <int kTokens>
struct Stage {
  alignas(1024) bfloat16 tokens[2][kTokens][kMoeDepth];  // by 64 columns; swizzled
  alignas(128) uint8_t weights[kMoeWeightRows][kValueBytes];
  // Words of four bytes from the one on in which the row's scales of this stage begin.
  alignas(16) uint8_t scales[kMoeWeightRows][kQuantizedScaleBytes90];
};

template <int kTokens>
struct WeightRing {
  static constexpr uint32_t kStages = quantized_stages_90(kTokens);
  static_assert(sizeof(Stage<kTokens>) == quantized_stage_bytes_90(kTokens));

  Stage<kTokens> stage[kStages];
  device::Mbarrier full[kStages];
  device::Mbarrier empty[kStages];
  int32_t source_row[kTokens];  // of the unit that is being gathered
};

// A stage and how often, modulo 2, the ring has gone round.
template <int kTokens>
struct Place {
  uint32_t stage = 0, parity = 0;
  DGEMMA_DEVICE void advance() {
    if (++stage < WeightRing<kTokens>::kStages) return;
    stage = 0;
    parity ^= 1;
  }
};

// By one thread; __syncthreads follows.
template <int kTokens>
DGEMMA_DEVICE void initialise(WeightRing<kTokens>& ring) {
  for (uint32_t i = 0; i < WeightRing<kTokens>::kStages; ++i) {
    device::mbarrier_init(&ring.full[i], 1 + kGatheringThreads);
    device::mbarrier_init(&ring.empty[i], kMultiplyingWarps);
  }
  device::fence_mbarrier_init();
}

// One thread. load(destination, barrier, unit, first byte of the rows) starts the copies of a whole
// weight tile.
template <int kTokens, typename Load>
DGEMMA_DEVICE void load_values(WeightRing<kTokens>& ring, const MoeWork& work, Load load) {
  Place<kTokens> at;
  for_each_unit<kTokens>(work, [&](const MoeUnit& unit) {
    for (int32_t step = 0; step < work.k_steps; ++step, at.advance()) {
      auto& weights = ring.stage[at.stage].weights;
      device::mbarrier_wait(&ring.empty[at.stage], at.parity ^ 1);
      device::mbarrier_arrive_expect_bytes(&ring.full[at.stage], sizeof weights);
      load(weights, &ring.full[at.stage], unit, step * static_cast<int32_t>(kValueBytes));
    }
  });
}

// Bytes of scales that a stage takes of a row, 2 to 8, and where a step's begin in the row.
template <Encoding kEncoding>
DGEMMA_DEVICE int32_t scale_bytes_before(const QuantizedMatrix& matrix, int32_t columns) {
  return (columns >> matrix.group_bits) * (kEncoding == Encoding::kNvfp4 ? 1 : 2);
}

// A row's scales of one stage; zero past the row's end. The row may begin within a word, and so the
// words may begin with what lies in front of it.
DGEMMA_DEVICE void start_scales(uint8_t* to, const QuantizedMatrix& matrix, int64_t row,
                                int32_t before, int32_t bytes) {
  const uint8_t* first = matrix.scales + row * matrix.scale_bytes + before;
  const int32_t in_front = static_cast<int32_t>(reinterpret_cast<uintptr_t>(first) % 4);
  const uint8_t* word = first - in_front;
  int32_t left = matrix.scale_bytes - before + in_front;
  bytes += in_front;
#pragma unroll
  for (int i = 0; i < 3; ++i, word += 4, left -= 4) {
    if (4 * i >= bytes) break;
    device::cp_async_4(to + 4 * i, left > 0 ? word : matrix.scales,
                       static_cast<uint32_t>(max(0, min(4, left))));
  }
}

// Three warps. Brings token rows row_of(position) for the unit's sorted positions, out of a matrix
// of arranged columns, and the scales. Rows of the tile past the unit's are left as they are: a
// product's columns do not mix, and those are not stored.
template <Encoding kEncoding, int kTokens, typename Rows, typename RowOf>
DGEMMA_DEVICE void gather(WeightRing<kTokens>& ring, const MoeWork& work, const Rows& rows,
                          const bfloat16* tokens, RowOf row_of) {
  constexpr uint32_t kPieces = kArrangedBlock * sizeof(bfloat16) / 16;
  const uint32_t thread = threadIdx.x - (kMoeThreads - kGatheringThreads);
  const uint32_t piece = thread % kPieces;
  const QuantizedMatrix& matrix = rows.matrix;
  const int64_t row_bytes = bytes_of(arranged_width(matrix.columns));
  const int32_t scale_bytes = scale_bytes_before<kEncoding>(matrix, kArrangedBlock);
  Place<kTokens> at;
  for_each_unit<kTokens>(work, [&](const MoeUnit& unit) {
    const uint32_t count = static_cast<uint32_t>(unit.rows);
    device::named_barrier_sync(kGathering, kGatheringThreads);  // the last unit's are done with
    for (uint32_t row = thread; row < count; row += kGatheringThreads)
      ring.source_row[row] = row_of(unit.first + static_cast<int32_t>(row));
    device::named_barrier_sync(kGathering, kGatheringThreads);

    for (int32_t step = 0; step < work.k_steps; ++step, at.advance()) {
      Stage<kTokens>& stage = ring.stage[at.stage];
      const char* from = reinterpret_cast<const char*>(tokens) +
                         (static_cast<uint32_t>(step) * kPieces + piece) * 16;
      char* tile = reinterpret_cast<char*>(stage.tokens[piece / 8]);
      const int32_t before = scale_bytes_before<kEncoding>(matrix, step * kArrangedBlock);
      device::mbarrier_wait(&ring.empty[at.stage], at.parity ^ 1);
      for (uint32_t row = thread; row < kMoeWeightRows; row += kGatheringThreads)
        start_scales(stage.scales[row], matrix, rows.matrix_row(unit, static_cast<int32_t>(row)),
                     before, scale_bytes);
      for (uint32_t row = thread / kPieces; row < count; row += kGatheringThreads / kPieces) {
        const uint32_t place = device::swizzled((row * 8 + piece % 8) * 16, Swizzle::bytes_128);
        device::cp_async_16(tile + place, from + ring.source_row[row] * row_bytes);
      }
      device::cp_async_mbarrier_arrive(&ring.full[at.stage]);
    }
  });
}

template <int kTokens>
DGEMMA_DEVICE void release(WeightRing<kTokens>& ring, Place<kTokens> at) {
  if (device::lane_index() == 0) device::mbarrier_arrive(&ring.empty[at.stage]);
}

// A thread's two rows of its warp's 16: where they lie in a stage, and where they belong.
struct OwnRows {
  uint32_t weights[2], scales[2];  // offsets in bytes
  uint32_t shift[2];               // where the row's scales begin in a word
  float factor[2];                 // what the sums are multiplied by

  // place: of the row in a stage's weights; row: in the tile.
  template <Encoding kEncoding, typename Rows>
  DGEMMA_DEVICE void find(int which, const Rows& rows, const MoeUnit& unit, uint32_t place,
                          int32_t row) {
    const QuantizedMatrix& matrix = rows.matrix;
    const int32_t quad = static_cast<int32_t>(device::lane_index() % 4);
    const int64_t matrix_row = rows.matrix_row(unit, row);
    weights[which] = place * kValueBytes + static_cast<uint32_t>(quad) * 16;
    scales[which] =
        static_cast<uint32_t>(row * kQuantizedScaleBytes90 +
                              scale_bytes_before<kEncoding>(matrix, quad * kArrangedBlock / 4));
    shift[which] = static_cast<uint32_t>(matrix_row * matrix.scale_bytes % 4);
    const float by =
        matrix.factors != nullptr ? matrix.factors[matrix_row / matrix.rows_per_factor] : 1.0f;
    factor[which] = kSumUnit<kEncoding> * by;
  }
};

// A warpgroup's 64 rows of a unit, times its first kN pairs.
template <Encoding kEncoding, int kN, int kTokens>
DGEMMA_DEVICE void multiply(WeightRing<kTokens>& ring, Place<kTokens>& at, const OwnRows& own,
                            const QuantizedMatrix& matrix, int32_t k_steps, float (&sum)[kN / 2]) {
  uint32_t a[2][4][4] = {};  // four steps of 16 columns in each set
  Place<kTokens> behind = at;
  for (int32_t step = 0; step < k_steps; ++step) {
    const Stage<kTokens>& stage = ring.stage[at.stage];
    const uint32_t before =
        static_cast<uint32_t>(scale_bytes_before<kEncoding>(matrix, step * kArrangedBlock));
    device::mbarrier_wait(&ring.full[at.stage], at.parity);
    device::fence_proxy_async();  // cp.async wrote the tokens, wgmma reads them
    uint32_t word[2][4], bits[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const uint4 values = *reinterpret_cast<const uint4*>(stage.weights[0] + own.weights[row]);
      word[row][0] = values.x, word[row][1] = values.y;
      word[row][2] = values.z, word[row][3] = values.w;
      bits[row] = *reinterpret_cast<const uint16_t*>(stage.scales[0] + own.scales[row] +
                                                     ((own.shift[row] + before) & 3u));
    }
    GroupScale<kEncoding> scale[2][kGroups<kEncoding>];
    decode_scales<kEncoding>(bits[0], bits[1], scale);

#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // The products of the half before run on; those before it, whose set this is, are done.
      device::wgmma_wait<1>(a[half]);
      if (half == 1 && step > 0) release(ring, behind);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          uint32_t pair[4];
          decode_word<kEncoding>(word[row][2 * half + i],
                                 scale[row][kGroups<kEncoding> == 1 ? 0 : half], pair);
          a[half][2 * i][row] = pair[0], a[half][2 * i][2 + row] = pair[1];
          a[half][2 * i + 1][row] = pair[2], a[half][2 * i + 1][2 + row] = pair[3];
        }
      }
      const auto b = device::k_major_descriptor(stage.tokens[half], Swizzle::bytes_128);
      device::wgmma_fence(sum, a[half]);
#pragma unroll
      for (uint32_t k = 0; k < 4; ++k)
        device::wgmma<kN>(sum, a[half][k], device::advanced(b, k * 32));
      device::wgmma_commit();
    }
    behind = at;
    at.advance();
  }
  device::wgmma_wait<0>(sum, a);
  release(ring, behind);
#pragma unroll
  for (int i = 0; i < kN / 2; ++i) sum[i] *= own.factor[i / 2 % 2];
}

}  // namespace dgemma::moe_sm90_quantized
