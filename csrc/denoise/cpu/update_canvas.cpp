// dgemma_cpu_update_canvas: accept, renoise, stop. The meaning is that of EntropyBoundSampler,
// StableAndConfidentStoppingCriteria and LinearTemperatureScheduleLogitsProcessor in transformers'
// generation_diffusion_gemma.py.
#include <cinttypes>
#include <cmath>

#include "denoise/cpu/checks.h"
#include "denoise/cpu/noise.h"
#include "device/philox.h"

namespace dgemma {
namespace {

// One request's part of the op.
struct Request {
  const dgemma_update_canvas& op;
  int64_t index;
  int64_t first;  // its position 0 in the arrays [batch, length]

  bool pinned(int64_t i) const { return op.pinned != nullptr && op.pinned[first + i] != 0; }
};

dgemma_status check_token(const char* name, int32_t token, int64_t position, const Request& request,
                          dgemma_cpu* cpu) {
  if (token >= 0 && token < request.op.vocabulary) return DGEMMA_OK;
  return fail(cpu, DGEMMA_INVALID_ARGUMENT,
              "%s: got token %d at position %" PRId64 " of request %" PRId64
              ", wants 0 to %" PRId64,
              name, token, position, request.index, request.op.vocabulary - 1);
}

dgemma_status check_schedule(const Request& request, dgemma_cpu* cpu) {
  const dgemma_update_canvas& op = request.op;
  const int64_t b = request.index;
  if (op.max_steps[b] < 1)
    return fail(cpu, DGEMMA_INVALID_ARGUMENT,
                "max_steps: got %d for request %" PRId64 ", wants at least 1", op.max_steps[b], b);
  if (op.step[b] < 1 || op.step[b] > op.max_steps[b])
    return fail(cpu, DGEMMA_INVALID_ARGUMENT,
                "step: got %d for request %" PRId64 ", wants 1 to max_steps, which is %d",
                op.step[b], b, op.max_steps[b]);
  if (op.stability_threshold[b] < 0)
    return fail(cpu, DGEMMA_INVALID_ARGUMENT,
                "stability_threshold: got %d for request %" PRId64 ", wants at least 0",
                op.stability_threshold[b], b);
  if (op.stable_steps[b] < 0)
    return fail(cpu, DGEMMA_INVALID_ARGUMENT,
                "stable_steps: got %d for request %" PRId64 ", wants at least 0",
                op.stable_steps[b], b);
  const struct {
    const char* name;
    double value;
  } numbers[] = {{"t_min", op.t_min[b]},
                 {"t_max", op.t_max[b]},
                 {"entropy_bound", op.entropy_bound[b]},
                 {"confidence_threshold", op.confidence_threshold[b]}};
  for (const auto& number : numbers)
    if (!(number.value >= 0.0))
      return fail(cpu, DGEMMA_INVALID_ARGUMENT,
                  "%s: got %g for request %" PRId64 ", wants at least 0", number.name, number.value,
                  b);
  return DGEMMA_OK;
}

dgemma_status check_request(const Request& request, dgemma_cpu* cpu) {
  dgemma_status status = check_schedule(request, cpu);
  for (int64_t i = 0; i < request.op.length && status == DGEMMA_OK; ++i) {
    const int64_t at = request.first + i;
    if (request.pinned(i)) {
      status = check_token("canvas", request.op.canvas[at], i, request, cpu);
      continue;
    }
    status = check_token("sampled", request.op.sampled[at], i, request, cpu);
    if (status == DGEMMA_OK) status = check_token("argmax", request.op.argmax[at], i, request, cpu);
  }
  return status;
}

dgemma_status check(const dgemma_update_canvas& op, dgemma_cpu* cpu) {
  dgemma_status status = check_sizes(op.batch, op.length, op.vocabulary, cpu);
  if (status == DGEMMA_OK) status = check_operands(operands_of(op), cpu);
  if (status != DGEMMA_OK) return status;
  status = check_allowed(op.allowed, op.batch, op.length, op.vocabulary, op.active, cpu);
  if (status != DGEMMA_OK) return status;
  status = check_uniforms(op.uniforms, op.batch, op.length, op.active, cpu);
  for (int64_t b = 0; b < op.batch && status == DGEMMA_OK; ++b)
    if (op.active[b] != 0) status = check_request({op, b, b * op.length}, cpu);
  return status;
}

bool entropies_are_finite(const Request& request) {
  for (int64_t i = 0; i < request.op.length; ++i)
    if (!request.pinned(i) && !std::isfinite(request.op.entropy[request.first + i])) return false;
  return true;
}

// The mean over the positions that are not pinned, summed in index order; 0 when all are pinned.
float mean_entropy(const Request& request) {
  double total = 0.0;
  int64_t count = 0;
  for (int64_t i = 0; i < request.op.length; ++i) {
    if (request.pinned(i)) continue;
    total += request.op.entropy[request.first + i];
    ++count;
  }
  return count > 0 ? static_cast<float>(total / static_cast<double>(count)) : 0.0f;
}

// Takes positions in (entropy, index) order while the entropies of those taken before are within
// the bound. Selecting the least again and again needs no memory for an order: it costs length
// times the number accepted, 0.1 ms when all of 256 are.
void accept(const Request& request) {
  const float* const entropy = request.op.entropy + request.first;
  uint8_t* const accepted = request.op.accepted + request.first;
  const int64_t length = request.op.length;
  for (int64_t i = 0; i < length; ++i) accepted[i] = 0;
  double taken = 0.0;
  while (taken <= static_cast<double>(request.op.entropy_bound[request.index])) {
    int64_t least = -1;
    for (int64_t i = 0; i < length; ++i)
      if (accepted[i] == 0 && !request.pinned(i) && (least < 0 || entropy[i] < entropy[least]))
        least = i;
    if (least < 0) return;
    accepted[least] = 1;
    taken += entropy[least];
  }
}

// The next canvas and the draft. Returns whether the draft is that of the step before.
bool write_canvas(const Request& request, AllowedCount& counts) {
  const dgemma_update_canvas& op = request.op;
  const int64_t b = request.index;
  bool unchanged = true;
  for (int64_t i = 0; i < op.length; ++i) {
    const int64_t at = request.first + i;
    if (request.pinned(i)) {
      op.draft[at] = op.canvas[at];
      continue;
    }
    unchanged = unchanged && op.draft[at] == op.argmax[at];
    op.draft[at] = op.argmax[at];
    if (op.accepted[at] != 0) {
      op.canvas[at] = op.sampled[at];
      continue;
    }
    const double uniform =
        op.uniforms != nullptr
            ? op.uniforms[at]
            : draw_uniform(op.seed[b], op.canvas_index[b], op.step[b], i, DGEMMA_PURPOSE_RENOISE);
    op.canvas[at] =
        uniform_token(allowed_bits(op.allowed, op.vocabulary, at), op.vocabulary, uniform, counts);
  }
  return unchanged;
}

// t_min + (t_max - t_min) * remaining / max_steps, rounded to fp32 after every operation as
// transformers does, whose remaining steps are a tensor.
float scheduled_temperature(double t_min, double t_max, int32_t remaining, int32_t max_steps) {
  const float share = static_cast<float>(remaining) / static_cast<float>(max_steps);
  // volatile: a fused multiply-add would round once less.
  const volatile float rise = static_cast<float>(t_max - t_min) * share;
  return static_cast<float>(t_min) + rise;
}

void update(const Request& request, AllowedCount& counts) {
  const dgemma_update_canvas& op = request.op;
  const int64_t b = request.index;
  if (!entropies_are_finite(request)) {
    for (int64_t i = 0; i < op.length; ++i) op.accepted[request.first + i] = 0;
    op.mean_entropy[b] = NAN;
    op.status[b] = DGEMMA_CANVAS_NON_FINITE;
    op.active[b] = 0;
    return;
  }
  op.mean_entropy[b] = mean_entropy(request);
  accept(request);
  op.stable_steps[b] = write_canvas(request, counts) ? op.stable_steps[b] + 1 : 0;

  const int32_t steps_done = op.step[b];
  const bool stable = op.stable_steps[b] >= op.stability_threshold[b] &&
                      op.mean_entropy[b] < op.confidence_threshold[b];
  const bool last = steps_done == op.max_steps[b];
  op.status[b] = stable ? DGEMMA_CANVAS_STABLE
                 : last ? DGEMMA_CANVAS_STEP_CAP
                        : DGEMMA_CANVAS_RUNNING;
  op.active[b] = !stable && !last;
  op.step[b] = steps_done + 1;
  op.temperature[b] = scheduled_temperature(op.t_min[b], op.t_max[b], op.max_steps[b] - steps_done,
                                            op.max_steps[b]);
}

}  // namespace
}  // namespace dgemma

dgemma_status dgemma_cpu_update_canvas(const dgemma_update_canvas* op, dgemma_cpu* cpu) {
  dgemma_status status = dgemma::check_call(op, cpu);
  if (status == DGEMMA_OK) status = dgemma::check(*op, cpu);
  if (status != DGEMMA_OK) return status;
  dgemma::AllowedCount counts(op->vocabulary);
  for (int64_t b = 0; b < op->batch; ++b)
    if (op->active[b] != 0) dgemma::update({*op, b, b * op->length}, counts);
  return DGEMMA_OK;
}
