#include "clocks.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <memory>
#include <vector>

#include "machine.h"

namespace sim {

namespace {

// Clocks of one launch have one size. Those that are free wait here for the next use.
// Never destroyed: what it points to would look lost when the program ends.
std::vector<Clock*>& free_clocks = *new std::vector<Clock*>;
uint32_t clock_slots = 0;

// A new cluster's first epoch comes after every epoch before, so that what an earlier block left
// beside the same memory counts as long past.
uint32_t last_epoch = 0;

// The last few results: lanes of a warp ask for the same one after another.
struct Remembered {
  ClockRef from, other, result;
  uint32_t slot = 0, epoch = 0;
};
constexpr size_t kRemembered = 64;
Remembered remembered[kRemembered];

void free_storage(Clock* clock) {
  delete[] clock->known;
  delete clock;
}

Clock* take_clock() {
  if (!free_clocks.empty()) {
    Clock* clock = free_clocks.back();
    free_clocks.pop_back();
    return clock;
  }
  auto* clock = new Clock;
  clock->known = new uint32_t[2 * static_cast<size_t>(clock_slots)];
  clock->fenced = clock->known + clock_slots;
  return clock;
}

ClockRef copy_of(const Clock& from) {
  Clock* clock = take_clock();
  std::memcpy(clock->known, from.known, 2 * sizeof(uint32_t) * clock_slots);
  clock->all_fenced = from.all_fenced;
  clock->fenced_form = nullptr;
  clock->others = from.others;
  clock->reads = from.reads;
  return ClockRef(clock);
}

void drop(Clock* clock) {
  if (clock == nullptr || --clock->references > 0) return;
  drop(std::exchange(clock->fenced_form, nullptr));
  clock->others.reset();
  clock->reads = {};
  free_clocks.push_back(clock);
}

void join(Clock& into, const Clock& other);

// Of each cluster what either knows. A clock that is shared is not written to.
void join(ClusterClocks& into, const ClusterClocks& other) {
  for (const auto& [cluster, clock] : other) {
    ClockRef& mine = into[cluster];
    if (!mine) {
      mine = clock;
    } else if (mine.get() != clock.get()) {
      if (mine->references > 1) mine = copy_of(*mine.get());
      join(*mine.get(), *clock.get());
    }
  }
}

// A clock that is shared is not written to.
void join_reads(Clock& into, const ClockRef& reads) {
  if (!reads || reads.get() == into.reads.get()) return;
  into.all_fenced = into.all_fenced && reads->all_fenced;
  if (!into.reads) {
    into.reads = reads;
    return;
  }
  into.reads = copy_of(*into.reads.get());
  join(*into.reads.get(), *reads.get());
}

void join(Clock& into, const Clock& other) {
  for (uint32_t i = 0; i < 2 * clock_slots; ++i)
    into.known[i] = std::max(into.known[i], other.known[i]);
  into.all_fenced = into.all_fenced && other.all_fenced;
  join_reads(into, other.reads);
  if (!other.others || other.others == into.others) return;
  auto both = std::make_shared<ClusterClocks>(*other.others);
  if (into.others) join(*both, *into.others);
  into.others = std::move(both);
}

void enter(Clock& into, Thread& thread) {
  const uint32_t slot = slot_of(thread);
  into.known[slot] = std::max(into.known[slot], thread.epoch);
  into.fenced[slot] = std::max(into.fenced[slot], thread.own_fenced);
  into.all_fenced = false;
  ++thread.epoch;
  thread.touched = false;
}

Remembered& remembered_at(const Clock* from, uint64_t what) {
  const uint64_t key = reinterpret_cast<uintptr_t>(from) * 31 + what;
  return remembered[Random::mix(key) % kRemembered];
}

}  // namespace

ClockRef::~ClockRef() { drop(clock_); }

uint32_t slots_of(const Cluster& cluster) {
  const auto blocks = static_cast<uint32_t>(cluster.blocks.size());
  const auto threads = static_cast<uint32_t>(cluster.blocks[0].threads.size());
  return kFirstThreadSlot + blocks * (threads + kMbarrierSlots + kWarpgroupSlots);
}

uint32_t slot_of(const Thread& thread) {
  return kFirstThreadSlot +
         thread.block->rank * static_cast<uint32_t>(thread.block->threads.size()) + thread.index;
}

uint32_t mbarrier_slot(const Block& block, uint32_t number) {
  const auto threads = static_cast<uint32_t>(block.cluster->blocks.size() * block.threads.size());
  return kFirstThreadSlot + threads + block.rank * kMbarrierSlots + number % kMbarrierSlots;
}

uint32_t warpgroup_slot(const Block& block, uint32_t number) {
  const auto blocks = static_cast<uint32_t>(block.cluster->blocks.size());
  const auto threads = static_cast<uint32_t>(blocks * block.threads.size());
  return kFirstThreadSlot + threads + blocks * kMbarrierSlots + block.rank * kWarpgroupSlots +
         number % kWarpgroupSlots;
}

void begin_clocks(Cluster& cluster) {
  const uint32_t slots = slots_of(cluster);
  if (slots != clock_slots) {  // another shape of launch: none of the old ones is in use
    for (Remembered& one : remembered) one = {};
    for (Clock* clock : free_clocks) free_storage(clock);
    free_clocks.clear();
    clock_slots = slots;
  }
  cluster.first_epoch = last_epoch;
  Clock* first = take_clock();
  std::fill(first->known, first->known + 2 * slots, last_epoch);
  first->all_fenced = false;
  first->fenced_form = nullptr;
  first->reads = {};
  first->known[kInFlightSlot] = first->fenced[kInFlightSlot] = 0;
  if (!machine->shape.overlaps) ++first->known[kFrontSlot];
  const ClockRef shared(first);
  for (Block& block : cluster.blocks) {
    std::fill(std::begin(block.mbarrier_epochs), std::end(block.mbarrier_epochs), last_epoch);
    for (Thread& thread : block.threads) {
      thread.clock = shared;
      thread.epoch = last_epoch + 1;
      thread.own_fenced = last_epoch;
    }
  }
}

void end_clocks(Cluster& cluster) {
  for (Block& block : cluster.blocks) {
    for (Thread& thread : block.threads) {
      last_epoch = std::max({last_epoch, thread.epoch,
                             cluster.first_epoch + static_cast<uint32_t>(thread.wgmma_issued)});
      thread.clock = {};
    }
    for (const uint32_t epoch : block.mbarrier_epochs) last_epoch = std::max(last_epoch, epoch);
  }
  for (Remembered& one : remembered) one = {};
}

void release(Thread& thread, Gathering& gathering) {
  if (!gathering.sum)
    gathering.sum = copy_of(*thread.clock.get());
  else if (gathering.last.get() != thread.clock.get())
    join(*gathering.sum.get(), *thread.clock.get());
  gathering.last = thread.clock;
  enter(*gathering.sum.get(), thread);
}

void release_reads(Thread& thread, Gathering& gathering) {
  ClockRef known = copy_of(*thread.clock.get());
  known->others.reset();
  if (const ClockRef reads = std::exchange(known->reads, {})) join(*known.get(), *reads.get());
  if (gathering.reads) join(*known.get(), *gathering.reads.get());
  enter(*known.get(), thread);
  gathering.reads = std::move(known);
}

ClockRef publish_reads(Gathering& gathering) { return std::move(gathering.reads); }

ClockRef publish(Gathering& gathering) {
  gathering.last = {};
  return std::move(gathering.sum);
}

void acquire(Thread& thread, const ClockRef& others, bool arrived) {
  if (!others || others.get() == thread.clock.get()) return;
  if (arrived) {
    thread.clock = others;
    return;
  }
  Remembered& memory = remembered_at(thread.clock.get(), reinterpret_cast<uintptr_t>(others.get()));
  if (memory.from.get() != thread.clock.get() || memory.other.get() != others.get() ||
      memory.slot != 0) {
    ClockRef result = copy_of(*thread.clock.get());
    join(*result.get(), *others.get());
    memory = {thread.clock, others, std::move(result), 0, 0};
  }
  thread.clock = memory.result;
}

void acquire_reads(Thread& thread, const ClockRef& reads) {
  if (!reads || reads.get() == thread.clock->reads.get()) return;
  constexpr uint32_t kReads = ~0u;  // in place of a slot
  Remembered& memory = remembered_at(thread.clock.get(), reinterpret_cast<uintptr_t>(reads.get()));
  if (memory.from.get() != thread.clock.get() || memory.other.get() != reads.get() ||
      memory.slot != kReads) {
    ClockRef result = copy_of(*thread.clock.get());
    join_reads(*result.get(), reads);
    memory = {thread.clock, reads, std::move(result), kReads, 0};
  }
  thread.clock = memory.result;
}

uint32_t reads_known(const Clock& clock, uint32_t slot) {
  return clock.reads ? std::max(clock.known[slot], clock.reads->known[slot]) : clock.known[slot];
}

void release(Thread& thread, ClusterClocks& word) {
  if (thread.clock->others) join(word, *thread.clock->others);
  ClockRef& mine = word[thread.block->cluster->number];
  ClockRef now = copy_of(*thread.clock.get());
  if (mine) join(*now.get(), *mine.get());
  now->others.reset();
  enter(*now.get(), thread);
  mine = std::move(now);
}

void acquire(Thread& thread, const ClusterClocks& word) {
  if (word.empty()) return;
  const uint32_t own = thread.block->cluster->number;
  ClockRef result = copy_of(*thread.clock.get());
  if (const auto same = word.find(own); same != word.end())
    join(*result.get(), *same->second.get());
  auto others = std::make_shared<ClusterClocks>(word);
  others->erase(own);
  if (result->others) join(*others, *result->others);
  result->others = std::move(others);
  thread.clock = std::move(result);
}

uint32_t known_of(const Clock& clock, uint32_t cluster, uint32_t slot) {
  if (!clock.others) return 0;
  const auto found = clock.others->find(cluster);
  return found == clock.others->end() ? 0 : found->second->known[slot];
}

void learn(Thread& thread, uint32_t slot, uint32_t epoch) {
  if (thread.clock->known[slot] >= epoch) return;
  Remembered& memory = remembered_at(thread.clock.get(), uint64_t{slot} << 32 | epoch);
  if (memory.from.get() != thread.clock.get() || memory.other || memory.slot != slot ||
      memory.epoch != epoch) {
    ClockRef result = copy_of(*thread.clock.get());
    result->known[slot] = epoch;
    result->all_fenced = false;
    memory = {thread.clock, {}, std::move(result), slot, epoch};
  }
  thread.clock = memory.result;
}

void fence(Thread& thread) {
  thread.own_fenced = thread.epoch++;
  thread.touched = true;  // others do not know of the fence yet
  Clock& clock = *thread.clock.get();
  if (clock.all_fenced) return;
  if (!clock.fenced_form) {
    ClockRef form = copy_of(clock);
    std::memcpy(form->fenced, form->known, sizeof(uint32_t) * clock_slots);
    form->all_fenced = true;
    if (form->reads) {
      form->reads = copy_of(*form->reads.get());
      std::memcpy(form->reads->fenced, form->reads->known, sizeof(uint32_t) * clock_slots);
      form->reads->all_fenced = true;
    }
    clock.fenced_form = form.get();
    ++form->references;
  }
  thread.clock = ClockRef(clock.fenced_form);
}

void meet(Thread* const* lane, uint32_t mask) {
  Clock* common = lane[std::countr_zero(mask)]->clock.get();
  bool same = true, touched = false;
  for (uint32_t rest = mask; rest != 0; rest &= rest - 1) {
    const Thread& thread = *lane[std::countr_zero(rest)];
    same = same && thread.clock.get() == common;
    touched = touched || thread.touched;
  }
  if (same && !touched) return;
  ClockRef together;
  if (same && common->references == static_cast<uint32_t>(std::popcount(mask))) {
    drop(std::exchange(common->fenced_form, nullptr));
  } else {
    together = copy_of(*common);
    const Clock* joined = common;
    for (uint32_t rest = mask; rest != 0; rest &= rest - 1) {
      const Clock* own = lane[std::countr_zero(rest)]->clock.get();
      if (own != joined && own != common) join(*together.get(), *own);
      joined = own;
    }
  }
  Clock& result = together ? *together.get() : *common;
  for (uint32_t rest = mask; rest != 0; rest &= rest - 1)
    enter(result, *lane[std::countr_zero(rest)]);
  if (!together) return;
  for (uint32_t rest = mask; rest != 0; rest &= rest - 1)
    lane[std::countr_zero(rest)]->clock = together;
}

}  // namespace sim
