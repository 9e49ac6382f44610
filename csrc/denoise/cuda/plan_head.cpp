#include "denoise/cuda/plan_head.h"

#include <algorithm>
#include <ostream>

#include "common/ceil_divide.h"

namespace dgemma {

int32_t vocabulary_row_tile(int32_t length) {
  return length <= 64 ? 64 : length <= 128 ? 128 : 256;
}

HeadPlan make_head_plan(const Logits& logits, int32_t multiprocessors) {
  HeadPlan plan = {};
  plan.row_tile = vocabulary_row_tile(logits.length);
  plan.row_tiles = ceil_divide(logits.length, plan.row_tile);
  plan.tile_pairs = (logits.tiles + 1) / 2;
  // A block fills a multiprocessor's shared memory. There are no more clusters than have work.
  const int64_t work_tiles = count_work_tiles(plan, logits.batch);
  plan.blocks =
      2 * static_cast<int32_t>(std::min<int64_t>(std::max(multiprocessors / 2, 1), work_tiles));
  return plan;
}

void print(const HeadPlan& plan, std::ostream& out) {
  out << "head: " << plan.blocks << " blocks of " << kHeadThreads << " threads, in pairs; "
      << plan.tile_pairs << " pairs of vocabulary tiles by " << plan.row_tiles << " tiles of "
      << plan.row_tile << " rows a request\n";
}

}  // namespace dgemma
