// What this GPU does, measured in a few seconds: read bandwidth, the gap between two kernels, and
// whether a WHILE node of a CUDA graph and programmatic dependent launch work.
//
//   nvcc -std=c++20 -O3 -gencode arch=compute_90a,code=sm_90a -o probe tools/probe.cu && ./probe
//
// Exits with 1 when a call that every supported GPU must answer fails.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace {

void require(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "probe: %s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

// Time on the device between two points of a stream.
class Timer {
 public:
  explicit Timer(cudaStream_t stream) : stream_(stream) {
    require(cudaEventCreate(&begin_), "cudaEventCreate");
    require(cudaEventCreate(&end_), "cudaEventCreate");
  }
  Timer(const Timer&) = delete;
  Timer& operator=(const Timer&) = delete;
  ~Timer() {
    cudaEventDestroy(begin_);
    cudaEventDestroy(end_);
  }

  template <typename Work>
  float microseconds(Work work) {
    require(cudaEventRecord(begin_, stream_), "cudaEventRecord");
    work();
    require(cudaEventRecord(end_, stream_), "cudaEventRecord");
    require(cudaEventSynchronize(end_), "cudaEventSynchronize");
    float milliseconds = 0;
    require(cudaEventElapsedTime(&milliseconds, begin_, end_), "cudaEventElapsedTime");
    return 1000 * milliseconds;
  }

 private:
  cudaStream_t stream_;
  cudaEvent_t begin_ = nullptr;
  cudaEvent_t end_ = nullptr;
};

float median(std::vector<float> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

// ---- Read bandwidth -----------------------------------------------------------------------------

constexpr int kReadThreads = 512;
constexpr int kLoadsInFlight = 8;  // 16 bytes each: 64 KiB per block, above what latency asks for

__global__ void __launch_bounds__(kReadThreads)
    read_all(const uint4* __restrict__ data, int64_t count, uint32_t* sink) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kReadThreads;
  uint32_t mixed = 0;
  int64_t i = static_cast<int64_t>(blockIdx.x) * kReadThreads + threadIdx.x;
  for (; i + (kLoadsInFlight - 1) * stride < count; i += kLoadsInFlight * stride) {
    uint4 loaded[kLoadsInFlight];
#pragma unroll
    for (int j = 0; j < kLoadsInFlight; ++j) loaded[j] = __ldcs(data + i + j * stride);
#pragma unroll
    for (int j = 0; j < kLoadsInFlight; ++j)
      mixed ^= loaded[j].x ^ loaded[j].y ^ loaded[j].z ^ loaded[j].w;
  }
  for (; i < count; i += stride) {
    const uint4 loaded = __ldcs(data + i);
    mixed ^= loaded.x ^ loaded.y ^ loaded.z ^ loaded.w;
  }
  // The buffer is zero, so this is never true, which the compiler cannot know.
  if (mixed != 0) *sink = mixed;
}

void report_read_bandwidth(const cudaDeviceProp& device, cudaStream_t stream) {
  size_t free_bytes = 0;
  size_t total_bytes = 0;
  require(cudaMemGetInfo(&free_bytes, &total_bytes), "cudaMemGetInfo");
  // Far more than any L2 holds, and no more than a third of what is free.
  const size_t bytes = std::min(size_t{4} << 30, free_bytes / 3) & ~size_t{4095};
  uint4* data = nullptr;
  uint32_t* sink = nullptr;
  require(cudaMalloc(&data, bytes), "cudaMalloc");
  require(cudaMalloc(&sink, sizeof *sink), "cudaMalloc");
  require(cudaMemsetAsync(data, 0, bytes, stream), "cudaMemsetAsync");

  Timer timer(stream);
  float best_gbps = 0;
  int best_blocks = 0;
  for (int blocks_per_sm : {1, 2, 4}) {
    std::vector<float> times;
    for (int run = 0; run < 11; ++run)
      times.push_back(timer.microseconds([&] {
        read_all<<<device.multiProcessorCount * blocks_per_sm, kReadThreads, 0, stream>>>(
            data, static_cast<int64_t>(bytes / sizeof(uint4)), sink);
        require(cudaGetLastError(), "read_all");
      }));
    const float gbps = static_cast<float>(bytes) / median(times) / 1e3f;
    if (gbps > best_gbps) {
      best_gbps = gbps;
      best_blocks = blocks_per_sm;
    }
  }
  std::printf(
      "read bandwidth: %.0f GB/s (%.1f GiB, median of 11, %d blocks of %d threads per SM)\n",
      best_gbps, static_cast<double>(bytes) / (1 << 30), best_blocks, kReadThreads);
  require(cudaFree(data), "cudaFree");
  require(cudaFree(sink), "cudaFree");
}

// ---- The gap between two kernels ----------------------------------------------------------------

__global__ void nothing() {
#if __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
  cudaGridDependencySynchronize();
#endif
}

// Launches `nothing`; with `overlapped` it may begin before the kernel ahead of it has ended.
cudaError_t launch_nothing(cudaStream_t stream, int blocks, bool overlapped) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(128);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = overlapped ? 1 : 0;
  return cudaLaunchKernelEx(&config, nothing);
}

constexpr int kChain = 1000;

// Microseconds per kernel of a chain; negative when this machine refuses it.
float chain_period(cudaStream_t stream, int blocks, bool graph, bool overlapped) {
  Timer timer(stream);
  std::vector<float> times;
  cudaGraphExec_t executable = nullptr;
  if (graph) {
    cudaGraph_t captured = nullptr;
    require(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "begin capture");
    cudaError_t error = cudaSuccess;
    for (int i = 0; i < kChain && error == cudaSuccess; ++i)
      error = launch_nothing(stream, blocks, overlapped);
    const cudaError_t ended = cudaStreamEndCapture(stream, &captured);
    if (error == cudaSuccess) error = ended;
    if (error == cudaSuccess) error = cudaGraphInstantiate(&executable, captured, 0);
    if (captured != nullptr) cudaGraphDestroy(captured);
    if (error != cudaSuccess) {
      cudaGetLastError();
      return -1;
    }
  }
  for (int run = 0; run < 7; ++run) {
    cudaError_t error = cudaSuccess;
    times.push_back(timer.microseconds([&] {
      if (graph)
        error = cudaGraphLaunch(executable, stream);
      else
        for (int i = 0; i < kChain && error == cudaSuccess; ++i)
          error = launch_nothing(stream, blocks, overlapped);
    }));
    if (error != cudaSuccess) {
      cudaGetLastError();
      return -1;
    }
  }
  if (executable != nullptr) cudaGraphExecDestroy(executable);
  return median(times) / kChain;
}

void report_launch_gap(const cudaDeviceProp& device, cudaStream_t stream) {
  const int blocks = device.multiProcessorCount;
  for (bool graph : {false, true}) {
    for (bool overlapped : {false, true}) {
      const float period = chain_period(stream, blocks, graph, overlapped);
      std::printf("launch gap, %s%s: ", graph ? "graph" : "stream",
                  overlapped ? ", programmatic dependent launch" : "");
      if (period < 0)
        std::printf("not possible here\n");
      else
        std::printf("%.2f us per empty kernel of %d blocks (chain of %d)\n", period, blocks,
                    kChain);
    }
  }
}

// ---- WHILE node ---------------------------------------------------------------------------------

__global__ void count_down(cudaGraphConditionalHandle handle, int* left, int* rounds) {
  *rounds += 1;
  *left -= 1;
  cudaGraphSetConditional(handle, *left > 0 ? 1u : 0u);
}

cudaError_t run_while_node(cudaStream_t stream, int rounds, int* rounds_made, float* microseconds) {
  int* state = nullptr;  // left, rounds
  require(cudaMalloc(&state, 2 * sizeof(int)), "cudaMalloc");
  cudaGraph_t graph = nullptr;
  require(cudaGraphCreate(&graph, 0), "cudaGraphCreate");
  cudaGraphConditionalHandle handle;
  cudaError_t error =
      cudaGraphConditionalHandleCreate(&handle, graph, 1, cudaGraphCondAssignDefault);
  if (error != cudaSuccess) return error;

  cudaGraphNodeParams loop = {};
  loop.type = cudaGraphNodeTypeConditional;
  loop.conditional.handle = handle;
  loop.conditional.type = cudaGraphCondTypeWhile;
  loop.conditional.size = 1;
  cudaGraphNode_t loop_node = nullptr;
#if CUDART_VERSION >= 13000
  error = cudaGraphAddNode(&loop_node, graph, nullptr, nullptr, 0, &loop);
#else
  error = cudaGraphAddNode(&loop_node, graph, nullptr, 0, &loop);
#endif
  if (error != cudaSuccess) return error;

  int* left = state;
  int* made = state + 1;
  void* arguments[] = {&handle, &left, &made};
  cudaKernelNodeParams kernel = {};
  kernel.func = reinterpret_cast<void*>(count_down);
  kernel.gridDim = dim3(1);
  kernel.blockDim = dim3(1);
  kernel.kernelParams = arguments;
  cudaGraphNode_t kernel_node = nullptr;
  error =
      cudaGraphAddKernelNode(&kernel_node, loop.conditional.phGraph_out[0], nullptr, 0, &kernel);
  if (error != cudaSuccess) return error;

  cudaGraphExec_t executable = nullptr;
  error = cudaGraphInstantiate(&executable, graph, 0);
  if (error != cudaSuccess) return error;
  Timer timer(stream);
  for (int run = 0; run < 2; ++run) {  // the second is timed: the first uploads the graph
    const int start[2] = {rounds, 0};
    require(cudaMemcpyAsync(state, start, sizeof start, cudaMemcpyHostToDevice, stream), "copy");
    *microseconds = timer.microseconds([&] { error = cudaGraphLaunch(executable, stream); });
    if (error != cudaSuccess) return error;
  }
  require(cudaMemcpy(rounds_made, made, sizeof(int), cudaMemcpyDeviceToHost), "copy");
  cudaGraphExecDestroy(executable);
  cudaGraphDestroy(graph);
  cudaFree(state);
  return cudaSuccess;
}

void report_while_node(cudaStream_t stream) {
  constexpr int kRounds = 1000;
  int made = 0;
  float microseconds = 0;
  const cudaError_t error = run_while_node(stream, kRounds, &made, &microseconds);
  if (error != cudaSuccess)
    std::printf("graph WHILE node: does not work here (%s)\n", cudaGetErrorString(error));
  else if (made != kRounds)
    std::printf("graph WHILE node: wrong, made %d rounds of %d\n", made, kRounds);
  else
    std::printf("graph WHILE node: works, %.2f us per round (%d rounds)\n", microseconds / kRounds,
                kRounds);
  cudaGetLastError();
}

// ---- Programmatic dependent launch --------------------------------------------------------------

constexpr uint64_t kSpinNanoseconds = 50'000;  // many times a launch gap, many clock ticks

__device__ uint64_t nanoseconds() {
  uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

struct Observed {
  uint64_t first_end;     // when the first kernel ended
  uint64_t second_begin;  // when the second began, before it waited for the first
  int written;            // by the first kernel at its end
  int seen;               // by the second after it waited
};

__global__ void first_kernel(Observed* observed) {
#if __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
  const uint64_t begin = nanoseconds();
  while (nanoseconds() - begin < kSpinNanoseconds) {
  }
  observed->written = 42;
  observed->first_end = nanoseconds();
}

__global__ void second_kernel(Observed* observed) {
  const uint64_t begin = nanoseconds();
#if __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
  observed->second_begin = begin;
  observed->seen = observed->written;
}

cudaError_t launch_pair(Observed* observed, cudaStream_t stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(1);
  config.blockDim = dim3(1);
  config.stream = stream;
  const cudaError_t error = cudaLaunchKernelEx(&config, first_kernel, observed);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, second_kernel, observed);
}

void report_dependent_launch(cudaStream_t stream, bool graph) {
  Observed* observed = nullptr;
  require(cudaMalloc(&observed, sizeof *observed), "cudaMalloc");
  require(cudaMemsetAsync(observed, 0, sizeof *observed, stream), "cudaMemsetAsync");
  cudaError_t error = cudaSuccess;
  if (graph) {
    cudaGraph_t captured = nullptr;
    cudaGraphExec_t executable = nullptr;
    require(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "begin capture");
    error = launch_pair(observed, stream);
    const cudaError_t ended = cudaStreamEndCapture(stream, &captured);
    if (error == cudaSuccess) error = ended;
    if (error == cudaSuccess) error = cudaGraphInstantiate(&executable, captured, 0);
    if (error == cudaSuccess) error = cudaGraphLaunch(executable, stream);
    if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
    if (executable != nullptr) cudaGraphExecDestroy(executable);
    if (captured != nullptr) cudaGraphDestroy(captured);
  } else {
    error = launch_pair(observed, stream);
    if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
  }
  Observed result = {};
  if (error == cudaSuccess)
    error = cudaMemcpy(&result, observed, sizeof result, cudaMemcpyDeviceToHost);
  std::printf("programmatic dependent launch, %s: ", graph ? "graph" : "stream");
  if (error != cudaSuccess)
    std::printf("does not work here (%s)\n", cudaGetErrorString(error));
  else if (result.seen != 42)
    std::printf("wrong, the second kernel did not see what the first wrote\n");
  else if (result.second_begin >= result.first_end)
    std::printf("accepted, but the second kernel began only after the first had ended\n");
  else
    std::printf("works, the second kernel began %.1f us before the first ended\n",
                static_cast<double>(result.first_end - result.second_begin) / 1e3);
  cudaGetLastError();
  require(cudaFree(observed), "cudaFree");
}

}  // namespace

int main() {
  cudaDeviceProp device;
  require(cudaGetDeviceProperties(&device, 0), "cudaGetDeviceProperties");
  int driver = 0;
  int runtime = 0;
  require(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
  require(cudaRuntimeGetVersion(&runtime), "cudaRuntimeGetVersion");
  std::printf(
      "device: %s, compute capability %d.%d, %d SMs, L2 %d MiB, %zu KiB shared memory per block, "
      "driver %d.%d, runtime %d.%d\n",
      device.name, device.major, device.minor, device.multiProcessorCount, device.l2CacheSize >> 20,
      device.sharedMemPerBlockOptin >> 10, driver / 1000, driver % 1000 / 10, runtime / 1000,
      runtime % 1000 / 10);
  cudaStream_t stream;
  require(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
  report_read_bandwidth(device, stream);
  report_launch_gap(device, stream);
  report_while_node(stream);
  report_dependent_launch(stream, false);
  report_dependent_launch(stream, true);
  require(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  return 0;
}
