// Runs one fault by its number, and the launches and tensor maps that are refused.
#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <string_view>

#include "../entry.h"
#include "fault.h"
#include "host_memory.h"

namespace faults {
namespace {

constexpr size_t kGlobalBytes = 8192;

const std::vector<Fault>& all_faults() {
  static const std::vector<Fault> all = [] {
    std::vector<Fault> found;
    for (const auto& topic :
         {collective_faults(), barrier_faults(), cluster_faults(), copy_faults(), matrix_faults(),
          shared_memory_faults(), global_memory_faults()})
      found.insert(found.end(), topic.begin(), topic.end());
    return found;
  }();
  return all;
}

// With a page behind it that nobody may touch.
uint8_t* global_memory() {
  static uint8_t* memory = [] {
    void* region =
        mmap(nullptr, 2 * kGlobalBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    mprotect(static_cast<uint8_t*>(region) + kGlobalBytes, kGlobalBytes, PROT_NONE);
    return static_cast<uint8_t*>(region);
  }();
  return memory;
}

// Runs in front of each fault.
void __launch_bounds__(128) front_kernel(Arguments a) {
  a.global[4096 + threadIdx.x] = a.global[2048 + threadIdx.x] + 1;
}

const char* run(const Fault& fault, void (*after_front)() = [] {}) {
  uint8_t* global = global_memory();
  std::memset(global, 0, kGlobalBytes);
  Arguments arguments{};
  arguments.global = global;
  TensorLayout layout{ElementType::bfloat16, 2, global, {64, 64}, {0, 128}, {64, 8},
                      Swizzle::bytes_128};
  if (const char* error = encode_tensor_map(&arguments.map, layout)) return error;
  layout.box[0] = 8;
  layout.swizzle = Swizzle::none;
  if (const char* error = encode_tensor_map(&arguments.plain, layout)) return error;
  LaunchShape shape;
  shape.threads = 128;
  shape.shared_bytes = sizeof(Shared);
  if (const char* error = launch(shape, nullptr, front_kernel, arguments)) return error;
  after_front();
  shape.overlaps_previous_kernel = true;
  if (fault.middle != nullptr)
    if (const char* error = launch(shape, nullptr, fault.middle, arguments)) return error;
  shape.threads = fault.threads;
  shape.grid = dim3(fault.blocks);
  shape.cluster_blocks = fault.cluster_blocks;
  return launch(shape, nullptr, fault.kernel, arguments);
}

const Fault& find(std::string_view name) {
  for (const Fault& fault : all_faults())
    if (fault.name == name) return fault;
  std::abort();
}

}  // namespace
}  // namespace faults

using namespace faults;

extern "C" __attribute__((visibility("default"))) int fault_count() {
  return static_cast<int>(all_faults().size());
}
SIM_ENTRY fault_name(int fault) { return all_faults()[static_cast<size_t>(fault)].name; }
SIM_ENTRY run_fault(int fault) { return run(all_faults()[static_cast<size_t>(fault)]); }

// A launch with so much shared memory, so many threads and blocks along y, in this stream.
SIM_ENTRY launch_with(uint32_t shared_bytes, uint32_t threads, uint32_t blocks, void* stream) {
  LaunchShape shape;
  shape.grid = dim3(1, blocks);
  shape.threads = threads;
  shape.shared_bytes = shared_bytes;
  return launch(shape, stream, front_kernel, Arguments{global_memory(), {}, {}});
}

SIM_ENTRY run_fault_named(const char* name) { return run(find(name)); }

// The same where the host tells that all of global memory is one tensor's but the last bytes, and,
// where so asked, that the tensor is freed and another is there when the kernel in front has ended.
SIM_ENTRY run_fault_in_a_tensor(const char* name, uint32_t bytes_less, int given_out_anew) {
  static size_t bytes;
  bytes = kGlobalBytes - bytes_less;
  sim::host_allocated(global_memory(), bytes);
  const char* error = given_out_anew ? run(find(name),
                                           [] {
                                             sim::host_freed(global_memory());
                                             sim::host_allocated(global_memory(), bytes);
                                           })
                                     : run(find(name));
  sim::host_freed(global_memory());
  return error;
}

// One tensor map out of the ordinary: which number of a layout is changed, and to what.
SIM_ENTRY encode(const char* what, uint64_t value) {
  alignas(128) static uint8_t global[1024];
  TensorLayout layout{ElementType::bfloat16, 2, global, {64, 64}, {0, 128}, {64, 8},
                      Swizzle::bytes_128};
  const std::string_view name = what;
  if (name == "base") layout.base = global + value;
  if (name == "rank") layout.rank = static_cast<int>(value);
  if (name == "size") layout.size[1] = value;
  if (name == "stride") layout.stride[1] = value;
  if (name == "box") layout.box[1] = static_cast<uint32_t>(value);
  if (name == "inner box") layout.box[0] = static_cast<uint32_t>(value);
  if (name == "swizzle") layout.swizzle = static_cast<Swizzle>(value);
  TensorMap map;
  return encode_tensor_map(&map, layout);
}
