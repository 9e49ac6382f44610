// Tells the test bed where torch's tensors begin and end (host_memory.h). From the call on, torch
// takes the memory of its tensors from here, with a margin around each that no tensor has.
#include <c10/core/CPUAllocator.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#include "host_memory.h"

namespace {

// As torch's own.
constexpr size_t kAlignment = 64;
static_assert(sim::kHostMargin % kAlignment == 0);

void give_back(void* memory) {
  sim::host_freed(memory);
  std::free(static_cast<uint8_t*>(memory) - sim::kHostMargin);
}

class WatchedAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    const c10::Device cpu(c10::DeviceType::CPU);
    if (bytes == 0) return {nullptr, cpu};
    const size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    auto* region =
        static_cast<uint8_t*>(std::aligned_alloc(kAlignment, rounded + 2 * sim::kHostMargin));
    if (region == nullptr) throw std::bad_alloc();
    uint8_t* memory = region + sim::kHostMargin;
    // What is read there shows in the results: NaN in every float format.
    std::memset(region, 0xff, sim::kHostMargin);
    std::memset(memory + bytes, 0xff, rounded - bytes + sim::kHostMargin);
    sim::host_allocated(memory, bytes);
    return {memory, memory, give_back, cpu};
  }
  c10::DeleterFnPtr raw_deleter() const override { return give_back; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};

}  // namespace

// Tensors that are there before are not known.
extern "C" [[gnu::visibility("default")]] void sim_watch_tensors() {
  static WatchedAllocator allocator;
  sim::host_has_other_memory();
  c10::SetCPUAllocator(&allocator, 1);
}
