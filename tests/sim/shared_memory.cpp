// A block's shared memory: poisoned with 0xff (NaN in every float format), with an untouchable page
// at its end, and seen twice.
//
// Ordinary C++ stores cannot be watched. So the machine keeps a second picture of shared memory,
// what the async proxy sees: asynchronous writes go to both, ordinary ones to the first alone.
// Where an asynchronous read finds the two different, someone wrote there since the picture of that
// page was last renewed, and there must have been a fence since. A fence by anyone in the block
// counts: a missing fence is found where it is missing everywhere, which is how it is forgotten,
// not where only one of several writers forgets it.
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>

#include "operations.h"
#include "shadow.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace sim {

namespace {

constexpr uint32_t kPoison = 0xff;
constexpr uint32_t kViewPage = 1024;
constexpr uint32_t kSystemPage = 4096;

uint32_t round_up(uint32_t x, uint32_t multiple) {
  return (x + multiple - 1) / multiple * multiple;
}

std::multimap<uint32_t, uint8_t*> free_memory;  // by room, the region's first usable byte

// The tile is aligned to 1,024 bytes and ends at most 1,023 bytes before the untouchable page.
uint8_t* take_memory(uint32_t bytes) {
  const uint32_t room = round_up(bytes, kViewPage), mapped = round_up(room, kSystemPage);
  if (const auto found = free_memory.find(room); found != free_memory.end()) {
    uint8_t* memory = found->second;
    free_memory.erase(found);
    return memory;
  }
  void* region = mmap(nullptr, mapped + 2 * kSystemPage, PROT_NONE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (region == MAP_FAILED ||
      mprotect(static_cast<uint8_t*>(region) + kSystemPage, mapped, PROT_READ | PROT_WRITE) != 0) {
    std::perror("sim: no memory for shared memory");
    std::abort();
  }
  return static_cast<uint8_t*>(region) + kSystemPage + mapped - room;
}

}  // namespace

void begin_block(Block& block) {
  const uint32_t room = round_up(block.shared_bytes, kViewPage);
  block.shared = take_memory(block.shared_bytes);
  begin_shadow(block);
  std::memset(block.shared, kPoison, room);
  block.async_view.assign(room, kPoison);
  block.page_fences.assign(room / kViewPage, block.fences);
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(block.shared + block.shared_bytes, room - block.shared_bytes);
#endif
}

void end_block(Block& block) {
  const uint32_t room = round_up(block.shared_bytes, kViewPage);
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(block.shared, room);
#endif
  free_memory.emplace(room, block.shared);
}

void* own_shared_memory(size_t bytes, const Source& source) {
  const Block& block = *self().block;
  if (bytes > block.shared_bytes)
    fail(source, "the shared-memory struct has %zu bytes, the launch asks for %u", bytes,
         block.shared_bytes);
  return block.shared;
}

SharedPlace shared_place(const void* pointer, uint32_t bytes, uint32_t alignment, const char* what,
                         const Source& source) {
  const auto* address = static_cast<const uint8_t*>(pointer);
  const auto holds = [&](const Block& block) {
    return address >= block.shared && address < block.shared + block.shared_bytes;
  };
  Block* block = self().block;
  if (!holds(*block)) {
    block = nullptr;
    for (Block& other : self().block->cluster->blocks)
      if (holds(other)) block = &other;
  }
  if (block == nullptr) fail(source, "%s: %p is not in shared memory", what, pointer);
  const uint32_t offset = static_cast<uint32_t>(address - block->shared);
  if (bytes > block->shared_bytes - offset)
    fail(source, "%s: %u bytes at offset %u reach past the block's %u bytes of shared memory", what,
         bytes, offset, block->shared_bytes);
  if (offset % alignment != 0)
    fail(source, "%s: offset %u in shared memory is not a multiple of %u", what, offset, alignment);
  return {block, offset};
}

void check_capability(int32_t first, const char* what, const Source& source) {
  if (compute_capability < first)
    fail(source, "%s: needs compute capability %d.%d, this GPU has %d.%d", what, first / 10,
         first % 10, compute_capability / 10, compute_capability % 10);
}

void check_aligned(const void* pointer, uint32_t alignment, const char* what,
                   const Source& source) {
  if (reinterpret_cast<uintptr_t>(pointer) % alignment != 0)
    fail(source, "%s: %p is not a multiple of %u", what, pointer, alignment);
}

void* shared_of_block(void* pointer, uint32_t rank, const Source& source) {
  const SharedPlace place = shared_place(pointer, 1, 1, "mapa", source);
  std::deque<Block>& blocks = self().block->cluster->blocks;
  if (rank >= blocks.size())
    fail(source, "mapa: block %u of a cluster of %zu", rank, blocks.size());
  if (blocks[rank].live == 0) fail(source, "mapa: block %u of the cluster has ended", rank);
  return blocks[rank].shared + place.offset;
}

void visit(Block& block, uint32_t slot, uint32_t epoch, uint32_t place, bool writes) {
  for (Block::Visit& one : block.visits)
    if (one.slot == slot && one.writes == writes) {
      if (epoch >= one.epoch) one = {slot, epoch, place, writes};
      return;
    }
  block.visits.push_back({slot, epoch, place, writes});
}

void check_visits(Thread& thread) {
  Block& block = *thread.block;
  release(thread, block.ended);
  if (block.live > 1 || !checking) return;
  const ClockRef all = publish(block.ended);
  const auto threads = static_cast<uint32_t>(block.threads.size());
  for (const auto& [slot, epoch, place, writes] : block.visits) {
    if ((writes ? all->known[slot] : reads_known(*all.get(), slot)) >= epoch) continue;
    const uint32_t index = slot - kFirstThreadSlot;
    const std::string who = name_of(thread) + " ends as the last of its block, ";
    if (index < threads * block.cluster->blocks.size())
      throw Failure{who + "not knowing that thread " + std::to_string(index % threads) +
                    " of block " + std::to_string(index / threads) +
                    " of the cluster is done with the block's shared memory (" + place_text(place) +
                    ")"};
    throw Failure{who + "while copies to or from the block's shared memory may be under way: " +
                  "nobody in it has waited for the mbarrier that counts them (" +
                  place_text(place) + ")"};
  }
}

void fence_proxy_async() {
  fence(self());
  Block& block = *self().block;
  ++block.fences;
  for (MbarrierState& barrier : block.mbarriers) barrier.fenced = true;
}

void check_visible_to_async(Block& block, uint32_t offset, uint32_t bytes, const char* what,
                            const Source& source) {
  if (std::memcmp(block.shared + offset, block.async_view.data() + offset, bytes) == 0) return;
  for (uint32_t at = offset; at < offset + bytes; ++at) {
    if (block.shared[at] == block.async_view[at]) continue;
    const uint32_t page = at / kViewPage;
    if (block.page_fences[page] == block.fences)
      fail(source,
           "%s reads shared memory at offset %u, written by ordinary stores (or cp.async) with no "
           "fence_proxy_async() since",
           what, at);
    block.page_fences[page] = block.fences;
    std::memcpy(block.async_view.data() + page * kViewPage, block.shared + page * kViewPage,
                kViewPage);
  }
}

void write_async(Block& block, uint32_t offset, const void* data, uint32_t bytes) {
  std::memcpy(block.shared + offset, data, bytes);
  std::memcpy(block.async_view.data() + offset, data, bytes);
}

void poison(Block& block, uint32_t offset, uint32_t bytes) {
  std::memset(block.shared + offset, kPoison, bytes);
  std::memset(block.async_view.data() + offset, kPoison, bytes);
}

}  // namespace sim
