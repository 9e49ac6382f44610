// One position of merge_vocabulary_shards, on the host and in a kernel alike.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/host_device.h"
#include "device/philox.h"
#include "dgemma/denoise.h"

namespace dgemma {
namespace {

// The largest double below 1: a uniform lies below it or is it.
constexpr double kLargestUniform = 1.0 - 0x1p-53;

// The shards of one position: where its entry of shard s is.
struct ShardsOfPosition {
  const dgemma_merge_vocabulary_shards& op;
  int64_t at;  // of the position in [batch, length]
  int64_t positions;

  DGEMMA_HOST_DEVICE int64_t entry(int64_t shard) const { return shard * positions + at; }
  DGEMMA_HOST_DEVICE bool is_empty(int64_t shard) const {
    return op.nonempty != nullptr && op.nonempty[entry(shard)] == 0;
  }
  // The mass of a shard relative to the maximum m of all.
  DGEMMA_HOST_DEVICE double mass(int64_t shard, float m) const {
    const int64_t i = entry(shard);
    return op.row_sum[i] * exp(static_cast<double>(op.row_max[i]) - static_cast<double>(m));
  }
};

struct MergedRow {
  int64_t first;  // the first shard that is not empty, -1 where all are
  float row_max;
  double row_sum;  // NaN where a shard's is
  double shifted;  // sum exp(z - row_max) (z - row_max)
  int32_t argmax;
};

DGEMMA_HOST_DEVICE MergedRow merge_row(const ShardsOfPosition& shards) {
  const dgemma_merge_vocabulary_shards& op = shards.op;
  MergedRow row = {-1, -INFINITY, 0.0, 0.0, 0};
  float best = 0.0f;
  for (int64_t s = 0; s < op.shards; ++s) {
    if (shards.is_empty(s)) continue;
    const int64_t i = shards.entry(s);
    if (row.first < 0 || op.best[i] > best) {
      best = op.best[i];
      row.argmax = op.argmax[i];
    }
    if (row.first < 0) row.first = s;
    if (op.row_max[i] > row.row_max) row.row_max = op.row_max[i];
  }
  for (int64_t s = 0; s < op.shards; ++s) {
    if (shards.is_empty(s)) continue;
    const int64_t i = shards.entry(s);
    const double mass = shards.mass(s, row.row_max);
    row.row_sum += mass;
    // Relative to the shard's own maximum its shifted sum is row_sum (log row_sum - entropy).
    if (mass > 0.0)
      row.shifted += mass * (log(op.row_sum[i]) - static_cast<double>(op.entropy[i]) +
                             static_cast<double>(op.row_max[i]) - static_cast<double>(row.row_max));
  }
  return row;
}

struct ShardDraw {
  int32_t owner;
  double own_uniform;
};

// The shard that holds u * row_sum, and the uniform inside shard `rank`.
DGEMMA_HOST_DEVICE ShardDraw draw_shard(const ShardsOfPosition& shards, const MergedRow& row,
                                        double uniform) {
  const int64_t rank = shards.op.rank;
  ShardDraw draw = {static_cast<int32_t>(row.first), 0.0};
  const double target = uniform * row.row_sum;
  double before = 0.0;
  for (int64_t s = 0; s < shards.op.shards; ++s) {
    const double mass = shards.is_empty(s) ? 0.0 : shards.mass(s, row.row_max);
    if (!(mass > 0.0)) continue;
    draw.owner = static_cast<int32_t>(s);
    const double within = (target - before) / mass;
    draw.own_uniform = s != rank ? 0.0 : within < kLargestUniform ? within : kLargestUniform;
    if (before + mass > target) break;
    before += mass;
  }
  if (draw.own_uniform < 0.0) draw.own_uniform = 0.0;
  return draw;
}

DGEMMA_HOST_DEVICE void merge_position(const dgemma_merge_vocabulary_shards& op, int64_t request,
                                       int64_t position) {
  const int64_t at = request * op.length + position;
  const ShardsOfPosition shards = {op, at, op.batch * op.length};
  const MergedRow row = merge_row(shards);
  const bool finite = row.row_sum > 0.0 && row.row_sum < INFINITY;
  op.merged_argmax[at] = row.argmax;
  op.merged_row_max[at] = row.row_max;
  op.merged_row_sum[at] = finite ? row.row_sum : static_cast<double>(NAN);
  op.merged_entropy[at] =
      finite ? static_cast<float>(log(row.row_sum) - row.shifted / row.row_sum) : NAN;
  op.owner[at] = row.first < 0 ? 0 : static_cast<int32_t>(row.first);
  op.own_uniform[at] = 0.0;
  op.share[at] = 0.0f;
  if (!finite) return;
  const double uniform = op.uniforms != nullptr
                             ? op.uniforms[at]
                             : draw_uniform(op.seed[request], op.canvas_index[request],
                                            op.step[request], position, DGEMMA_PURPOSE_SAMPLE);
  const ShardDraw draw = draw_shard(shards, row, uniform);
  op.owner[at] = draw.owner;
  op.own_uniform[at] = draw.own_uniform;
  if (!shards.is_empty(op.rank))
    op.share[at] = static_cast<float>(shards.mass(op.rank, row.row_max) / row.row_sum);
}

}  // namespace
}  // namespace dgemma
