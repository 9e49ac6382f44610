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

void arrive(uint32_t number, uint32_t threads, const char* what, const Source& source) {
  Thread& thread = self();
  Block& block = *thread.block;
  if (number > 15) fail(source, "%s: there is no barrier %u", what, number);
  if (threads == 0 || threads % 32 != 0 || threads > block.threads.size())
    fail(source, "%s %u: %u threads; must be a multiple of 32, at most the block's %zu", what,
         number, threads, block.threads.size());
  // Only __syncthreads counts all threads; a named barrier among those that are left is in order.
  if (threads > block.live)
    fail(source, "%s %u: %u threads are expected, but only %u of the block have not ended", what,
         number, threads, block.live);
  NamedBarrier& barrier = block.barriers[number];
  if (barrier.arrived == 0) {
    barrier.expected = threads;
    barrier.who.assign(block.threads.size(), false);
  }
  if (barrier.expected != threads)
    fail(source, "%s %u: expects %u threads, but others of this round expect %u", what, number,
         threads, barrier.expected);
  if (barrier.who[thread.index])
    fail(source, "%s %u: this thread has already come in this round", what, number);
  barrier.who[thread.index] = true;
  ++barrier.arrived;
  ++machine->progress;
}

bool complete(NamedBarrier& barrier) {
  if (barrier.arrived < barrier.expected) return false;
  barrier.arrived = 0;
  wake(barrier.waiters);
  return true;
}

}  // namespace

void warp_collective(uint32_t mask, const char* what, void* argument,
                     void (*evaluate)(void* const* argument, uint32_t mask, void* context),
                     void* context, const Source& source) {
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
  } else if (std::strcmp(meeting->what, what) != 0) {
    fail(source, "lanes part: this one is in %s, lanes 0x%08x of the same mask in %s", what,
         meeting->arrived, meeting->what);
  }
  meeting->argument[lane] = argument;
  meeting->lane[lane] = &thread;
  meeting->arrived |= bit;
  ++machine->progress;
  if (meeting->arrived != mask) {
    thread.state = State::blocked;
    thread.wait = {describe_collective, meeting, 0, source};
    switch_fiber(thread.fiber, machine->scheduler);
    return;
  }
  meeting->arrived = 0;
  evaluate(meeting->argument, mask, context);
  for (uint32_t rest = mask & ~bit; rest != 0; rest &= rest - 1)
    wake(*meeting->lane[std::countr_zero(rest)]);
}

void barrier_sync(uint32_t number, uint32_t threads, const Source& source) {
  const char* what = number == 0 ? "__syncthreads, barrier" : "named_barrier_sync";
  arrive(number, threads, what, source);
  NamedBarrier& barrier = self().block->barriers[number];
  if (!complete(barrier)) block_on(barrier.waiters, {describe_barrier, &barrier, number, source});
}

void barrier_arrive(uint32_t number, uint32_t threads, const Source& source) {
  arrive(number, threads, "named_barrier_arrive", source);
  complete(self().block->barriers[number]);
}

void cluster_arrive(const Source& source) {
  Thread& thread = self();
  Cluster& cluster = *thread.block->cluster;
  const uint32_t all = static_cast<uint32_t>(cluster.blocks.size() * thread.block->threads.size());
  if (thread.cluster_arrived) fail(source, "cluster_arrive twice without cluster_wait");
  if (cluster.live < all)
    fail(source, "cluster_arrive: %u threads of the cluster have ended", all - cluster.live);
  thread.cluster_arrived = true;
  thread.cluster_generation = cluster.generation;
  ++machine->progress;
  if (++cluster.arrived < all) return;
  cluster.arrived = 0;
  ++cluster.generation;
  wake(cluster.waiters);
}

void cluster_wait(const Source& source) {
  Thread& thread = self();
  Cluster& cluster = *thread.block->cluster;
  if (!thread.cluster_arrived) fail(source, "cluster_wait without cluster_arrive");
  // The cluster cannot complete twice between this thread's arrival and its wait.
  if (cluster.generation == thread.cluster_generation)
    block_on(cluster.waiters, {describe_cluster, nullptr, 0, source});
  thread.cluster_arrived = false;
}

void check_meetings(Thread& thread) {
  Block& block = *thread.block;
  Warp& warp = block.warps[thread.index / 32];
  const std::string who = name_of(thread) + " ends ";
  if (block.barriers[0].arrived > 0) throw Failure{who + "while others wait at __syncthreads"};
  for (const Rendezvous& meeting : warp.rendezvous)
    if (meeting.arrived != 0 && meeting.mask >> thread.index % 32 & 1)
      throw Failure{who + "while other lanes of its warp wait for it in " + meeting.what};
  if (thread.cluster_arrived) throw Failure{who + "between cluster_arrive and cluster_wait"};
  if (block.live == 1 && block.in_flight > 0)
    throw Failure{who +
                  "as the last of its block, while copies to or from the block's shared memory " +
                  "are under way"};
  warp.exited |= 1u << thread.index % 32;
}

uint32_t elected_lane() {
  // Some lane, the same one throughout a launch.
  const Thread& thread = self();
  return static_cast<uint32_t>(Random::mix(machine->seed * 31 + thread.index / 32) % 32);
}

}  // namespace sim
