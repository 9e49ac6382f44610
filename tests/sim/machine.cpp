#include "machine.h"

#include <setjmp.h>
#include <signal.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>

#include "device/registers.h"
#include "kernel_order.h"
#include "shadow.h"

namespace sim {

int32_t compute_capability = 90, multiprocessors = 3;

Machine* machine = nullptr;

namespace {

StackPool stacks;
std::mutex one_launch_at_a_time;
std::string last_error;
Statistics last_statistics;
uint64_t prefetches[2];  // of the launches since they were asked for
uint64_t next_seed = 1;
uint32_t clusters_begun = 0;

// Clusters that run side by side when a grid has several: more of them mix more, and take more
// memory.
constexpr uint32_t kResidentClusters = 2;
// Rounds in which every thread only looked for something that did not come, after which nothing
// will.
constexpr uint64_t kIdleRounds = 20000;

bool delivering = false;  // an asynchronous operation happens

#if !defined(__SANITIZE_ADDRESS__)
// A touch of memory that is not there, by a fiber, ends the launch like any other error.
sigjmp_buf out_of_range;
const void* fault_instruction = nullptr;
void on_segment_fault(int, siginfo_t* information, void* context) {
  // Which stops for good where the machine itself is wrong.
  if (machine == nullptr || (machine->current == nullptr && !delivering)) {
    signal(SIGSEGV, SIG_DFL);
    return;
  }
  const auto* address = static_cast<const uint8_t*>(information->si_addr);
  char text[200];
  std::snprintf(text, sizeof text, "touched address %p, where there is nothing",
                static_cast<const void*>(address));
  if (machine->current != nullptr) {
    const Thread& thread = self();
    const long offset = address - thread.block->shared;
    if (address >= thread.fiber.stack.bottom - 4096 && address < thread.fiber.stack.bottom)
      std::snprintf(text, sizeof text, "its stack is full");
    else if (offset >= -4096 && offset < static_cast<long>(thread.block->shared_bytes) + 8192)
      std::snprintf(text, sizeof text,
                    "touched shared memory at offset %ld; the block has %u bytes", offset,
                    thread.block->shared_bytes);
  }
  machine->error = text;
  fault_instruction =
      reinterpret_cast<void*>(static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP]);
  siglongjmp(out_of_range, 1);
}

// Where the thread is that touched what is not there: a line of the kernel, or, where it is in the
// test bed, the line of the kernel's last load or store.
std::string place_of_fault() {
  if (machine->current == nullptr) return "a copy, " + place_of(machine->delivered);
  const Thread& thread = self();
  const std::string place = place_text(
      place_number(static_cast<const void*>(static_cast<const uint8_t*>(fault_instruction) + 1)));
  const bool in_kernel = place.find(".cu:") != std::string::npos || thread.last_access == nullptr;
  return name_of(thread) + ", " +
         (in_kernel ? place : place_text(place_number(thread.last_access)));
}

class SegmentFaultHandler {
 public:
  SegmentFaultHandler() {
    stack_t alternate{};
    alternate.ss_sp = memory_;
    alternate.ss_size = sizeof memory_;
    sigaltstack(&alternate, &old_stack_);
    struct sigaction action{};
    action.sa_sigaction = on_segment_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, &old_action_);
  }
  ~SegmentFaultHandler() {
    sigaction(SIGSEGV, &old_action_, nullptr);
    sigaltstack(&old_stack_, nullptr);
  }

 private:
  static inline uint8_t memory_[64 * 1024];
  stack_t old_stack_;
  struct sigaction old_action_;
};
#endif

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
    delivering = true;
    happen();
    delivering = false;
  }
}

void run_all() {
  const GridShape& shape = machine->shape;
  const uint32_t clusters = shape.blocks.x * shape.blocks.y * shape.blocks.z / shape.cluster_blocks;
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

}  // namespace

const char* run_grid(const GridShape& shape, void (*run)(void* context), void* context) {
  const std::lock_guard<std::mutex> lock(one_launch_at_a_time);
  last_error.clear();
  if (shape.threads == 0 || shape.threads % 32 != 0 || shape.threads > 1024)
    return "launch: threads must be a multiple of 32 up to 1,024";
  if (shape.shared_bytes > most_shared_bytes())
    return "launch: more shared memory than a block of this GPU may have";
  if (shape.cluster_blocks < 1 || shape.cluster_blocks > 8 ||
      shape.blocks.x % shape.cluster_blocks != 0)
    return "launch: a cluster has 1 to 8 blocks and divides the grid along x";
  if (shape.blocks.x == 0 || shape.blocks.y == 0 || shape.blocks.z == 0)
    return "launch: the grid is empty";

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
#if !defined(__SANITIZE_ADDRESS__)
  const SegmentFaultHandler handler;
  if (sigsetjmp(out_of_range, 1) != 0)
    here.error = place_of_fault() + ": " + here.error;
  else
#endif
  {
    try {
      run_all();
    } catch (const Failure& failure) {  // of an event: no thread is to blame
      here.error = failure.text;
    }
  }
  delivering = false;
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

void fail(const Source& source, const char* format, ...) {
  char text[600];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  std::string who = machine->current ? name_of(self()) + ", " : "";
  throw Failure{who + place_of(source) + ": " + text};
}

std::string name_of(const Thread& thread) {
  return name_of(*thread.block) + " thread " + std::to_string(thread.index);
}

namespace {
std::string block_text(const uint3& index) {
  char text[60];
  std::snprintf(text, sizeof text, "block (%u, %u, %u)", index.x, index.y, index.z);
  return text;
}
}  // namespace

std::string name_of(const Block& block) { return block_text(block.index); }

std::string name_of_block(uint32_t cluster, uint32_t rank) {
  uint3 index = machine->first_block[cluster - machine->first_cluster];
  index.x += rank;  // a cluster lies along x
  return block_text(index);
}

std::string place_of(const Source& source) {
  std::string file = source.file_name();
  file.erase(0, file.find_last_of('/') + 1);
  return file + ":" + std::to_string(source.line());
}

std::string waiting_report(const Machine& machine) {
  // Sorted by block, then by message.
  std::string report;
  for (const auto& cluster : machine.resident) {
    for (const Block& block : cluster->blocks) {
      std::map<std::string, std::vector<uint32_t>> groups;
      for (const Thread& thread : block.threads) {
        std::string words = "has ended";
        if (thread.state != State::exited) {
          words = thread.wait.describe ? thread.wait.describe(thread) : "has not begun";
          if (thread.wait.describe) words += ", at " + place_of(thread.wait.source);
        }
        groups[words].push_back(thread.index);
      }
      report += name_of(block) + ":\n";
      for (const auto& [words, threads] : groups) {
        report += "  thread";
        for (size_t i = 0; i < threads.size();) {
          size_t last = i;
          while (last + 1 < threads.size() && threads[last + 1] == threads[last] + 1) ++last;
          report += (i ? "," : threads.size() > 1 ? "s " : " ") + std::to_string(threads[i]);
          if (last > i) report += "-" + std::to_string(threads[last]);
          i = last + 1;
        }
        report += ": " + words + "\n";
      }
    }
  }
  return report;
}

}  // namespace sim

// The interface for tests, beside that of the kernels under test.
extern "C" {
[[gnu::visibility("default")]] void sim_set_gpu(int32_t compute_capability,
                                                int32_t multiprocessors) {
  sim::forget_kernel_in_front();
  sim::compute_capability = compute_capability;
  sim::multiprocessors = multiprocessors;
}
[[gnu::visibility("default")]] void sim_set_checks(int on) { sim::checking = on != 0; }
[[gnu::visibility("default")]] void sim_set_seed(uint64_t seed) {
  sim::next_seed = seed;
  sim::forget_kernel_in_front();
}
// A launch takes one seed: the difference of two calls is how many there were between them.
[[gnu::visibility("default")]] uint64_t sim_next_seed() { return sim::next_seed; }
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
