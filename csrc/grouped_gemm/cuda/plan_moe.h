// The launch plan of the experts' CUDA kernels: everything that depends on the sizes of a call and
// not on its routing. Pure host code that allocates nothing. The device finds which pairs an expert
// gets (sort_pairs.cu).
#pragma once

#include <cstddef>
#include <cstdint>
#include <iosfwd>

#include "cuda/entry.h"
#include "cuda/limits.h"
#include "cuda/occupancy.h"
#include "dgemma/grouped_gemm.h"
#include "grouped_gemm/cuda/plan_rows.h"

namespace dgemma {

// Pairs in one pass. The model encodes at most 4,096 tokens of 8 pairs at a time, which is one
// pass; its products take 369 MB. More passes read the weights again, but multiply longer than that
// takes.
constexpr int64_t kMoePairsPerPass = 32768;

// sm_90. Rows of a weight tile: two warpgroups, each the 64 rows that wgmma's M is. For gate and up
// these are 64 gate rows and the 64 up rows that belong to them.
constexpr int32_t kMoeWeightRows = 128;
// Depth of a stage: 64 bfloat16 are 128 bytes, a row of the widest swizzle.
constexpr int32_t kMoeDepth = 64;
// Two consumer warpgroups and one of producers: a warp for weights, three for token rows.
constexpr int32_t kMoeThreads = 384;

// A block of the sm_80 path: four warps, two by two, each with 32 weight rows (two of mma's 16) by
// a half of the tokens.
constexpr int32_t kMoeWeightRows80 = 64;
constexpr int32_t kMoeThreads80 = 128;
// Blocks that registers must leave room for on a multiprocessor: 65,536 for three of 128 threads
// are 168 each. Left to itself, ptxas aims at more blocks than shared memory admits, and spills.
constexpr int32_t moe_least_blocks_80(int32_t token_tile) { return token_tile == 128 ? 2 : 3; }

// One thread per expert scans their counts: a block has at most 1,024 threads.
constexpr int32_t kMoeMostExperts = 1024;
constexpr int32_t kMoeSortThreads = 1024;
constexpr int32_t kMoeCombineThreads = 128;
static_assert(fills_multiprocessor(kMoeCombineThreads));

// A stage holds a weight tile and a token tile.
constexpr int32_t moe_stage_bytes(int32_t token_tile) {
  return (kMoeWeightRows + token_tile) * kMoeDepth * 2;
}
// Gate and up need, beside the stages, the tile of results and at most 2 KB of barriers and row
// numbers. Down's list of targets is smaller than the results.
constexpr int32_t moe_stages(int32_t token_tile) {
  const int32_t results = token_tile * kMoeWeightRows / 2 * 2;
  return (kSharedLimit90 - results - 2048) / moe_stage_bytes(token_tile);
}

// The sm_80 path takes as many stages as let two blocks share the 100 KB of a multiprocessor of
// 8.6, 8.9 or 12.0 (the same table), 1 KB of which each block loses to the system; with the largest
// token tile one block there, two on 8.0.
constexpr int32_t moe_stage_bytes_80(int32_t token_tile) {
  return (kMoeWeightRows80 + token_tile) * kMoeDepth * 2;
}
constexpr int32_t moe_stages_80(int32_t token_tile) { return token_tile == 32 ? 4 : 3; }

struct MoeCudaPart {
  int32_t weight_tiles;    // per expert
  int32_t k_steps;         // stages that a work tile takes
  int32_t blocks;          // of the grid
  int32_t blocks_at_once;  // of a multiprocessor; the grid counts on them
};

struct MoeCudaPlan {
  int64_t tokens_per_pass;
  CudaPath path;
  int32_t token_tile;   // 64, 128 or 256; on sm_80 32, 64 or 128
  int32_t weight_rows;  // of a weight tile
  int32_t threads;      // of a block that multiplies
  int32_t stages, stage_bytes;
  int32_t depth;  // columns in a stage
  MoeCudaPart gate_up, down;
  // On sm_90. A block takes a contiguous run of work tiles where an expert mostly has one token
  // tile: the next is then the next weight tile for the same pairs. Where experts have several, of
  // which the last has few pairs, runs would take unequal times: a block takes every blocks-th.
  bool contiguous;
  // Steps of weights that a block asks the L2 for while it cannot know yet which experts have
  // pairs: as many as its ring holds, or none where some experts surely have no pairs.
  int32_t likely_steps;
  int32_t combine_blocks;  // of a full pass
  // Blocks, beside the one that sorts, that permute the input as permuted_k.h says; mostly none.
  int32_t permuting_blocks;

  // The workspace: where its parts begin, in bytes, and its size.
  size_t first, tiles_before, pair;  // int32: see MoeTables
  size_t activations;                // bfloat16 [pairs, expert_size], in sorted order
  size_t products;                   // float32 [pairs, hidden_size], in the order of the slots
  size_t permuted_input;             // bfloat16 [tokens, permuted width], where blocks permute it
  // Tokens in bytes, where gate_up multiplies such, and h in sorted order, where down does.
  RowsPlan input_rows, activation_rows;
  size_t workspace_bytes;
};

// Null when the CUDA kernels take these sizes and this dtype, else the name of the argument that
// they do not take, with what they want ("hidden_size: wants a multiple of 8"). Pointers are not
// checked.
const char* moe_cuda_error(const dgemma_moe_ffn& op);

// Plans sizes that have no error. The workspace is the same for every GPU.
MoeCudaPlan make_moe_cuda_plan(const dgemma_moe_ffn& op, const Gpu& gpu);

// Blocks of the sm_80 kernels that a multiprocessor surely holds at once, by its shared memory and
// its registers. A block takes its share of the work tiles from the start, so one that had to wait
// for another to end would double the time.
int32_t moe_blocks_per_multiprocessor_80(int32_t token_tile, int32_t compute_capability);

// The most token tiles that so many pairs make.
int64_t most_token_tiles(int64_t pairs, int64_t experts, int32_t token_tile);

// Sets the order in which blocks of sm_90 take work tiles, with a ring of so many steps.
void plan_order(int64_t pairs, int64_t experts, int32_t ring_steps, MoeCudaPlan* plan);

// A line for each kernel and one for the workspace.
void print(const MoeCudaPlan& plan, std::ostream& out);

}  // namespace dgemma
