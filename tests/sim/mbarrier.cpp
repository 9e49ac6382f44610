// mbarriers. The eight bytes in shared memory hold a mark and a number; what a barrier counts
// stands in the block's table, so that a barrier which is overwritten, or was never initialised, is
// told apart.
#include <cstdio>

#include "operations.h"

namespace sim {

namespace {

constexpr uint64_t kMark = 0xbad0bad0'00000000u;
constexpr uint32_t kMaxCount = (1u << 20) - 1;  // PTX ISA: both counts lie below 2^20

MbarrierState& find(Block& block, uint32_t offset, const char* what, const Source& source) {
  const uint64_t word = *reinterpret_cast<const uint64_t*>(block.shared + offset);
  const uint64_t number = word & 0xffffffffu;
  if ((word & ~0xffffffffull) != kMark || number >= block.mbarriers.size() ||
      block.mbarriers[number].offset != offset || !block.mbarriers[number].alive)
    fail(source,
         "%s: no mbarrier at offset %u in shared memory (never initialised, or overwritten)", what,
         offset);
  return block.mbarriers[number];
}

MbarrierState& find(uint64_t* state, const char* what, const Source& source) {
  const SharedPlace place = shared_place(state, 8, 8, what, source);
  return find(*place.block, place.offset, what, source);
}

void settle(Block& block, MbarrierState& barrier, const Source& source) {
  if (barrier.pending != 0) return;
  if (barrier.bytes < 0)
    fail(source,
         "%s: mbarrier at offset %u: %lld bytes more have come than were expected in phase %llu",
         name_of(block).c_str(), barrier.offset, static_cast<long long>(-barrier.bytes),
         static_cast<unsigned long long>(barrier.phase));
  if (barrier.bytes > 0) return;
  ++barrier.phase;
  barrier.pending = barrier.count;
  wake(barrier.waiters);
}

void arrive(Block& block, MbarrierState& barrier, const Source& source) {
  if (barrier.pending == 0)
    fail(source,
         "%s: mbarrier at offset %u: one arrival more than the %u it was initialised for (phase "
         "%llu "
         "still waits for %lld bytes)",
         name_of(block).c_str(), barrier.offset, barrier.count,
         static_cast<unsigned long long>(barrier.phase), static_cast<long long>(barrier.bytes));
  --barrier.pending;
  ++machine->progress;
  settle(block, barrier, source);
}

std::string describe_wait(const Thread& thread) {
  const auto offset = static_cast<uint32_t>(thread.wait.value >> 1);
  const unsigned parity = thread.wait.value & 1;
  for (const MbarrierState& barrier : thread.block->mbarriers) {
    if (barrier.offset != offset || !barrier.alive) continue;
    char text[200];
    std::snprintf(text, sizeof text,
                  "waits for parity %u of the mbarrier at offset %u, which is in phase %llu: %u of "
                  "%u arrivals and %lld bytes are missing",
                  parity, offset, static_cast<unsigned long long>(barrier.phase), barrier.pending,
                  barrier.count, static_cast<long long>(barrier.bytes));
    return text;
  }
  return "waits for an mbarrier that is gone";
}

}  // namespace

void mbarrier_init(uint64_t* state, uint32_t arrivals, const Source& source) {
  const SharedPlace place = shared_place(state, 8, 8, "mbarrier_init", source);
  if (place.block != self().block) fail(source, "mbarrier_init in another block's shared memory");
  if (arrivals == 0 || arrivals > kMaxCount)
    fail(source, "mbarrier_init: %u arrivals; must be 1 to %u", arrivals, kMaxCount);
  std::vector<MbarrierState>& all = place.block->mbarriers;
  for (MbarrierState& barrier : all)
    if (barrier.offset == place.offset && barrier.alive)
      fail(source, "mbarrier_init: the mbarrier at offset %u is initialised already", place.offset);
  MbarrierState barrier;
  barrier.offset = place.offset;
  barrier.count = barrier.pending = arrivals;
  barrier.alive = true;
  *state = kMark | all.size();
  all.push_back(std::move(barrier));
}

void mbarrier_invalidate(uint64_t* state, const Source& source) {
  MbarrierState& barrier = find(state, "mbarrier_invalidate", source);
  if (!barrier.waiters.empty())
    fail(source, "mbarrier_invalidate: threads wait for the mbarrier at offset %u", barrier.offset);
  barrier.alive = false;
}

void mbarrier_arrive(uint64_t* state, const Source& source) {
  const SharedPlace place = shared_place(state, 8, 8, "mbarrier_arrive", source);
  mbarrier_arrive_in(*place.block, place.offset, source);
}

void mbarrier_arrive_at_block(uint64_t* state, uint32_t rank, const Source& source) {
  mbarrier_arrive(static_cast<uint64_t*>(shared_of_block(state, rank, source)), source);
}

void mbarrier_expect_bytes(uint64_t* state, uint32_t bytes, const Source& source) {
  MbarrierState& barrier = find(state, "mbarrier_expect_bytes", source);
  if (bytes > kMaxCount || barrier.bytes + bytes > kMaxCount)
    fail(source, "mbarrier at offset %u: more than %u bytes expected", barrier.offset, kMaxCount);
  barrier.bytes += bytes;
  ++machine->progress;
}

bool mbarrier_try_wait(uint64_t* state, uint32_t parity, const Source& source) {
  const SharedPlace place = shared_place(state, 8, 8, "mbarrier_try_wait", source);
  if (place.block != self().block) fail(source, "waits for an mbarrier of another block");
  const MbarrierState& barrier = find(*place.block, place.offset, "mbarrier_try_wait", source);
  if ((barrier.phase & 1) != parity) return true;
  yield([](const Thread&) -> std::string { return "looks at an mbarrier again and again"; },
        source);
  return false;
}

void mbarrier_wait(uint64_t* state, uint32_t parity, const Source& source) {
  if (parity > 1) fail(source, "mbarrier_wait: parity %u", parity);
  const SharedPlace place = shared_place(state, 8, 8, "mbarrier_wait", source);
  if (place.block != self().block) fail(source, "waits for an mbarrier of another block");
  // Looked up again after every wake: the table may have grown. And the parity may have turned
  // twice.
  while ((find(*place.block, place.offset, "mbarrier_wait", source).phase & 1) == parity) {
    MbarrierState& barrier = find(*place.block, place.offset, "mbarrier_wait", source);
    block_on(barrier.waiters, {describe_wait, nullptr, place.offset * 2ull + parity, source});
  }
}

void fence_mbarrier_init() {
  for (MbarrierState& barrier : self().block->mbarriers) barrier.fenced = true;
}

void check_counts_bytes(Block& block, uint32_t offset, const Source& source) {
  if (!find(block, offset, "a copy's mbarrier", source).fenced)
    fail(source,
         "the mbarrier at offset %u is used by a copy without fence_mbarrier_init() since its "
         "mbarrier_init",
         offset);
}

void mbarrier_arrive_in(Block& block, uint32_t offset, const Source& source) {
  arrive(block, find(block, offset, "mbarrier_arrive", source), source);
}

void mbarrier_complete_bytes(Block& block, uint32_t offset, uint32_t bytes, const Source& source) {
  MbarrierState& barrier = find(block, offset, "a copy's mbarrier", source);
  barrier.bytes -= bytes;
  settle(block, barrier, source);
}

}  // namespace sim
