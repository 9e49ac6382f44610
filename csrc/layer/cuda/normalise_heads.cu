// Queries and keys normalised and rotated, values normalised: a warp has one head of a token, and a
// lane both values of each of its pairs.
#include "common/ceil_divide.h"
#include "device/launch.h"
#include "layer/cuda/kernels.h"
#include "layer/cuda/row.h"

namespace dgemma {
namespace {

constexpr int32_t kThreads = 256;
constexpr int32_t kWarps = kThreads / 32;
constexpr int32_t kMostPairs = kWidestHead / 2 / 32;  // of a lane

struct Heads {
  const bfloat16 *raw_query, *raw_key, *raw_value, *query_norm, *key_norm, *cosine, *sine;
  bfloat16 *query, *key, *value;
  int64_t heads;  // of all tokens: queries, keys and values
  int32_t query_heads, key_heads, head_dim;
  float epsilon;
};

struct Head {
  const bfloat16 *from, *weight;  // no weight: a value, which is not rotated either
  bfloat16* to;
  int64_t token;
};

DGEMMA_DEVICE Head find_head(const Heads& p, int64_t index) {
  const int32_t each = p.query_heads + 2 * p.key_heads;
  const int64_t token = index / each;
  int32_t head = static_cast<int32_t>(index % each);
  if (head < p.query_heads) {
    const int64_t at = (token * p.query_heads + head) * p.head_dim;
    return {p.raw_query + at, p.query_norm, p.query + at, token};
  }
  head -= p.query_heads;
  const bool is_key = head < p.key_heads;
  const int64_t at = (token * p.key_heads + head % p.key_heads) * p.head_dim;
  if (is_key) return {p.raw_key + at, p.key_norm, p.key + at, token};
  return {p.raw_value + at, nullptr, p.value + at, token};
}

__global__ void __launch_bounds__(kThreads) normalise_heads(const Heads p) {
  device::wait_for_previous_kernel();
  device::let_next_kernel_begin();
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kWarps + device::warp_index();
  if (index >= p.heads) return;
  const Head head = find_head(p, index);
  const int32_t half = p.head_dim / 2, lane = static_cast<int32_t>(device::lane_index());
  float first[kMostPairs] = {}, second[kMostPairs] = {}, squares = 0.0f;
#pragma unroll
  for (int i = 0; i < kMostPairs; ++i) {
    const int32_t at = lane + 32 * i;
    if (at >= half) continue;
    first[i] = device::to_float(head.from[at]);
    second[i] = device::to_float(head.from[at + half]);
    squares = fmaf(first[i], first[i], fmaf(second[i], second[i], squares));
  }
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2)
    squares += __shfl_xor_sync(device::kAllLanes, squares, lanes);
  const float factor = 1.0f / sqrtf(squares / static_cast<float>(p.head_dim) + p.epsilon);
  const bfloat16* const cosine = p.cosine + head.token * p.head_dim;
  const bfloat16* const sine = p.sine + head.token * p.head_dim;
#pragma unroll
  for (int i = 0; i < kMostPairs; ++i) {
    const int32_t at = lane + 32 * i;
    if (at >= half) continue;
    float x = first[i] * factor, y = second[i] * factor;
    if (head.weight != nullptr) {
      x = rounded(x * device::to_float(head.weight[at]));
      y = rounded(y * device::to_float(head.weight[at + half]));
      const float turned_x =
          rounded(x * device::to_float(cosine[at])) + rounded(-y * device::to_float(sine[at]));
      y = rounded(y * device::to_float(cosine[at + half])) +
          rounded(x * device::to_float(sine[at + half]));
      x = turned_x;
    }
    head.to[at] = device::round_to_bfloat16(x);
    head.to[at + half] = device::round_to_bfloat16(y);
  }
}

}  // namespace

const char* launch_normalise_heads(const dgemma_normalise_heads& op, void* stream) {
  const auto in = [](const void* p) { return static_cast<const bfloat16*>(p); };
  const Heads p = {.raw_query = in(op.raw_query),
                   .raw_key = in(op.raw_key),
                   .raw_value = in(op.raw_value != nullptr ? op.raw_value : op.raw_key),
                   .query_norm = in(op.query_norm),
                   .key_norm = in(op.key_norm),
                   .cosine = in(op.cosine),
                   .sine = in(op.sine),
                   .query = static_cast<bfloat16*>(op.query),
                   .key = static_cast<bfloat16*>(op.key),
                   .value = static_cast<bfloat16*>(op.value),
                   .heads = op.tokens * (op.query_heads + 2 * op.key_heads),
                   .query_heads = static_cast<int32_t>(op.query_heads),
                   .key_heads = static_cast<int32_t>(op.key_heads),
                   .head_dim = static_cast<int32_t>(op.head_dim),
                   .epsilon = op.epsilon};
  const device::LaunchShape shape = {
      .grid = dim3(static_cast<unsigned>(ceil_divide(p.heads, kWarps))),
      .threads = kThreads,
      .overlaps_previous_kernel = true};
  return device::launch(shape, stream, normalise_heads, p);
}

}  // namespace dgemma
