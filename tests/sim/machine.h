// The machine that kernels run on here: a grid of clusters of blocks of threads, each thread a
// fiber, all in one OS thread. Which thread goes next, when an asynchronous copy or product lands,
// and in which order blocks run is drawn from a seed.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <queue>
#include <set>
#include <source_location>
#include <string>
#include <vector>

#include "clocks.h"
#include "cuda_types.h"
#include "fiber.h"

namespace sim {

// The place in the kernel where a wrapper was called: every wrapper takes it as a last, defaulted
// argument.
using Source = std::source_location;
#define SIM_SOURCE ::sim::Source source = ::sim::Source::current()

struct Failure {
  std::string text;
};

// Ends the launch with this message, in front of which stand the thread and the line of the kernel.
[[noreturn, gnu::format(printf, 2, 3)]] void fail(const Source& source, const char* format, ...);

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  // splitmix64: G. Steele, D. Lea, C. Flood, "Fast splittable pseudorandom number generators"
  // (2014).
  uint64_t next() { return mix(state_ += 0x9e3779b97f4a7c15u); }
  uint32_t below(uint32_t bound) { return static_cast<uint32_t>(((next() >> 32) * bound) >> 32); }
  static uint64_t mix(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }

 private:
  uint64_t state_;
};

struct Block;
struct Thread;
using Waiters = std::vector<Thread*>;

struct Wait {
  std::string (*describe)(const Thread& thread) = nullptr;
  const void* object = nullptr;
  uint64_t value = 0;
  Source source;
};

enum class State : uint8_t { runnable, blocked, exited };

// 4 to 16 bytes of cp.async.
struct SmallCopy {
  uint32_t shared_offset;
  const void* global;
  uint8_t bytes, bytes_read;
  Source source;
  uint32_t slot = 0, epoch = 0;  // of the mbarrier that it arrives at, if any
};

// Bulk stores of one thread between two commits.
struct BulkGroup {
  uint32_t unread = 0, unwritten = 0;
  struct Range {
    Block* block;
    uint32_t offset, bytes;
  };
  std::vector<Range> unknown;  // sources of which the thread does not know that they were read
  std::vector<std::pair<const void*, size_t>> unwritten_bytes;  // the same of what is written
  Source source;
  bool waiting = false;  // the thread waits for this group
};

// Four registers of a thread that a wgmma takes its A from, until the wait that covers it.
struct LentRegisters {
  uint64_t product;  // the thread's so many-th
  const uint32_t* place;
  uint32_t held[4];  // when it was issued
  Source source;
};

struct Thread {
  Fiber fiber;
  Block* block = nullptr;
  uint32_t index = 0;
  State state = State::runnable;
  Wait wait;

  std::vector<SmallCopy> open_copies;  // since the last commit
  std::deque<std::vector<SmallCopy>> copy_groups;
  uint64_t copy_groups_done = 0;
  // Of cp.async, those of which the thread does not know that they have landed: in groups as above.
  std::vector<SmallCopy> open_unknown;
  std::deque<std::vector<SmallCopy>> unknown_groups;
  uint32_t arriving_copies = 0;  // lots of copies that an arrival at an mbarrier waits for
  std::vector<std::shared_ptr<BulkGroup>> bulk_groups;
  std::shared_ptr<BulkGroup> open_bulk_group;

  uint64_t wgmma_issued = 0;
  Source wgmma_source;                 // of the last one
  std::vector<uint64_t> wgmma_groups;  // how many were issued at each commit
  std::deque<LentRegisters> wgmma_lent;
  bool wgmma_fenced = false;
  bool cluster_arrived = false;
  uint64_t cluster_generation = 0;
  Source cluster_source;  // of the last arrival

  ClockRef clock;
  uint32_t epoch = 0, own_fenced = 0;
  bool touched = false;               // since others last got to know of it
  const void* last_access = nullptr;  // the instruction of its last ordinary load or store
};

// Lanes of a warp that do one thing together.
struct Rendezvous {
  uint32_t mask = 0, arrived = 0;
  const char* what = nullptr;
  Source source;  // of the first to come
  void* argument[32];
  Thread* lane[32];
};

struct Warp {
  static constexpr int kAtOnce = 8;  // groups of lanes that may be under way side by side
  Rendezvous rendezvous[kAtOnce];
  uint32_t exited = 0;
  // setmaxnreg: what a thread has since (0: as at entry), how often, what the warp waits for.
  uint32_t registers = 0, register_calls = 0, registers_wanted = 0;
  Source register_source;
  uint64_t slow_until = 0;  // the epoch for which `slow` was drawn
  bool slow = false;
};

struct NamedBarrier {
  uint32_t expected = 0, arrived = 0;  // threads
  std::vector<bool> who;               // warps
  Waiters waiters;
  Gathering gathered;
};

struct MbarrierState {
  uint32_t offset = 0, count = 0, pending = 0;
  int64_t bytes = 0;  // expected and not yet come
  uint64_t phase = 0;
  bool alive = false, fenced = false;
  Waiters waiters;

  uint32_t slot = 0, epoch = 0;  // of the running phase
  Gathering gathered;
  struct Phase {
    ClockRef known, reads;
    uint32_t epoch = 0;
  };
  Phase ended[2];  // the last phases, by parity
};

// The registers of a block, as a kernel with setmaxnreg begins: ptxas gives each thread as many as
// the launch bounds allow, and what no thread of the block had then is never the block's.
struct RegisterPool {
  uint32_t at_entry = 0, all = 0, free = 0;
  Waiters waiters;
};

struct WgmmaQueue;  // tensor_core.cpp

struct Cluster;

struct Block {
  Block();
  ~Block();
  Cluster* cluster = nullptr;
  uint3 index{};
  uint32_t rank = 0;
  uint8_t* shared = nullptr;
  uint32_t shared_bytes = 0;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  NamedBarrier barriers[16];
  RegisterPool registers;
  std::vector<MbarrierState> mbarriers;
  std::vector<std::unique_ptr<WgmmaQueue>> warpgroups;
  uint32_t live = 0;
  int votes = 0;            // of __syncthreads_count
  uint32_t in_flight = 0;   // asynchronous operations that still touch this block's shared memory
  Source in_flight_source;  // of the one that began last

  // The async proxy's view of shared memory: see shared_memory.cpp.
  std::vector<uint8_t> async_view;
  std::vector<uint64_t> page_fences;
  uint64_t fences = 1;

  void* shadow = nullptr;  // see shadow.cpp
  uint32_t mbarrier_epochs[kMbarrierSlots] = {};
  // What others do to this block's shared memory, up to which epoch by each slot: some thread of
  // the block must know of it before the last one ends.
  struct Visit {
    uint32_t slot, epoch, place;  // see shadow.h
    bool writes;                  // else it is enough to know that it has been there
  };
  std::vector<Visit> visits;
  Gathering ended;
};

struct Cluster {
  uint32_t number = 0;  // over all launches: one that begins later has a larger one
  std::deque<Block> blocks;
  uint32_t live = 0;
  uint32_t arrived = 0;
  uint64_t generation = 0;
  Waiters waiters;
  uint32_t first_epoch = 0;
  Gathering gathered;
  ClockRef met[2];  // by generation
  std::shared_ptr<bool> alive =
      std::make_shared<bool>(true);  // for events that may come after its end
};

struct GridShape {
  dim3 blocks;
  uint32_t threads, shared_bytes, cluster_blocks;
  bool overlaps = false;         // may begin before the kernel in front has ended
  const void* kernel = nullptr;  // its function, of which reports tell the name
  const void* stream = nullptr;
  uint32_t bound = 0;  // of its __launch_bounds__, 0 where it has none
  Source source;       // of the launch
};

// Counters of a launch, for tests that count traffic.
struct Statistics {
  uint64_t switches = 0, rounds = 0;
  uint64_t bulk_bytes_read = 0, bulk_bytes_written = 0;  // global memory, by bulk copies and TMA
  uint64_t small_copy_bytes_read = 0;                    // global memory, by cp.async
  uint64_t products = 0;                                 // multiplications of mma and wgmma
  uint64_t prefetches = 0, prefetched_and_loaded = 0;    // boxes of tensors, by one block
};

struct Machine {
  GridShape shape;
  void (*run)(void* context);
  void* context;
  Random random{0};
  uint64_t seed = 0;
  std::set<std::array<int64_t, 7>> prefetched;  // boxes, not loaded since: tensor_copy.cpp
  uint32_t patience =
      0;  // how long asynchronous operations take in this launch: 0 short, 1 mixed, 2 long

  Fiber scheduler;
  Thread* current = nullptr;
  std::vector<std::unique_ptr<Cluster>> resident;
  uint32_t first_cluster = 0;      // of this launch, by its number
  std::vector<uint3> first_block;  // of each cluster that has begun, by its number
  std::vector<Thread*> runnable;
  uint64_t round = 0, progress = 0;
  std::string error;
  Statistics statistics;

  struct Event {
    uint64_t time, order;
    std::function<void()> happen;
    Source source;
    bool operator<(const Event& other) const {
      return time != other.time ? time > other.time : order > other.order;
    }
  };
  std::priority_queue<Event> events;
  uint64_t event_count = 0;
  Source delivered;         // of the event that happens now
  bool delivering = false;  // whether one does
};

extern Machine* machine;

[[gnu::no_sanitize("thread")]] inline Thread& self() { return *machine->current; }

// Runs a grid to its end. Null, or the error's text (valid until the next launch).
const char* run_grid(const GridShape& shape, void (*run)(void* context), void* context);
// What the host asked for in this line is refused: the error's text, valid as long.
const char* refuse(const Source& source, const std::string& why);

// Stops the current thread until someone wakes `waiters`.
void block_on(Waiters& waiters, const Wait& wait);
void wake(Waiters& waiters);
void wake(Thread& thread);

// Lets others go first: what a thread does that looks again and again.
void yield(std::string (*describe)(const Thread&), const Source& source);

// Lets something happen after a random while. Returns when.
uint64_t later(const Source& source, std::function<void()> happen, uint64_t not_before = 0);

// report.cpp

// "block (3, 0, 0) thread 129", "block (3, 0, 0)".
std::string name_of(const Thread& thread);
std::string name_of(const Block& block);
// Also of a block that has ended: by its cluster's number and its rank there.
std::string name_of_block(uint32_t cluster, uint32_t rank);
std::string place_of(const Source& source);
// Tells what every thread waits for, threads with the same words together.
std::string waiting_report(const Machine& machine);

// The GPU that is played, see device/properties.h.
extern int32_t compute_capability, multiprocessors;
// The one that callers give: a launch in another is refused.
extern const void* stream_of_calls;
// What tests set and ask for, see host_interface.cpp.
extern uint64_t next_seed;
extern Statistics last_statistics;
extern uint64_t prefetches[2];  // of the launches since they were asked for
extern std::string last_error;

// The parts of the machine do this when a block begins and ends, and refuse when a thread ends.
void begin_block(Block& block);
void end_block(Block& block);
void check_meetings(Thread& thread);
void check_unfinished_products(Thread& thread);
void check_unfinished_copies(Thread& thread);
void check_visits(Thread& thread);
// And when a thread stops for now.
void check_last_store(const Thread& thread);
void forget_last_store();

}  // namespace sim
