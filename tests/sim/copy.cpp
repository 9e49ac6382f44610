// Asynchronous copies of plain runs of bytes: cp.async in groups, bulk loads and bulk stores.
#include <cstdio>
#include <cstring>

#include "global_shadow.h"
#include "operations.h"
#include "shadow.h"

namespace sim {

namespace {

void perform(Block& block, const std::vector<SmallCopy>& copies) {
  for (const SmallCopy& copy : copies) {
    uint8_t* destination =
        block.shared + copy.shared_offset;  // cp.async belongs to the generic proxy
    std::memcpy(destination, copy.global, copy.bytes_read);
    std::memset(destination + copy.bytes_read, 0, copy.bytes - copy.bytes_read);
    machine->statistics.small_copy_bytes_read += copy.bytes_read;
    --block.in_flight;
  }
}

void wake_if_waiting(Thread& thread) {
  if (thread.state == State::blocked && thread.wait.object == &thread) wake(thread);
}

// Groups are done in order: all up to the group with this number, and empty ones behind it.
void finish_groups(Thread& thread, uint64_t number) {
  while (!thread.copy_groups.empty() &&
         (thread.copy_groups_done < number || thread.copy_groups.front().empty())) {
    perform(*thread.block, thread.copy_groups.front());
    thread.copy_groups.pop_front();
    ++thread.copy_groups_done;
  }
  wake_if_waiting(thread);
}

void settle(Thread& thread, const std::vector<SmallCopy>& copies, uint32_t slot, uint32_t epoch) {
  for (const SmallCopy& copy : copies)
    settle_in_flight(*thread.block, copy.shared_offset, copy.bytes, slot, epoch);
}

std::string describe_small_copies(const Thread& thread) {
  return "waits for cp.async: " + std::to_string(thread.copy_groups.size()) +
         " groups are under way, at most " + std::to_string(thread.wait.value) + " may be";
}

std::string describe_bulk(const Thread& thread) {
  return "waits for bulk stores: " + std::to_string(thread.bulk_groups.size()) +
         " groups were committed, at most " + std::to_string(thread.wait.value) +
         " may be under way";
}

// Waits without a queue: the thread itself is the object that is woken.
void wait_alone(std::string (*describe)(const Thread&), uint64_t value, const Source& source) {
  Waiters nobody_else;
  block_on(nobody_else, {describe, &self(), value, source});
}

void check_bulk(const void* global, uint32_t bytes, const char* what, const Source& source) {
  check_capability(90, what, source);
  if (bytes == 0 || bytes % 16 != 0)
    fail(source, "%s: %u bytes; must be a multiple of 16", what, bytes);
  if (reinterpret_cast<uintptr_t>(global) % 16 != 0)
    fail(source, "%s: the address in global memory is not a multiple of 16", what);
}

}  // namespace

void begin_write(Block& block, uint32_t offset, uint32_t bytes, const PhaseTime& phase,
                 const char* what, const Source& source) {
  touch_or_fail(block, offset, bytes, kWrite | kAsync, actor(self(), phase.slot, phase.epoch),
                source, what);
  visit(block, phase.slot, phase.epoch, place_number(source), true);
  self().touched = true;
}

void small_copy(void* shared, const void* global, uint32_t bytes, uint32_t bytes_read,
                const Source& source) {
  const SharedPlace place = shared_place(shared, bytes, bytes, "cp.async", source);
  if (bytes_read > bytes) fail(source, "cp.async: reads %u of %u bytes", bytes_read, bytes);
  if (reinterpret_cast<uintptr_t>(global) % bytes != 0)
    fail(source, "cp.async: the address in global memory is not a multiple of %u", bytes);
  Thread& thread = self();
  if (place.block != thread.block) fail(source, "cp.async to another block's shared memory");
  touch_or_fail(*place.block, place.offset, bytes, kWrite, actor(thread, kInFlightSlot, kInFlight),
                source, "cp.async");
  touch_global(global, bytes_read, kRead, source, "cp.async");
  std::memset(place.block->shared + place.offset, 0xff, bytes);
  begin_flight(*place.block, source);
  thread.touched = true;
  thread.open_copies.push_back({place.offset, global, static_cast<uint8_t>(bytes),
                                static_cast<uint8_t>(bytes_read), source, 0, 0});
  thread.open_unknown.push_back(thread.open_copies.back());
}

void small_copy_commit() {
  Thread& thread = self();
  thread.unknown_groups.push_back(std::move(thread.open_unknown));
  thread.open_unknown.clear();
  thread.copy_groups.push_back(std::move(thread.open_copies));
  thread.open_copies.clear();
  if (thread.copy_groups.back().empty()) {
    finish_groups(thread, thread.copy_groups_done);
    return;
  }
  const uint64_t number = thread.copy_groups_done + thread.copy_groups.size();
  // A later group may finish this one, and the block may end, before the event comes.
  const Source source = thread.copy_groups.back()[0].source;
  later(source, [&thread, number, alive = thread.block->cluster->alive] {
    if (*alive) finish_groups(thread, number);
  });
}

void small_copy_wait(uint32_t pending, const Source& source) {
  Thread& thread = self();
  while (thread.copy_groups.size() > pending) wait_alone(describe_small_copies, pending, source);
  while (pending == 0 && thread.arriving_copies > 0)
    wait_alone(describe_small_copies, pending, source);
  for (; thread.unknown_groups.size() > pending; thread.unknown_groups.pop_front())
    settle(thread, thread.unknown_groups.front(), slot_of(thread), thread.epoch);
  thread.touched = true;
}

void small_copy_mbarrier_arrive(uint64_t* state, const Source& source) {
  Thread& thread = self();
  const SharedPlace place = shared_place(state, 8, 8, "cp_async_mbarrier_arrive", source);
  check_use(*place.block, place.offset, "cp_async_mbarrier_arrive", source);
  // Open copies still belong to the next group, which is then empty: they do land before the
  // arrival.
  const auto open = std::make_shared<std::vector<SmallCopy>>(std::move(thread.open_copies));
  thread.open_copies.clear();
  const uint64_t number = thread.copy_groups_done + thread.copy_groups.size();
  begin_flight(*place.block, source);
  const PhaseTime phase = running_phase(*place.block, place.offset, source);
  // Who waits for the phase knows of them from then on.
  const auto count = [&](std::vector<SmallCopy>& copies) {
    for (SmallCopy& copy : copies) {
      if (copy.epoch != 0) continue;
      copy.slot = phase.slot;
      copy.epoch = phase.epoch;
      settle_in_flight(*thread.block, copy.shared_offset, copy.bytes, copy.slot, copy.epoch);
    }
  };
  count(thread.open_unknown);
  for (auto& group : thread.unknown_groups) count(group);
  ++thread.arriving_copies;
  later(source, [&thread, number, open, place, source] {
    --thread.arriving_copies;
    finish_groups(thread, number);
    perform(*thread.block, *open);
    wake_if_waiting(thread);
    --place.block->in_flight;
    mbarrier_arrive_in(*place.block, place.offset, source);
  });
}

void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* barrier,
               const Source& source) {
  check_bulk(global, bytes, "bulk_load", source);
  const SharedPlace place = shared_place(shared, bytes, 16, "bulk_load", source);
  const SharedPlace counter = shared_place(barrier, 8, 8, "bulk_load's mbarrier", source);
  check_counts_bytes(*counter.block, counter.offset, source);
  const PhaseTime phase = running_phase(*counter.block, counter.offset, source);
  begin_write(*place.block, place.offset, bytes, phase, "bulk_load", source);
  copy_global(global, bytes, false, phase.slot, phase.epoch, source, "bulk_load");
  poison(*place.block, place.offset, bytes);
  begin_flight(*place.block, source);
  later(source, [=] {
    write_async(*place.block, place.offset, global, bytes);
    machine->statistics.bulk_bytes_read += bytes;
    --place.block->in_flight;
    mbarrier_complete_bytes(*counter.block, counter.offset, bytes, source);
  });
}

void bulk_copy_to_block(void* shared, const void* from, uint32_t bytes, uint64_t* barrier,
                        uint32_t rank, const Source& source) {
  const SharedPlace here = shared_place(from, bytes, 16, "bulk_copy_to_block", source);
  check_bulk(nullptr, bytes, "bulk_copy_to_block", source);
  const SharedPlace there =
      shared_place(shared_of_block(shared, rank, source), bytes, 16, "bulk_copy_to_block", source);
  const SharedPlace counter = shared_place(shared_of_block(barrier, rank, source), 8, 8,
                                           "bulk_copy_to_block's mbarrier", source);
  check_counts_bytes(*counter.block, counter.offset, source);
  check_visible_to_async(*here.block, here.offset, bytes, "bulk_copy_to_block", source);
  const PhaseTime phase = running_phase(*counter.block, counter.offset, source);
  touch_or_fail(*here.block, here.offset, bytes, kAsync, actor(self(), phase.slot, phase.epoch),
                source, "bulk_copy_to_block");
  visit(*here.block, phase.slot, phase.epoch, place_number(source), false);
  begin_write(*there.block, there.offset, bytes, phase, "bulk_copy_to_block", source);
  poison(*there.block, there.offset, bytes);
  begin_flight(*here.block, source);
  begin_flight(*there.block, source);
  later(source, [=] {
    write_async(*there.block, there.offset, here.block->shared + here.offset, bytes);
    --here.block->in_flight;
    --there.block->in_flight;
    mbarrier_complete_bytes(*counter.block, counter.offset, bytes, source);
  });
}

void later_store(Block& block, const BulkGroup::Range& range, const Source& source,
                 std::function<std::function<void()>()> read) {
  Thread& thread = self();
  touch_or_fail(block, range.offset, range.bytes, kAsync, actor(thread, kInFlightSlot, kInFlight),
                source, "a bulk store");
  thread.touched = true;
  if (!thread.open_bulk_group) thread.open_bulk_group = std::make_shared<BulkGroup>();
  const std::shared_ptr<BulkGroup> group = thread.open_bulk_group;
  group->unknown.push_back(range);
  group->source = source;
  ++group->unread;
  ++group->unwritten;
  begin_flight(block, source);
  later(source, [&block, &thread, group, source, read = std::move(read)] {
    const std::function<void()> write = read();
    --group->unread;
    --block.in_flight;
    if (group->waiting) wake_if_waiting(thread);
    later(source, [&thread, group, write] {
      write();
      // The thread may have ended, and its block with it, unless it waits.
      --group->unwritten;
      if (group->waiting) wake_if_waiting(thread);
    });
  });
}

void begin_global_write(const void* global, size_t bytes, const char* what, const Source& source) {
  copy_global(global, bytes, true, kInFlightSlot, kInFlight, source, what);
  self().open_bulk_group->unwritten_bytes.emplace_back(global, bytes);
}

void bulk_store(void* global, const void* shared, uint32_t bytes, const Source& source) {
  check_bulk(global, bytes, "bulk_store", source);
  const SharedPlace place = shared_place(shared, bytes, 16, "bulk_store", source);
  check_visible_to_async(*place.block, place.offset, bytes, "bulk_store", source);
  later_store(*place.block, {place.block, place.offset, bytes}, source, [=] {
    const uint8_t* from = place.block->shared + place.offset;
    const std::vector<uint8_t> data(from, from + bytes);
    return [=] {
      std::memcpy(global, data.data(), data.size());
      machine->statistics.bulk_bytes_written += data.size();
    };
  });
  begin_global_write(global, bytes, "bulk_store", source);
}

void bulk_commit() {
  Thread& thread = self();
  if (!thread.open_bulk_group) thread.open_bulk_group = std::make_shared<BulkGroup>();
  thread.bulk_groups.push_back(std::move(thread.open_bulk_group));
  thread.open_bulk_group.reset();
}

void bulk_wait(uint32_t pending, bool only_read, const Source& source) {
  Thread& thread = self();
  const size_t count = thread.bulk_groups.size();
  for (size_t i = 0; i + pending < count; ++i) {
    BulkGroup& group = *thread.bulk_groups[i];
    group.waiting = true;
    while (group.unread > 0 || (!only_read && group.unwritten > 0))
      wait_alone(describe_bulk, pending, source);
    group.waiting = false;
    for (const BulkGroup::Range& range : group.unknown)
      settle_in_flight(*range.block, range.offset, range.bytes, slot_of(thread), thread.epoch);
    group.unknown.clear();
    thread.touched = true;
    if (only_read) continue;
    for (const auto& [global, bytes] : group.unwritten_bytes) settle_global(global, bytes);
    group.unwritten_bytes.clear();
  }
}

void check_unfinished_copies(Thread& thread) {
  const std::string who = name_of(thread);
  if (!thread.open_unknown.empty()) thread.unknown_groups.push_back(std::move(thread.open_unknown));
  for (const auto& group : thread.unknown_groups)
    for (const SmallCopy& copy : group)
      if (copy.epoch == 0 || thread.clock->known[copy.slot] < copy.epoch)
        throw Failure{who + " ends without cp_async_wait for a copy that it started (" +
                      place_of(copy.source) + ")"};
  if (thread.open_bulk_group) thread.bulk_groups.push_back(thread.open_bulk_group);
  for (const auto& group : thread.bulk_groups)
    if (!group->unknown.empty())
      throw Failure{who + " ends without bulk_wait_read for a store that it started (" +
                    place_of(group->source) + ")"};
}

}  // namespace sim
