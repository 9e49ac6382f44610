// The tile scheduler of the experts' kernels: how many work tiles there are, what work tile number
// `index` is, which of them a block takes, and which steps along k each takes.
#pragma once

#include "device/language.h"
#include "grouped_gemm/cuda/moe_work_tiles.h"
#include "grouped_gemm/cuda/plan_moe.h"

namespace dgemma {

// Schedules the work tiles of gate and up, or of down.
struct MoeTileScheduler {
  MoeTables tables;
  int32_t weight_tiles, k_steps;
  bool contiguous = false;  // as in MoeCudaPlan; for_each alone follows it

  DGEMMA_DEVICE int32_t count() const { return count_work_tiles(tables, weight_tiles); }
  DGEMMA_DEVICE MoeWorkTile find(int32_t token_tile, int32_t index) const {
    return find_work_tile(tables, weight_tiles, token_tile, index);
  }
  DGEMMA_DEVICE int32_t first_step(const MoeWorkTile&) const { return 0; }
  DGEMMA_DEVICE int32_t steps(const MoeWorkTile&) const { return k_steps; }

  // Calls visit(work_tile, new_pairs) for the work tiles of a block in their order: a contiguous
  // run of them, or every blocks-th. new_pairs: the pairs are not those of the work tile before.
  template <typename Visit>
  DGEMMA_DEVICE void for_each(int32_t token_tile, int32_t block, int32_t blocks,
                              Visit visit) const {
    const int32_t all = count(), by = contiguous ? 1 : blocks;
    const int32_t end = contiguous ? begin_of_run(block + 1, blocks, all) : all;
    MoeWorkTile work_tile = {};
    bool new_pairs = true;
    for (int32_t index = contiguous ? begin_of_run(block, blocks, all) : block; index < end;
         index += by) {
      // Mostly the next weight tile for the same pairs, for which no table is read.
      if (new_pairs)
        work_tile = find(token_tile, index);
      else
        ++work_tile.weight_tile;
      visit(work_tile, new_pairs);
      new_pairs =
          !contiguous || work_tile.token_tiles > 1 || work_tile.weight_tile + 1 == weight_tiles;
    }
  }

  // Calls visit(work_tile, step) for the first steps of a block, were every expert to have one
  // token tile. It reads no table; the work tiles have no pairs.
  template <typename Visit>
  DGEMMA_DEVICE void for_each_likely(int32_t steps, int32_t block, int32_t blocks,
                                     Visit visit) const {
    int32_t index = begin_of_run(block, blocks, tables.experts * weight_tiles);
    const int32_t end = begin_of_run(block + 1, blocks, tables.experts * weight_tiles);
    for (int32_t step = 0; index < end && steps > 0; --steps) {
      const int32_t expert = index / weight_tiles;
      visit(MoeWorkTile{expert, index - expert * weight_tiles, 0, 0, 1}, step);
      if (++step == k_steps) ++index, step = 0;
    }
  }

 private:
  // Runs differ by one work tile at most.
  static DGEMMA_DEVICE int32_t begin_of_run(int32_t block, int32_t blocks, int32_t all) {
    const int32_t longer = all % blocks;
    return block * (all / blocks) + (block < longer ? block : longer);
  }
};

}  // namespace dgemma
