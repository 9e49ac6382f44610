// The listed tiles' probabilities times the embedding's rows, bfloat16 to fp32 from sm_80 on. A
// block has 128 rows of the canvas, 128 columns and a split of the list: see plan_soft_embedding.h.
#include "common/ceil_divide.h"
#include "cuda/sm80_tile.h"
#include "denoise/cuda/soft_tiles.h"
#include "device/launch.h"
#include "device/shared_memory.h"

namespace dgemma {
namespace {

static_assert(kSoftRows == sm80::kRows && kSoftColumns == sm80::kColumns &&
              kSoftDepth == sm80::kDepth);
constexpr int32_t kStepsPerTile = kTile / sm80::kDepth;

struct Blocks {
  int32_t row_tiles, splits;
};

__global__ void __launch_bounds__(sm80::kThreads) soft_product(const SoftPass p, const Blocks b) {
  device::wait_for_previous_kernel();
  device::let_next_kernel_begin();
  const int64_t request = blockIdx.z;
  if (!is_in_round(p, request)) return;
  const int32_t count = p.count[request], each = ceil_divide(count, b.splits);
  const int32_t split = static_cast<int32_t>(blockIdx.y);
  const int32_t begin = split * each, end = min(begin + each, count);
  if (begin >= end) return;  // soft_finish skips such a split

  // Row tiles of the same columns side by side, so that they find the embedding in the L2.
  const int32_t length = p.logits.length, vocabulary = p.logits.vocabulary, width = p.hidden_size;
  const int32_t first_row = static_cast<int32_t>(blockIdx.x) % b.row_tiles * sm80::kRows;
  const int32_t first_column = static_cast<int32_t>(blockIdx.x) / b.row_tiles * sm80::kColumns;
  const int64_t stride = static_cast<int64_t>(p.logits.tiles) * kTile;
  const device::bfloat16* const probabilities =
      p.probabilities + (request * length + first_row) * stride;
  const int32_t* const list = p.list + request * p.logits.tiles;

  sm80::Sum sum = {};
  sm80::multiply_all<true>(
      device::shared_memory<sm80::Ring>(), (end - begin) * kStepsPerTile, sum,
      [&](sm80::Stage& stage, int32_t step) {
        const int32_t token =
            list[begin + step / kStepsPerTile] * kTile + step % kStepsPerTile * sm80::kDepth;
        sm80::start_copy(stage.left, p.probabilities, [&](int32_t row, int32_t piece) {
          return first_row + row < length ? probabilities + row * stride + token + 8 * piece
                                          : nullptr;
        });
        sm80::start_copy(stage.right, p.embedding, [&](int32_t row, int32_t piece) {
          // The first 64 rows are of the first 64 columns, the others of the rest.
          const int32_t v = token + row % sm80::kDepth;
          const int32_t column = first_column + row / sm80::kDepth * sm80::kDepth + 8 * piece;
          return v < vocabulary && column < width
                     ? p.embedding + static_cast<int64_t>(v) * width + column
                     : nullptr;
        });
      });

  float* const partial =
      p.partial + (request * b.splits + split) * length * static_cast<int64_t>(width);
  sm80::for_each_pair(sum, [&](int32_t row, int32_t column, float x, float y) {
    row += first_row;
    column += first_column;
    if (row < length && column < width)
      *reinterpret_cast<float2*>(partial + static_cast<int64_t>(row) * width + column) = {x, y};
  });
}

}  // namespace

const char* launch_soft_product_sm80_bf16(const SoftPlan& plan, const SoftPass& pass,
                                          void* stream) {
  const device::LaunchShape shape = {
      .grid = dim3(static_cast<unsigned>(plan.column_tiles * plan.row_tiles),
                   static_cast<unsigned>(plan.splits), static_cast<unsigned>(pass.logits.batch)),
      .threads = sm80::kThreads,
      .shared_bytes = sizeof(sm80::Ring),
      .overlaps_previous_kernel = true};
  return device::launch(shape, stream, soft_product, pass, Blocks{plan.row_tiles, plan.splits});
}

}  // namespace dgemma
