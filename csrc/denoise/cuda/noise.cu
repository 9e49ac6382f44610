// Uniform tokens where the canvas is not to be kept: a warp has a position.
#include "common/ceil_divide.h"
#include "denoise/cuda/kernels.h"
#include "denoise/cuda/noise.h"
#include "device/launch.h"
#include "device/philox.h"

namespace dgemma {
namespace {

constexpr int32_t kThreads = 128;
constexpr int32_t kWarps = kThreads / 32;

struct Noise {
  int64_t positions;
  int32_t length, vocabulary, purpose;
  const int64_t* seed;
  const int32_t *canvas_index, *step;
  const uint8_t *active, *keep;
  const double* uniforms;
  AllowedTokens allowed;
  int32_t* tokens;
};

__global__ void __launch_bounds__(kThreads) noise_kernel(const Noise p) {
  device::wait_for_previous_kernel();
  device::let_next_kernel_begin();
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kWarps + device::warp_index();
  if (at >= p.positions) return;
  const int64_t request = at / p.length;
  if (!is_active(p.active, request) || (p.keep != nullptr && p.keep[at] != 0)) return;
  const double uniform = p.uniforms != nullptr
                             ? p.uniforms[at]
                             : draw_uniform(p.seed[request], p.canvas_index[request],
                                            p.step[request], at % p.length, p.purpose);
  const int32_t token =
      uniform_token(allowed_bits(p.allowed, p.vocabulary, at), p.vocabulary, uniform);
  if (device::lane_index() == 0) p.tokens[at] = token;
}

}  // namespace

const char* launch_noise(const dgemma_noise& op, void* stream) {
  const Noise p = {.positions = op.batch * op.length,
                   .length = static_cast<int32_t>(op.length),
                   .vocabulary = static_cast<int32_t>(op.vocabulary),
                   .purpose = op.purpose,
                   .seed = op.seed,
                   .canvas_index = op.canvas_index,
                   .step = op.step,
                   .active = op.active,
                   .keep = op.keep,
                   .uniforms = op.uniforms,
                   .allowed = {.mask = reinterpret_cast<const uint32_t*>(op.allowed.mask),
                               .row_index = op.allowed.row_index},
                   .tokens = op.tokens};
  const device::LaunchShape shape = {
      .grid = dim3(static_cast<unsigned>(ceil_divide(p.positions, kWarps))),
      .threads = kThreads,
      .overlaps_previous_kernel = true};
  return device::launch(shape, stream, noise_kernel, p);
}

}  // namespace dgemma
