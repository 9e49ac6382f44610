#include "machine.h"

#include <algorithm>
#include <mutex>

#include "device/registers.h"
#include "kernel_order.h"
#include "segment_fault.h"
#include "shadow.h"

namespace sim {

int32_t compute_capability = 90, multiprocessors = 3;
const void* stream_of_calls = nullptr;

Machine* machine = nullptr;
Statistics last_statistics;
uint64_t prefetches[2];
uint64_t next_seed = 1;
std::string last_error;

namespace {

StackPool stacks;
std::mutex one_launch_at_a_time;
uint32_t clusters_begun = 0;

// Clusters that run side by side when a grid has several: more of them mix more, and take more
// memory.
constexpr uint32_t kResidentClusters = 2;
// Rounds in which every thread only looked for something that did not come, after which nothing
// will.
constexpr uint64_t kIdleRounds = 20000;

void run_thread() {
  entered(machine->scheduler);
  Thread& thread = self();
  try {
    machine->run(machine->context);
    check_unfinished_products(thread);
    check_unfinished_copies(thread);
    check_visits(thread);
    check_meetings(thread);
  } catch (const Failure& failure) {
    machine->error = failure.text;
  }
  thread.state = State::exited;
  switch_fiber(thread.fiber, machine->scheduler, true);
}

void begin_cluster(uint32_t number) {
  const GridShape& shape = machine->shape;
  auto cluster = std::make_unique<Cluster>();
  cluster->number = ++clusters_begun;
  for (uint32_t rank = 0; rank < shape.cluster_blocks; ++rank) {
    const uint32_t linear = number * shape.cluster_blocks + rank;
    Block& block = cluster->blocks.emplace_back();
    block.cluster = cluster.get();
    block.rank = rank;
    block.index = {linear % shape.blocks.x, linear / shape.blocks.x % shape.blocks.y,
                   linear / shape.blocks.x / shape.blocks.y};
    block.shared_bytes = shape.shared_bytes;
    block.live = shape.threads;
    block.threads.resize(shape.threads);
    block.warps.resize(shape.threads / 32);
    block.registers.at_entry =
        static_cast<uint32_t>(dgemma::device::registers_at_entry(static_cast<int>(shape.threads)));
    block.registers.all = shape.threads * block.registers.at_entry;
    begin_block(block);
    for (uint32_t i = 0; i < shape.threads; ++i) {
      Thread& thread = block.threads[i];
      thread.block = &block;
      thread.index = i;
      thread.fiber.stack = stacks.take();
      prepare(thread.fiber, run_thread);
      machine->runnable.push_back(&thread);
    }
  }
  machine->first_block.push_back(cluster->blocks[0].index);
  begin_clocks(*cluster);
  cluster->live = shape.threads * shape.cluster_blocks;
  machine->resident.push_back(std::move(cluster));
}

void end_cluster(Cluster& cluster) {
  *cluster.alive = false;
  end_clocks(cluster);
  for (Block& block : cluster.blocks) {
    end_block(block);
    for (Thread& thread : block.threads) stacks.give_back(thread.fiber.stack);
  }
}

// Some warps are slow for a while: a bug that needs one warp to be far behind seldom shows among
// equals.
bool held_back(const Thread& thread) {
  const uint64_t epoch = machine->round / 64 + 1;
  Warp& warp = thread.block->warps[thread.index / 32];
  if (warp.slow_until != epoch) {
    warp.slow_until = epoch;
    warp.slow = machine->random.below(4) == 0;
  }
  return warp.slow && machine->random.below(8) != 0;
}

void run_round(std::vector<Thread*>& order) {
  order.clear();
  order.swap(machine->runnable);
  for (size_t i = order.size(); i > 1; --i)
    std::swap(order[i - 1], order[machine->random.below(static_cast<uint32_t>(i))]);
  for (Thread* thread : order) {
    if (held_back(*thread)) {
      machine->runnable.push_back(thread);
      continue;
    }
    machine->current = thread;
    ++machine->statistics.switches;
    switch_fiber(machine->scheduler, thread->fiber);
    check_last_store(*thread);
    machine->current = nullptr;
    if (!machine->error.empty()) return;
    if (thread->state == State::exited) {
      ++machine->progress;
      --thread->block->live;
      --thread->block->cluster->live;
    } else if (thread->state == State::runnable) {
      machine->runnable.push_back(thread);
    }
  }
  ++machine->round;
}

void deliver_events(uint64_t until) {
  while (!machine->events.empty() && machine->events.top().time <= until) {
    const auto happen = std::move(const_cast<Machine::Event&>(machine->events.top()).happen);
    machine->delivered = machine->events.top().source;
    machine->events.pop();
    ++machine->progress;
    machine->delivering = true;
    happen();
    machine->delivering = false;
  }
}

void run_all() {
  const GridShape& shape = machine->shape;
  const uint64_t blocks = uint64_t{shape.blocks.x} * shape.blocks.y * shape.blocks.z;
  const auto clusters = static_cast<uint32_t>(blocks / shape.cluster_blocks);
  std::vector<uint32_t> order(clusters);  // the hardware promises none
  for (uint32_t i = 0; i < clusters; ++i) order[i] = i;
  for (uint32_t i = clusters; i > 1; --i) std::swap(order[i - 1], order[machine->random.below(i)]);

  std::vector<Thread*> scratch;
  uint32_t begun = 0;
  uint64_t progress = 0, progress_round = 0;
  for (;;) {
    for (auto cluster = machine->resident.begin(); cluster != machine->resident.end();) {
      if ((*cluster)->live == 0) {
        end_cluster(**cluster);
        cluster = machine->resident.erase(cluster);
      } else {
        ++cluster;
      }
    }
    while (begun < clusters && machine->resident.size() < kResidentClusters)
      begin_cluster(order[begun++]);
    if (machine->resident.empty()) break;

    deliver_events(machine->round);
    if (machine->runnable.empty()) {
      if (machine->events.empty()) {
        machine->error = "deadlock: no thread can go on\n" + waiting_report(*machine);
        return;
      }
      machine->round = std::max(machine->round, machine->events.top().time);
      continue;
    }
    run_round(scratch);
    if (!machine->error.empty()) return;
    if (machine->progress != progress || !machine->events.empty()) {
      progress = machine->progress;
      progress_round = machine->round;
    } else if (machine->round - progress_round > kIdleRounds) {
      machine->error = "deadlock: threads look again and again for what does not come\n" +
                       waiting_report(*machine);
      return;
    }
  }
  deliver_events(UINT64_MAX);  // bulk stores that nobody waited for still arrive
}

// Limits of a block (CUDA C++ Programming Guide, "Compute Capabilities").
uint32_t most_shared_bytes() {
  const bool small =
      compute_capability == 86 || compute_capability == 89 || compute_capability >= 120;
  return (small ? 99u : compute_capability < 90 ? 163u : 227u) * 1024;
}

// Null, or why no GPU starts such a grid.
const char* what_is_wrong(const GridShape& shape) {
  if (shape.threads == 0 || shape.threads % 32 != 0 || shape.threads > 1024)
    return "threads must be a multiple of 32 up to 1,024";
  if (shape.shared_bytes > most_shared_bytes())
    return "more shared memory than a block of this GPU may have";
  if (shape.cluster_blocks < 1 || shape.cluster_blocks > 8 ||
      shape.blocks.x % shape.cluster_blocks != 0)
    return "a cluster has 1 to 8 blocks and divides the grid along x";
  if (shape.blocks.x == 0 || shape.blocks.y == 0 || shape.blocks.z == 0) return "the grid is empty";
  if (shape.blocks.x > INT32_MAX || shape.blocks.y > 65535 || shape.blocks.z > 65535)
    return "a grid has at most 2^31 - 1 blocks along x, 65,535 along y and z";
  if (shape.bound != 0 && shape.threads > shape.bound)
    return "more threads than the kernel's launch bounds allow";
  if (shape.stream != stream_of_calls) return "in another stream than the caller's";
  return nullptr;
}

// The whole launch; what goes wrong is told by machine->error.
void run_to_the_end() {
  try {
    run_all();
  } catch (const Failure& failure) {  // of an event: no thread is to blame
    machine->error = failure.text;
  }
}

}  // namespace

const char* refuse(const Source& source, const std::string& why) {
  last_error = place_of(source) + ": " + why;
  return last_error.c_str();
}

const char* run_grid(const GridShape& shape, void (*run)(void* context), void* context) {
  const std::lock_guard<std::mutex> lock(one_launch_at_a_time);
  last_error.clear();
  if (const char* why = what_is_wrong(shape)) {
    refuse(shape.source, std::string("launch: ") + why);
    last_error = name_of_kernel(shape.kernel) + ", " + last_error;
    return last_error.c_str();
  }

  Machine here;
  here.shape = shape;
  here.run = run;
  here.context = context;
  here.first_cluster = clusters_begun + 1;
  here.seed = next_seed;
  here.random = Random(next_seed++);
  here.patience = here.random.below(3);
  machine = &here;
  begin_kernel();
  run_guarded(run_to_the_end);
  here.delivering = false;
  here.current = nullptr;
  for (const auto& cluster : here.resident) end_cluster(*cluster);  // after an error
  here.statistics.rounds = here.round;
  last_statistics = here.statistics;
  prefetches[0] += here.statistics.prefetches;
  prefetches[1] += here.statistics.prefetched_and_loaded;
  if (!here.error.empty()) last_error = name_of_kernel(shape.kernel) + ", " + here.error;
  end_kernel();
  if (!last_error.empty()) forget_shadows();
  forget_last_store();
  machine = nullptr;
  return last_error.empty() ? nullptr : last_error.c_str();
}

void block_on(Waiters& waiters, const Wait& wait) {
  Thread& thread = self();
  thread.state = State::blocked;
  thread.wait = wait;
  waiters.push_back(&thread);
  switch_fiber(thread.fiber, machine->scheduler);
}

void wake(Thread& thread) {
  thread.state = State::runnable;
  machine->runnable.push_back(&thread);
  ++machine->progress;
}

void wake(Waiters& waiters) {
  for (Thread* thread : waiters) wake(*thread);
  waiters.clear();
}

void yield(std::string (*describe)(const Thread&), const Source& source) {
  Thread& thread = self();
  thread.wait = {describe, nullptr, 0, source};
  switch_fiber(thread.fiber, machine->scheduler);
}

uint64_t later(const Source& source, std::function<void()> happen, uint64_t not_before) {
  // Rounds, in which every thread that can takes one step. In half of the cases long enough that
  // only a thread which waits sees the result.
  static constexpr uint32_t kShort = 4, kLong = 2000;
  Random& random = machine->random;
  const bool slow = machine->patience == 2 || (machine->patience == 1 && random.below(2) == 0);
  const uint64_t time =
      std::max(not_before, machine->round + 1 + random.below(slow ? kLong : kShort));
  machine->events.push({time, machine->event_count++, std::move(happen), source});
  return time;
}

}  // namespace sim
