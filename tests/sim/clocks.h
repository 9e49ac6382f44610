// What is known to have happened before what: vector clocks, one number for every thread of a
// cluster and for everything else there that reads or writes by itself (its slot).
//
// A thread knows, for each slot, up to which of its epochs all that it did comes before. It hands
// this on where it releases (an arrival) and takes it over where it acquires (a wait). Beside it
// stands how much of that has passed a fence between the proxies since.
//
// An arrival at another block's mbarrier hands on less: that reads before it are over, and copies
// that have landed. Whoever waits there (its clock's `reads`) may write over both, and reads
// nothing that was written before.
//
// Clusters know nothing of each other, but for what passes through flags and counters in global
// memory (memory.h).
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <utility>

namespace sim {

struct Thread;
struct Cluster;
struct Block;

// Slots that every cluster has, in front of its threads.
constexpr uint32_t kFrontSlot = 0;     // the kernels in front, see kernel_order.cpp
constexpr uint32_t kInFlightSlot = 1;  // copies of which no thread knows yet that they are done
constexpr uint32_t kFirstThreadSlot = 2;
constexpr uint32_t kMbarrierSlots = 96, kWarpgroupSlots = 8;  // of a block
constexpr uint32_t kInFlight = 0xffffffffu;                   // an epoch that nobody reaches

struct Clock;

class ClockRef {
 public:
  ClockRef() = default;
  explicit ClockRef(Clock* clock);
  ClockRef(const ClockRef& other);
  ClockRef(ClockRef&& other) noexcept : clock_(std::exchange(other.clock_, nullptr)) {}
  ClockRef& operator=(ClockRef other) noexcept {
    std::swap(clock_, other.clock_);
    return *this;
  }
  ~ClockRef();
  Clock* get() const { return clock_; }
  Clock* operator->() const { return clock_; }
  explicit operator bool() const { return clock_ != nullptr; }

 private:
  Clock* clock_ = nullptr;
};

using ClusterClocks = std::map<uint32_t, ClockRef>;  // by the cluster's number

struct Clock {
  uint32_t references = 0;
  std::shared_ptr<const ClusterClocks> others;  // what is known of other clusters, if anything
  ClockRef reads;                               // what is known of reads alone, if anything
  bool all_fenced = false;                      // `fenced` equals `known`
  Clock* fenced_form = nullptr;                 // the same after a fence, once it was needed
  uint32_t* known = nullptr;
  uint32_t* fenced = nullptr;
};

inline ClockRef::ClockRef(Clock* clock) : clock_(clock) { ++clock_->references; }
inline ClockRef::ClockRef(const ClockRef& other) : clock_(other.clock_) {
  if (clock_) ++clock_->references;
}

// What those know together who have arrived at a barrier so far.
struct Gathering {
  ClockRef sum, last;
  ClockRef reads;  // by those of whom reads alone are known
};

void begin_clocks(Cluster& cluster);
void end_clocks(Cluster& cluster);

uint32_t slots_of(const Cluster& cluster);
uint32_t slot_of(const Thread& thread);
uint32_t mbarrier_slot(const Block& block, uint32_t number);
uint32_t warpgroup_slot(const Block& block, uint32_t number);

// The thread arrives, with all that it knows.
void release(Thread& thread, Gathering& gathering);
// The same of its reads alone, and of those that it knows of.
void release_reads(Thread& thread, Gathering& gathering);
// Ends a round of arrivals: what came together in it.
ClockRef publish(Gathering& gathering);
// Takes from it what came by release_reads, before it is published.
ClockRef publish_reads(Gathering& gathering);
// The thread takes over what others knew. `arrived` where it is part of that itself.
void acquire(Thread& thread, const ClockRef& others, bool arrived);
void acquire_reads(Thread& thread, const ClockRef& reads);
// Up to which epoch of a slot of its own cluster all reads are known.
uint32_t reads_known(const Clock& clock, uint32_t slot);
// The same through a word of global memory: what was left there for others, by cluster.
void release(Thread& thread, ClusterClocks& word);
void acquire(Thread& thread, const ClusterClocks& word);
// Up to which epoch of a slot of another cluster all is known; 0 where nothing is.
uint32_t known_of(const Clock& clock, uint32_t cluster, uint32_t slot);
// The thread gets to know of one thing: an asynchronous operation is done.
void learn(Thread& thread, uint32_t slot, uint32_t epoch);
// All that the thread knows has passed a fence between the proxies.
void fence(Thread& thread);
// Lanes of a warp do something together.
void meet(Thread* const* lane, uint32_t mask);

}  // namespace sim
