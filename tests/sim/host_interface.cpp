// The interface for tests, beside that of the kernels under test.
#include <algorithm>

#include "host_memory.h"
#include "kernel_order.h"
#include "machine.h"
#include "plain_access.h"
#include "shadow.h"

extern "C" {
[[gnu::visibility("default")]] void sim_set_gpu(int32_t compute_capability,
                                                int32_t multiprocessors) {
  sim::forget_kernel_in_front();
  sim::compute_capability = compute_capability;
  sim::multiprocessors = multiprocessors;
}
// The stream that calls from here on are made with, and all their launches.
[[gnu::visibility("default")]] void* sim_set_stream(void* stream) {
  sim::stream_of_calls = stream;
  return stream;
}
[[gnu::visibility("default")]] void sim_set_checks(int on) { sim::checking = on != 0; }
[[gnu::visibility("default")]] void sim_watch_plain_accesses(int on) { sim::watching = on != 0; }
[[gnu::visibility("default")]] void sim_set_seed(uint64_t seed) {
  sim::next_seed = seed;
  sim::forget_kernel_in_front();
}
// A launch takes one seed: the difference of two calls is how many there were between them.
[[gnu::visibility("default")]] uint64_t sim_next_seed() { return sim::next_seed; }
// The last report, whole: what takes one over from a launch may have less room.
[[gnu::visibility("default")]] const char* sim_last_error() { return sim::last_error.c_str(); }
[[gnu::visibility("default")]] void sim_statistics(uint64_t (&out)[6]) {
  const sim::Statistics& s = sim::last_statistics;
  const uint64_t values[6] = {
      s.switches, s.rounds, s.bulk_bytes_read, s.bulk_bytes_written, s.small_copy_bytes_read,
      s.products};
  std::copy(values, values + 6, out);
}
// Boxes that blocks asked the L2 for since the last call, and how many the same block loaded after.
[[gnu::visibility("default")]] void sim_prefetches(uint64_t (&out)[2]) {
  std::copy(sim::prefetches, sim::prefetches + 2, out);
  std::fill(sim::prefetches, sim::prefetches + 2, 0);
}
}
