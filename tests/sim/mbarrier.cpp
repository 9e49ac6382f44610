// mbarriers. The eight bytes in shared memory hold a mark and a number; what a barrier counts
// stands in the block's table, so that a barrier which is overwritten, or was never initialised, is
// told apart.
#include <algorithm>
#include <cstdio>

#include "operations.h"
#include "shadow.h"

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
  ClockRef reads = publish_reads(barrier.gathered);
  barrier.ended[barrier.phase & 1] = {publish(barrier.gathered), std::move(reads), barrier.epoch};
  barrier.epoch = ++block.mbarrier_epochs[barrier.slot];
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
  if (machine->current == nullptr) return settle(block, barrier, source);
  // mbarrier.arrive is .release.cta where nothing else is said: in another block writes before it
  // may be seen after it.
  if (&block == self().block)
    release(self(), barrier.gathered);
  else
    release_reads(self(), barrier.gathered);
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

// A wait names a phase by its parity alone: where the one that is meant ended so long ago that the
// next of the other parity has ended too, it takes that one for it, or waits for a third. What is
// meant is the phase after the last that the thread knows to have ended.
void check_not_behind(MbarrierState& barrier, uint32_t parity, const Source& source) {
  Thread& thread = self();
  if (thread.block->mbarriers.size() > kMbarrierSlots) return;  // two share a slot
  const auto running = static_cast<int64_t>(barrier.phase);
  const uint32_t known = thread.clock->known[mbarrier_slot(*thread.block, barrier.slot)];
  const int64_t last = std::max<int64_t>(-1, running - (int64_t{barrier.epoch} - known));
  if (last >= 0 && (last & 1) != static_cast<int64_t>(parity) && running >= last + 3)
    fail(source,
         "waits two phases behind: for the end of phase %lld of the mbarrier at offset %u, where "
         "phase %lld runs",
         static_cast<long long>(last + 1), barrier.offset, static_cast<long long>(running));
}

void see_end(Block& block, MbarrierState& barrier, uint32_t parity) {
  Thread& thread = self();
  const MbarrierState::Phase& phase = barrier.ended[parity];
  acquire(thread, phase.known, false);
  acquire_reads(thread, phase.reads);
  if (phase.epoch != 0) learn(thread, mbarrier_slot(block, barrier.slot), phase.epoch);
}

}  // namespace

namespace {
void check_initialised(Block& block, uint32_t offset, const char* what, const Source& source) {
  touch_or_fail(block, offset, 8, kWrite | kAtomic, actor(self()), source, what, false);
}
}  // namespace

void check_use(Block& block, uint32_t offset, const char* what, const Source& source) {
  check_initialised(block, offset, what, source);
  if (&block != self().block)
    visit(block, slot_of(self()), self().epoch, place_number(source), false);
}

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
  barrier.slot = static_cast<uint32_t>(all.size() % kMbarrierSlots);
  barrier.epoch = ++place.block->mbarrier_epochs[barrier.slot];
  touch_or_fail(*place.block, place.offset, 8, kWrite, actor(self()), source, "mbarrier_init");
  self().touched = true;
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
  find(*place.block, place.offset, "mbarrier_arrive", source);
  check_use(*place.block, place.offset, "mbarrier_arrive", source);
  mbarrier_arrive_in(*place.block, place.offset, source);
}

void mbarrier_arrive_at_block(uint64_t* state, uint32_t rank, const Source& source) {
  mbarrier_arrive(static_cast<uint64_t*>(shared_of_block(state, rank, source)), source);
}

void mbarrier_expect_bytes(uint64_t* state, uint32_t bytes, const Source& source) {
  MbarrierState& barrier = find(state, "mbarrier_expect_bytes", source);
  check_use(*self().block, barrier.offset, "mbarrier_expect_bytes", source);
  if (bytes > kMaxCount || barrier.bytes + bytes > kMaxCount)
    fail(source, "mbarrier at offset %u: more than %u bytes expected", barrier.offset, kMaxCount);
  barrier.bytes += bytes;
  ++machine->progress;
}

bool mbarrier_try_wait(uint64_t* state, uint32_t parity, const Source& source) {
  const SharedPlace place = shared_place(state, 8, 8, "mbarrier_try_wait", source);
  if (place.block != self().block) fail(source, "waits for an mbarrier of another block");
  MbarrierState& barrier = find(*place.block, place.offset, "mbarrier_try_wait", source);
  check_use(*place.block, place.offset, "mbarrier_try_wait", source);
  check_not_behind(barrier, parity, source);
  if ((barrier.phase & 1) != parity) {
    see_end(*place.block, barrier, parity);
    return true;
  }
  yield([](const Thread&) -> std::string { return "looks at an mbarrier again and again"; },
        source);
  return false;
}

void mbarrier_wait(uint64_t* state, uint32_t parity, const Source& source) {
  if (parity > 1) fail(source, "mbarrier_wait: parity %u", parity);
  const SharedPlace place = shared_place(state, 8, 8, "mbarrier_wait", source);
  if (place.block != self().block) fail(source, "waits for an mbarrier of another block");
  MbarrierState& first = find(*place.block, place.offset, "mbarrier_wait", source);
  check_use(*place.block, place.offset, "mbarrier_wait", source);
  check_not_behind(first, parity, source);
  // Looked up again after every wake: the table may have grown. And the parity may have turned
  // twice.
  while ((find(*place.block, place.offset, "mbarrier_wait", source).phase & 1) == parity) {
    MbarrierState& barrier = find(*place.block, place.offset, "mbarrier_wait", source);
    block_on(barrier.waiters, {describe_wait, nullptr, place.offset * 2ull + parity, source});
  }
  see_end(*place.block, find(*place.block, place.offset, "mbarrier_wait", source), parity);
}

void fence_mbarrier_init() {
  for (MbarrierState& barrier : self().block->mbarriers) barrier.fenced = true;
}

PhaseTime running_phase(Block& block, uint32_t offset, const Source& source) {
  const MbarrierState& barrier = find(block, offset, "a copy's mbarrier", source);
  return {mbarrier_slot(block, barrier.slot), barrier.epoch};
}

void check_counts_bytes(Block& block, uint32_t offset, const Source& source) {
  const MbarrierState& barrier = find(block, offset, "a copy's mbarrier", source);
  check_initialised(block, offset, "a copy's mbarrier", source);  // the copy's visit is its own
  if (!barrier.fenced)
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
  if (barrier.bytes < -static_cast<int64_t>(kMaxCount))
    fail(source, "mbarrier at offset %u: more than %u bytes have come that were not expected",
         barrier.offset, kMaxCount);
  settle(block, barrier, source);
}

}  // namespace sim
