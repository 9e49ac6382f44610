// The vocabulary head, bfloat16 from sm_80 on: a block has 128 rows of the canvas and one
// vocabulary tile of 128 entries, whose statistics it makes while the tile is in shared memory.
#include "cuda/sm80_tile.h"
#include "denoise/cuda/head_epilogue.h"
#include "device/launch.h"
#include "device/shared_memory.h"

namespace dgemma {
namespace {

static_assert(kTile == sm80::kColumns);
constexpr int32_t kWarps = sm80::kThreads / 32;

union Shared {
  sm80::Ring ring;
  HeadTile<sm80::kRows> tile;  // when the product is done
};

__global__ void __launch_bounds__(sm80::kThreads) head_kernel(const Head p, int32_t row_tiles) {
  device::wait_for_previous_kernel();
  device::let_next_kernel_begin();
  const int64_t request = blockIdx.y;
  if (!is_active(p.logits.active, request)) return;
  Shared& shared = device::shared_memory<Shared>();
  const int32_t length = p.logits.length, vocabulary = p.logits.vocabulary, width = p.hidden_size;
  // Row tiles of one vocabulary tile side by side, so that they find the embedding in the L2.
  const int32_t first_row = static_cast<int32_t>(blockIdx.x) % row_tiles * sm80::kRows;
  const int32_t tile = static_cast<int32_t>(blockIdx.x) / row_tiles;
  const device::bfloat16* const rows = p.hidden + (request * length + first_row) * width;
  const device::bfloat16* const entries = p.embedding + static_cast<int64_t>(tile) * kTile * width;

  sm80::Sum sum = {};
  sm80::multiply_all<false>(
      shared.ring, (width + sm80::kDepth - 1) / sm80::kDepth, sum,
      [&](sm80::Stage& stage, int32_t step) {
        const auto piece_of_row = [&](const device::bfloat16* from, int32_t rows_there) {
          return [=](int32_t row, int32_t piece) {
            const int32_t column = step * sm80::kDepth + 8 * piece;
            return row < rows_there && column < width
                       ? from + static_cast<int64_t>(row) * width + column
                       : nullptr;
          };
        };
        sm80::start_copy(stage.left, p.hidden, piece_of_row(rows, length - first_row));
        sm80::start_copy(stage.right, p.embedding,
                         piece_of_row(entries, vocabulary - tile * kTile));
      });

  sm80::for_each_pair(sum, [&](int32_t row, int32_t column, float x, float y) {
    *reinterpret_cast<uint32_t*>(&shared.tile.value[row][column]) = device::pack_bfloat16(x, y);
  });
  __syncthreads();
  const LogitScale scale = make_scale(p.logits.softcap, p.logits.temperature[request]);
  for (int32_t row = static_cast<int32_t>(device::warp_index());
       row < sm80::kRows && first_row + row < length; row += kWarps)
    finish_rows<32, 1, sm80::kRows>(p, scale, request * length + first_row + row, 1, tile,
                                    &shared.tile.value[row]);
}

}  // namespace

const char* launch_head_sm80_bf16(const Head& head, void* stream) {
  const int32_t row_tiles = (head.logits.length + sm80::kRows - 1) / sm80::kRows;
  const device::LaunchShape shape = {
      .grid = dim3(static_cast<unsigned>(row_tiles * head.logits.tiles),
                   static_cast<unsigned>(head.logits.batch)),
      .threads = sm80::kThreads,
      .shared_bytes = sizeof(Shared),
      .overlaps_previous_kernel = true};
  return device::launch(shape, stream, head_kernel, head, row_tiles);
}

}  // namespace dgemma
