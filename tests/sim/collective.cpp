// The places where several threads meet: lanes of a warp, threads of a block, blocks of a cluster.
#include <algorithm>
#include <bit>
#include <cstdio>
#include <cstring>

#include "operations.h"

namespace sim {

namespace {

std::string describe_collective(const Thread& thread) {
  const auto& meeting = *static_cast<const Rendezvous*>(thread.wait.object);
  char text[160];
  std::snprintf(text, sizeof text,
                "waits in %s for lanes 0x%08x of the warp (of 0x%08x; 0x%08x have ended)",
                meeting.what, meeting.mask & ~meeting.arrived, meeting.mask,
                thread.block->warps[thread.index / 32].exited);
  return text;
}

std::string describe_barrier(const Thread& thread) {
  const auto& barrier = *static_cast<const NamedBarrier*>(thread.wait.object);
  char text[120];
  const bool whole_block = thread.wait.value == 0;
  std::snprintf(text, sizeof text, "waits at %s %u: %u of %u threads have come",
                whole_block ? "__syncthreads, barrier" : "named barrier",
                static_cast<unsigned>(thread.wait.value), barrier.arrived, barrier.expected);
  return text;
}

std::string describe_cluster(const Thread& thread) {
  const Cluster& cluster = *thread.block->cluster;
  char text[120];
  std::snprintf(text, sizeof text, "waits for the cluster: %u of %zu threads have come",
                cluster.arrived, cluster.blocks.size() * cluster.blocks[0].threads.size());
  return text;
}

// The calling lane comes to where the lanes of `mask` execute one instruction together; whoever
// makes `arrived` the whole mask is the last. A lane that is elsewhere would never come: lanes wait
// for each other at the same instruction only, which is the same line and column here.
Rendezvous& join(uint32_t mask, const char* what, void* argument, const Source& source) {
  Thread& thread = self();
  Warp& warp = thread.block->warps[thread.index / 32];
  const uint32_t lane = thread.index % 32, bit = 1u << lane;
  if (!(mask & bit)) fail(source, "%s: lane %u is not in its own mask 0x%08x", what, lane, mask);
  if (mask & warp.exited)
    fail(source, "%s: lanes 0x%08x of the mask have ended", what, mask & warp.exited);
  Rendezvous* meeting = nullptr;
  for (Rendezvous& open : warp.rendezvous) {
    if (open.arrived == 0) {
      if (!meeting) meeting = &open;
    } else if (open.mask == mask) {
      meeting = &open;
      break;
    }
  }
  if (meeting == nullptr) fail(source, "%s: too many groups of lanes at once", what);
  if (meeting->arrived == 0) {
    meeting->mask = mask;
    meeting->what = what;
    meeting->source = source;
  } else if (std::strcmp(meeting->what, what) != 0 || meeting->source.line() != source.line() ||
             meeting->source.column() != source.column() ||
             std::strcmp(meeting->source.file_name(), source.file_name()) != 0) {
    fail(source,
         "deadlock: lanes part: this one is in %s, lanes 0x%08x of the same mask in %s, at %s",
         what, meeting->arrived, meeting->what, place_of(meeting->source).c_str());
  }
  meeting->argument[lane] = argument;
  meeting->lane[lane] = &thread;
  meeting->arrived |= bit;
  ++machine->progress;
  return *meeting;
}

// Waits for the lanes that are missing, and for what the last of them does.
void wait_for_lanes(Rendezvous& meeting, const Source& source) {
  Thread& thread = self();
  thread.state = State::blocked;
  thread.wait = {describe_collective, &meeting, 0, source};
  switch_fiber(thread.fiber, machine->scheduler);
}

template <typename Visit>
void visit_other_lanes(const Rendezvous& meeting, Visit visit) {
  for (uint32_t rest = meeting.mask & ~(1u << self().index % 32); rest != 0; rest &= rest - 1)
    visit(std::countr_zero(rest));
}

struct BarrierCall {
  uint32_t number, threads;
};

// bar.sync and bar.arrive are of whole warps: the last lane of one counts for all.
void come_to_barrier(uint32_t number, uint32_t threads, bool waits, const char* what,
                     const Source& source) {
  Thread& thread = self();
  Block& block = *thread.block;
  if (number > 15) fail(source, "%s: there is no barrier %u", what, number);
  if (threads == 0 || threads % 32 != 0 || threads > block.threads.size())
    fail(source, "%s %u: %u threads; must be a multiple of 32, at most the block's %zu", what,
         number, threads, block.threads.size());
  BarrierCall mine{number, threads};
  Rendezvous& meeting = join(0xffffffffu, what, &mine, source);
  if (meeting.arrived != meeting.mask) return wait_for_lanes(meeting, source);
  meeting.arrived = 0;
  meet(meeting.lane, meeting.mask);
  visit_other_lanes(meeting, [&](int lane) {
    const auto& other = *static_cast<const BarrierCall*>(meeting.argument[lane]);
    if (other.number != number || other.threads != threads)
      fail(source, "%s %u of %u threads: lane %d of the warp calls barrier %u of %u", what, number,
           threads, lane, other.number, other.threads);
  });

  NamedBarrier& barrier = block.barriers[number];
  if (barrier.arrived == 0) {
    barrier.expected = threads;
    barrier.who.assign(block.warps.size(), false);
  }
  if (barrier.expected != threads)
    fail(source, "%s %u: expects %u threads, but others of this round expect %u", what, number,
         threads, barrier.expected);
  if (barrier.who[thread.index / 32])
    fail(source, "%s %u: this warp has already come in this round", what, number);
  barrier.who[thread.index / 32] = true;
  barrier.arrived += 32;
  release(thread, barrier.gathered);  // the warp's lanes know the same by now
  // Only __syncthreads counts all threads; a named barrier among those that are left is in order.
  uint32_t may_come = barrier.arrived;
  for (uint32_t warp = 0; warp < block.warps.size(); ++warp)
    if (!barrier.who[warp] && block.warps[warp].exited == 0) may_come += 32;
  if (threads > may_come)
    fail(source, "%s %u: %u threads are expected, but only %u of the block have not ended", what,
         number, threads, may_come);
  const bool complete = barrier.arrived == barrier.expected;
  if (complete) {
    barrier.arrived = 0;
    const ClockRef all = publish(barrier.gathered);
    for (Thread* waiter : barrier.waiters) acquire(*waiter, all, true);
    if (waits)
      for (Thread* lane : meeting.lane) acquire(*lane, all, true);
    wake(barrier.waiters);
  }
  const Wait wait{describe_barrier, &barrier, number, source};
  visit_other_lanes(meeting, [&](int lane) {
    if (complete || !waits) return wake(*meeting.lane[lane]);
    meeting.lane[lane]->wait = wait;
    barrier.waiters.push_back(meeting.lane[lane]);
  });
  if (!complete && waits) block_on(barrier.waiters, wait);
}

struct RegisterCall {
  uint32_t count;
  bool increase;
  const Source& source;
};

std::string describe_registers(const Thread& thread) {
  const Block& block = *thread.block;
  char text[200];
  std::snprintf(text, sizeof text,
                "waits in setmaxnreg for %u registers of its warp; of the block's %u, %u are free",
                static_cast<unsigned>(thread.wait.value), block.registers.all,
                block.registers.free);
  return text;
}

// The last lane of a warp calls this.
void count_registers(void* const*, uint32_t, void* context) {
  const auto& [count, increase, source] = *static_cast<const RegisterCall*>(context);
  const char* what = increase ? "setmaxnreg.inc" : "setmaxnreg.dec";
  Block& block = *self().block;
  const uint32_t index = self().index / 32, first = index / 4 * 4;
  Warp& warp = block.warps[index];
  if (first + 4 > block.warps.size()) fail(source, "%s: this warp is in no whole warpgroup", what);
  ++warp.register_calls;
  for (uint32_t other = first; other < first + 4; ++other) {
    const Warp& peer = block.warps[other];
    if (peer.exited && peer.register_calls < warp.register_calls)
      fail(source, "%s: warp %u of the warpgroup has ended", what, other);
    if (other != index && peer.register_calls >= warp.register_calls && peer.registers != count)
      fail(source, "%s: %u registers, but warp %u of the warpgroup asks for %u", what, count, other,
           peer.registers);
  }
  const uint32_t before = warp.registers ? warp.registers : block.registers.at_entry;
  if (increase ? count < before : count > before)
    fail(source, "%s: from %u registers to %u", what, before, count);
  warp.registers = count;
  warp.register_source = source;
  if (increase) {
    warp.registers_wanted = 32 * (count - before);
  } else {
    block.registers.free += 32 * (before - count);
    wake(block.registers.waiters);
  }
}

}  // namespace

void warp_collective(uint32_t mask, const char* what, void* argument,
                     void (*evaluate)(void* const* argument, uint32_t mask, void* context),
                     void* context, const Source& source) {
  Rendezvous& meeting = join(mask, what, argument, source);
  if (meeting.arrived != mask) return wait_for_lanes(meeting, source);
  meeting.arrived = 0;
  meet(meeting.lane, mask);
  evaluate(meeting.argument, mask, context);
  visit_other_lanes(meeting, [&](int lane) { wake(*meeting.lane[lane]); });
}

void warp_together(const char* what, const Source& source) {
  warp_collective(
      0xffffffffu, what, nullptr, [](void* const*, uint32_t, void*) {}, nullptr, source);
}

void barrier_sync(uint32_t number, uint32_t threads, const Source& source) {
  come_to_barrier(number, threads, true,
                  number == 0 ? "__syncthreads, barrier" : "named_barrier_sync", source);
}

void barrier_arrive(uint32_t number, uint32_t threads, const Source& source) {
  come_to_barrier(number, threads, false, "named_barrier_arrive", source);
}

void set_registers(uint32_t count, bool increase, const Source& source) {
  RegisterCall call{count, increase, source};
  const char* what = increase ? "setmaxnreg.inc" : "setmaxnreg.dec";
  warp_collective(0xffffffffu, what, nullptr, count_registers, &call, source);
  RegisterPool& pool = self().block->registers;
  uint32_t& wanted = self().block->warps[self().index / 32].registers_wanted;
  while (wanted > pool.free) block_on(pool.waiters, {describe_registers, nullptr, wanted, source});
  pool.free -= wanted;  // the first lane for all
  wanted = 0;
}

void cluster_arrive(const Source& source) {
  warp_together("cluster_arrive", source);
  Thread& thread = self();
  Cluster& cluster = *thread.block->cluster;
  const uint32_t all = static_cast<uint32_t>(cluster.blocks.size() * thread.block->threads.size());
  if (thread.cluster_arrived) fail(source, "cluster_arrive twice without cluster_wait");
  if (cluster.live < all)
    fail(source, "cluster_arrive: %u threads of the cluster have ended", all - cluster.live);
  thread.cluster_arrived = true;
  thread.cluster_source = source;
  thread.cluster_generation = cluster.generation;
  release(thread, cluster.gathered);
  ++machine->progress;
  if (++cluster.arrived < all) return;
  cluster.arrived = 0;
  cluster.met[cluster.generation % 2] = publish(cluster.gathered);
  ++cluster.generation;
  wake(cluster.waiters);
}

void cluster_wait(const Source& source) {
  warp_together("cluster_wait", source);
  Thread& thread = self();
  Cluster& cluster = *thread.block->cluster;
  if (!thread.cluster_arrived) fail(source, "cluster_wait without cluster_arrive");
  // The cluster cannot complete twice between this thread's arrival and its wait.
  if (cluster.generation == thread.cluster_generation)
    block_on(cluster.waiters, {describe_cluster, nullptr, 0, source});
  thread.cluster_arrived = false;
  acquire(thread, cluster.met[thread.cluster_generation % 2], false);
}

void check_meetings(Thread& thread) {
  Block& block = *thread.block;
  Warp& warp = block.warps[thread.index / 32];
  const std::string who = name_of(thread) + " ends ";
  if (const NamedBarrier& barrier = block.barriers[0]; !barrier.waiters.empty())
    throw Failure{who + "while others wait at __syncthreads (" +
                  place_of(barrier.waiters[0]->wait.source) + ")"};
  for (const Rendezvous& meeting : warp.rendezvous)
    if (meeting.arrived != 0 && meeting.mask >> thread.index % 32 & 1)
      throw Failure{who + "while other lanes of its warp wait for it in " + meeting.what + ", at " +
                    place_of(meeting.source)};
  for (uint32_t other = thread.index / 128 * 4;
       other < thread.index / 128 * 4 + 4 && other < block.warps.size(); ++other)
    if (block.warps[other].register_calls > warp.register_calls)
      throw Failure{who + "without the setmaxnreg that warp " + std::to_string(other) +
                    " of its warpgroup has executed (" +
                    place_of(block.warps[other].register_source) + ")"};
  if (thread.cluster_arrived)
    throw Failure{who + "between cluster_arrive (" + place_of(thread.cluster_source) +
                  ") and cluster_wait"};
  if (block.live == 1 && block.in_flight > 0)
    throw Failure{who +
                  "as the last of its block, while copies to or from the block's shared memory " +
                  "are under way (" + place_of(block.in_flight_source) + ")"};
  warp.exited |= 1u << thread.index % 32;
}

uint32_t rank_in_cluster() { return self().block->rank; }
uint32_t blocks_of_cluster() { return machine->shape.cluster_blocks; }

uint32_t elected_lane() {
  // Some lane, the same one throughout a launch.
  const Thread& thread = self();
  return static_cast<uint32_t>(Random::mix(machine->seed * 31 + thread.index / 32) % 32);
}

}  // namespace sim
