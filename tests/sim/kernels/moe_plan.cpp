// The plan of the CUDA mixture-of-experts kernels and the traffic of each, callable from Python.
#include <cstdio>
#include <sstream>

#include "entry.h"
#include "grouped_gemm/cuda/moe.h"
#include "grouped_gemm/cuda/moe_scheduler.h"
#include "grouped_gemm/cuda/moe_work_tiles.h"
#include "grouped_gemm/cuda/plan_moe.h"

extern "C" void sim_statistics(uint64_t (&out)[6]);

namespace {
dgemma::Gpu gpu_of(int32_t compute_capability, int32_t multiprocessors) {
  using dgemma::CudaPath;
  return {compute_capability == 90 ? CudaPath::kSm90 : CudaPath::kSm80, compute_capability,
          multiprocessors};
}
}  // namespace

// Null, or what is wrong with the sizes. `text` has room for `bytes`.
SIM_ENTRY moe_plan(const dgemma_moe_ffn* op, int32_t compute_capability, int32_t multiprocessors,
                   int64_t (&out)[15], char* text, size_t bytes) {
  if (const char* error = dgemma::moe_cuda_error(*op)) return error;
  const dgemma::MoeCudaPlan plan =
      dgemma::make_moe_cuda_plan(*op, gpu_of(compute_capability, multiprocessors));
  const int64_t numbers[15] = {plan.tokens_per_pass,
                               plan.token_tile,
                               plan.stages,
                               plan.gate_up.weight_tiles,
                               plan.gate_up.k_steps,
                               plan.gate_up.blocks,
                               plan.down.weight_tiles,
                               plan.down.k_steps,
                               plan.down.blocks,
                               static_cast<int64_t>(plan.first),
                               static_cast<int64_t>(plan.tiles_before),
                               static_cast<int64_t>(plan.pair),
                               static_cast<int64_t>(plan.workspace_bytes),
                               plan.contiguous,
                               plan.likely_steps};
  for (int i = 0; i < 15; ++i) out[i] = numbers[i];
  std::ostringstream stream;
  print(plan, stream);
  std::snprintf(text, bytes, "%s", stream.str().c_str());
  return nullptr;
}

// Writes (expert, weight tile, first, rows) of every work tile; how many there are stands in
// `count`.
SIM_ENTRY moe_units(const int32_t* first, const int32_t* tiles_before, int32_t experts,
                    int32_t weight_tiles, int32_t token_tile, int32_t (*out)[4], int32_t* count) {
  const dgemma::MoeTables tables = {first, tiles_before, nullptr, experts};
  *count = count_work_tiles(tables, weight_tiles);
  for (int32_t i = 0; i < *count; ++i) {
    const dgemma::MoeWorkTile work_tile = find_work_tile(tables, weight_tiles, token_tile, i);
    out[i][0] = work_tile.expert;
    out[i][1] = work_tile.weight_tile;
    out[i][2] = work_tile.first;
    out[i][3] = work_tile.rows;
  }
  return nullptr;
}

// Writes (expert, weight tile, first, rows, whether its pairs are new) of every work tile of a
// block.
SIM_ENTRY moe_work_tiles_of(const int32_t* first, const int32_t* tiles_before, int32_t experts,
                            int32_t weight_tiles, int32_t token_tile, int contiguous, int32_t block,
                            int32_t blocks, int32_t (*out)[5], int32_t* count) {
  const dgemma::MoeTileScheduler scheduler = {
      {first, tiles_before, nullptr, experts}, weight_tiles, 1, contiguous != 0};
  *count = 0;
  scheduler.for_each(token_tile, block, blocks,
                     [&](const dgemma::MoeWorkTile& work_tile, bool new_pairs) {
                       int32_t(&to)[5] = out[(*count)++];
                       to[0] = work_tile.expert;
                       to[1] = work_tile.weight_tile;
                       to[2] = work_tile.first;
                       to[3] = work_tile.rows;
                       to[4] = new_pairs;
                     });
  return nullptr;
}

// Writes (expert, weight tile, step) of the steps that a block takes first if every expert has one
// token tile.
SIM_ENTRY moe_likely_steps(int32_t experts, int32_t weight_tiles, int32_t k_steps, int32_t steps,
                           int32_t block, int32_t blocks, int32_t (*out)[3], int32_t* count) {
  const dgemma::MoeTileScheduler scheduler = {
      {nullptr, nullptr, nullptr, experts}, weight_tiles, k_steps, true};
  *count = 0;
  scheduler.for_each_likely(steps, block, blocks,
                            [&](const dgemma::MoeWorkTile& work_tile, int32_t step) {
                              int32_t(&to)[3] = out[(*count)++];
                              to[0] = work_tile.expert;
                              to[1] = work_tile.weight_tile;
                              to[2] = step;
                            });
  return nullptr;
}

// Runs a call of one pass and writes the machine's statistics of sort, gate_up, down and combine.
SIM_ENTRY moe_traffic(const dgemma_moe_ffn* op, int32_t compute_capability, uint64_t (&out)[4][6]) {
  const dgemma::Gpu gpu = gpu_of(compute_capability, 3);
  const dgemma::MoeCudaPlan plan = dgemma::make_moe_cuda_plan(*op, gpu);
  const dgemma::MoeCudaPass pass = dgemma::make_moe_cuda_pass(*op, plan, 0);
  const bool sm90 = gpu.path == dgemma::CudaPath::kSm90;
  int kernel = 0;
  for (const auto launch :
       {dgemma::launch_sort_pairs,
        sm90 ? dgemma::launch_gate_up_sm90_bf16 : dgemma::launch_gate_up_sm80_bf16,
        sm90 ? dgemma::launch_down_sm90_bf16 : dgemma::launch_down_sm80_bf16,
        dgemma::launch_combine}) {
    if (const char* error = launch(plan, pass, nullptr)) return error;
    sim_statistics(out[kernel++]);
  }
  return nullptr;
}
