// Draws the token of a row's chosen class: a block makes the statistics of the tiles under the mask
// of the class and draws by them as `sample` does, so a class of all tokens gives the bits of none.
#include "automaton/automaton.h"
#include "automaton/cuda/kernels.h"
#include "denoise/cuda/draw_token.h"
#include "device/launch.h"
#include "device/shared_memory.h"

namespace dgemma {
namespace {

struct Rows {
  Logits logits;
  Automata automata;
  const uint8_t* pinned;
  const int32_t* chosen_class;
  const double* remainder;
  const int32_t* matches;
  int32_t* tokens;
  float *tile_max, *tile_sum;  // [batch, length, tiles], in the workspace
};

struct Shared {
  DrawScratch draw;
  float max[kRowWarps];
};

template <typename T>
__global__ void __launch_bounds__(kRowThreads) sample_class_kernel(const Rows p) {
  device::wait_for_previous_kernel();
  device::let_next_kernel_begin();
  const Logits& logits = p.logits;
  const int64_t row = blockIdx.x, request = row / logits.length;
  const bool pinned = p.pinned != nullptr && p.pinned[row] != 0;
  if (pinned || !is_active(logits.active, request) ||
      !has_automaton(p.automata.descriptor, request) || p.matches[request] == 0)
    return;
  Shared& shared = device::shared_memory<Shared>();
  const int32_t* const class_of =
      automaton_of(p.automata.arena, p.automata.descriptor, request).class_of_token;
  const int32_t chosen = p.chosen_class[row];
  const uint32_t* const bits = allowed_bits(logits.allowed, logits.vocabulary, row);
  const auto usable_of = [&](int32_t first) {
    uint32_t usable = usable_entries(bits, logits.vocabulary, first);
#pragma unroll
    for (int32_t i = 0; i < kLaneEntries; ++i)
      if ((usable >> i & 1) != 0 && class_of[first + i] != chosen) usable &= ~(1u << i);
    return usable;
  };
  const LogitScale scale = make_scale(logits.softcap, logits.temperature[request]);
  const int32_t lane = static_cast<int32_t>(device::lane_index());
  float* const tile_max = p.tile_max + row * logits.tiles;
  float* const tile_sum = p.tile_sum + row * logits.tiles;
  const uint32_t warp = device::warp_index();
  float largest = -INFINITY;
  for (int32_t tile = static_cast<int32_t>(warp); tile < logits.tiles; tile += kRowWarps) {
    const int32_t first = tile * kTile + lane * kLaneEntries;
    const uint32_t usable = usable_of(first);
    TileStatistics of_tile[1] = {};
    of_tile[0].max = -INFINITY;
    if (__any_sync(device::kAllLanes, usable != 0) != 0) {
      float raw[kLaneEntries];
      read_entries<T>(logits, row, first, usable, raw);
      tile_statistics<kLaneEntries>(raw, {usable}, first, scale, of_tile);
    }
    largest = fmaxf(largest, of_tile[0].max);
    if (lane == 0) {
      tile_max[tile] = of_tile[0].max;
      tile_sum[tile] = of_tile[0].sum;
    }
  }
  if (lane == 0) shared.max[warp] = largest;
  __syncthreads();
  for (const float one : shared.max) largest = fmaxf(largest, one);
  RowOfTiles tiles = {.logits = logits,
                      .row = row,
                      .tile_max = tile_max,
                      .tile_sum = tile_sum,
                      .row_max = largest,
                      .row_sum = 0.0};
  const double mass = run_mass(tiles, tile_run(logits.tiles)).mass;
  tiles.row_sum = running_total(mass, shared.draw.total).total;
  const int32_t token = draw_token<T>(tiles, p.remainder[row], shared.draw, usable_of);
  // Of a request whose entropies are not finite no class was chosen.
  if (threadIdx.x == 0 && token >= 0) p.tokens[row] = token;
}

}  // namespace

const char* launch_sample_class(const dgemma_sample_class& op, void* stream) {
  const Logits logits = make_logits(op.logits);
  const int64_t tiles = static_cast<int64_t>(logits.batch) * logits.length * logits.tiles;
  float* const tile_max = static_cast<float*>(op.workspace);
  const device::LaunchShape shape = {
      .grid = dim3(static_cast<unsigned>(logits.batch * logits.length)),
      .threads = kRowThreads,
      .shared_bytes = sizeof(Shared),
      .overlaps_previous_kernel = true};
  const auto kernel = op.logits.dtype == DGEMMA_BFLOAT16 ? sample_class_kernel<device::bfloat16>
                                                         : sample_class_kernel<float>;
  return device::launch(shape, stream, kernel,
                        Rows{logits,
                             {op.arena, op.descriptor},
                             op.pinned,
                             op.chosen_class,
                             op.remainder,
                             op.matches,
                             op.tokens,
                             tile_max,
                             tile_max + tiles});
}

}  // namespace dgemma
