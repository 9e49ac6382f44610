#include "global_shadow.h"

#include <sys/mman.h>

#include <bit>
#include <cstdio>
#include <cstdlib>
#include <unordered_map>

#include "host_memory.h"
#include "kernel_order.h"
#include "operations.h"

namespace sim {

namespace {

struct GlobalWord {
  Record write[4], read[2];  // writes by their first byte
};
constexpr uintptr_t kTileBytes = 1024;
struct ShadowTile {
  uint32_t inside;  // the launch, by its first cluster, in which all of it was host memory
  GlobalWord words[kTileBytes / 4];
};
// 8 MB of memory that is touched: enough for the largest launch of the suite. What is beyond goes
// unwatched, until the next launch begins anew.
constexpr uint32_t kMostTiles = 8192;

ShadowTile* tiles = nullptr;
uint32_t tiles_used = 0;
std::unordered_map<uintptr_t, ShadowTile*> tile_of;  // by address / kTileBytes

// The tiles that were asked for last.
struct Recent {
  uintptr_t number = ~uintptr_t{0};
  ShadowTile* tile = nullptr;
};
constexpr size_t kRecent = 256;
Recent recent[kRecent];

uint32_t launch_first = 1;  // clusters of this launch, by number
uint32_t front_first = 1;   // of the kernels in front that it may overlap

void forget_all() {
  if (tiles_used > 0)
    madvise(tiles, tiles_used * sizeof(ShadowTile), MADV_DONTNEED);  // zeros again
  tiles_used = 0;
  tile_of.clear();
  for (Recent& one : recent) one = {};
}

ShadowTile* find_tile(uintptr_t number, bool make) {
  Recent& one = recent[number % kRecent];
  if (one.number == number) return one.tile;
  const auto found = tile_of.find(number);
  ShadowTile* tile = found == tile_of.end() ? nullptr : found->second;
  if (tile == nullptr) {
    if (!make || tiles_used == kMostTiles) return nullptr;
    if (tiles == nullptr) {
      void* memory = mmap(nullptr, kMostTiles * sizeof(ShadowTile), PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (memory == MAP_FAILED) {
        std::perror("sim: no memory for the shadow of global memory");
        std::abort();
      }
      tiles = static_cast<ShadowTile*>(memory);
    }
    tile = tile_of[number] = &tiles[tiles_used++];
  }
  one = {number, tile};
  return tile;
}

// Words, `step` bytes apart, with the bytes of each that belong to the run.
template <typename Visit>
bool visit_global(const void* pointer, size_t bytes, uintptr_t step, bool make, Visit visit) {
  const auto first = reinterpret_cast<uintptr_t>(pointer), end = first + bytes;
  for (uintptr_t at = first & ~(step - 1); at < end;) {
    ShadowTile* tile = find_tile(at / kTileBytes, make);
    const uintptr_t tile_end = (at / kTileBytes + 1) * kTileBytes;
    if (tile == nullptr) {
      at = tile_end;
      continue;
    }
    for (; at < end && at < tile_end; at += step) {
      uint32_t mask = 15;
      if (at < first) mask &= 15u << (first - at);
      if (at + 4 > end) mask &= 15u >> (at + 4 - end);
      if (mask != 0 &&
          !visit(tile->words[at % kTileBytes / 4], at, static_cast<uint8_t>(mask & 15)))
        return false;
    }
  }
  return true;
}

bool of_past(const Record& record) { return record.cluster < launch_first; }
bool is_of_front(const Record& record) {
  return record.cluster >= front_first && record.cluster < launch_first;
}

// Takes the place of a read that it stands for, or of the older of the two.
void remember_read(GlobalWord& word, const Record& now, const Actor& who) {
  for (Record& one : word.read) {
    const bool stands =
        of_past(one) ||
        (!(one.bytes & ~now.bytes) && one.cluster == now.cluster && one.manner == now.manner &&
         (one.slot == now.slot || who.clock->known[one.slot] >= one.epoch));
    if (stands) {
      one = now;
      return;
    }
  }
  word.read[1] = word.read[0];
  word.read[0] = now;
}

// Takes the bytes that it writes from all before: whoever comes after it comes after them.
void remember_write(GlobalWord& word, const Record& now) {
  for (Record& one : word.read) one.bytes &= static_cast<uint8_t>(~now.bytes);
  for (Record& one : word.write) one.bytes &= static_cast<uint8_t>(~now.bytes);
  Record& place = word.write[std::countr_zero(static_cast<unsigned>(now.bytes))];
  if (place.bytes != 0) word.write[std::countr_zero(static_cast<unsigned>(place.bytes))] = place;
  place = now;
}

struct GlobalAccess : Access {
  bool before_wait;            // where the kernel may overlap the one in front
  bool of_two_writes = false;  // see GlobalProblem
};

bool touch_global_word(GlobalWord& word, uint64_t address, uint8_t bytes, GlobalAccess& access) {
  const Actor& who = access.who;
  const bool write = access.manner & kWrite;
  for (const Record& one : word.write) {
    if (!(one.bytes & bytes)) continue;
    if (access.before_wait && is_of_front(one)) {
      access.problem = std::string(access.what) + (write ? " writes" : " reads") +
                       " global memory that the kernel in front writes (" + place_text(one.place) +
                       "), without wait_for_previous_kernel() before";
      return false;
    }
    if (!of_past(one) && !in_order(access, one, address, bytes)) {
      access.of_two_writes = access.manner == kWrite && one.manner == kWrite;
      return false;
    }
  }
  const Record now{who.epoch, access.place, who.cluster, static_cast<uint16_t>(who.slot),
                   bytes,     access.manner};
  if (!write) {
    remember_read(word, now, who);
    return true;
  }
  for (const Record& one : word.read) {
    if (!(one.bytes & bytes)) continue;
    if (access.before_wait && is_of_front(one)) {
      access.problem = std::string(access.what) +
                       " writes global memory that the kernel in front reads (" +
                       place_text(one.place) + "), without wait_for_previous_kernel() before";
      return false;
    }
    if (!of_past(one) && !in_order(access, one, address, bytes)) return false;
  }
  remember_write(word, now);
  return true;
}

std::string outside(const void* address, size_t bytes, bool write) {
  const uintptr_t first = reinterpret_cast<uintptr_t>(address), number = first / kTileBytes;
  if ((first + bytes - 1) / kTileBytes == number) {
    ShadowTile* tile = find_tile(number, true);
    if (tile != nullptr && tile->inside == launch_first) return {};
    const void* begin = reinterpret_cast<const void*>(number * kTileBytes);
    if (tile != nullptr && is_host_memory(begin, kTileBytes)) {
      tile->inside = launch_first;
      return {};
    }
  }
  return host_memory_problem(address, bytes, write);
}

GlobalProblem touch_all(const Actor& who, const void* address, size_t bytes, uintptr_t step,
                        uint8_t manner, uint32_t place, const char* what) {
  if (bytes == 0) return {};
  if (const std::string problem = outside(address, bytes, manner & kWrite); !problem.empty())
    return {std::string(what) + " " + problem};
  const auto where = [](uint64_t at) {
    return "global memory at " + std::to_string(at) +
           place_in_host_memory(reinterpret_cast<const void*>(at));
  };
  GlobalAccess access{{who, place, manner, what, where, {}},
                      front_first < launch_first && !has_waited(self()),
                      false};
  visit_global(address, bytes, step, true, [&](GlobalWord& word, uintptr_t at, uint8_t mask) {
    return touch_global_word(word, at, mask, access);
  });
  return {std::move(access.problem), access.of_two_writes};
}

}  // namespace

GlobalProblem touch_global(const void* address, size_t bytes, uint8_t manner, uint32_t place,
                           const char* what) {
  self().touched = true;
  return touch_all(actor(self()), address, bytes, 4, manner, place, what);
}

void touch_global(const void* address, size_t bytes, uint8_t manner, const Source& source,
                  const char* what) {
  if (!checking) return;
  const std::string problem = touch_global(address, bytes, manner, place_number(source), what).text;
  if (!problem.empty()) fail(source, "%s", problem.c_str());
}

void copy_global(const void* address, size_t bytes, bool write, uint32_t slot, uint32_t epoch,
                 const Source& source, const char* what) {
  if (!checking) return;
  self().touched = true;
  const uint8_t manner = (write ? kWrite : kRead) | kAsync;
  const std::string problem = touch_all(actor(self(), slot, epoch), address, bytes, write ? 4 : 16,
                                        manner, place_number(source), what)
                                  .text;
  if (!problem.empty()) fail(source, "%s", problem.c_str());
}

void settle_global(const void* address, size_t bytes) {
  if (!checking) return;
  Thread& thread = self();
  visit_global(address, bytes, 4, false, [&](GlobalWord& word, uintptr_t, uint8_t) {
    for (Record& one : word.write) {
      if (one.cluster != thread.block->cluster->number || one.epoch != kInFlight) continue;
      one.slot = static_cast<uint16_t>(slot_of(thread));
      one.epoch = thread.epoch;
    }
    return true;
  });
}

void check_noncoherent(const void* address, size_t bytes, const Source& source) {
  if (!checking) return;
  visit_global(address, bytes, 4, false, [&](GlobalWord& word, uintptr_t, uint8_t mask) {
    for (const Record& one : word.write) {
      if (!(one.bytes & mask)) continue;
      if (is_of_front(one))
        fail(source,
             "reads past the coherent caches (ld.global.nc) what the kernel in front writes (%s), "
             "which may still run when this one begins",
             place_text(one.place).c_str());
      if (!of_past(one))
        fail(source, "reads past the coherent caches (ld.global.nc) what this kernel writes (%s)",
             place_text(one.place).c_str());
    }
    return true;
  });
}

void begin_global_shadow(uint32_t first_cluster) {
  launch_first = front_first = first_cluster;
  if (tiles_used == kMostTiles) forget_all();
}

void overlap_from(uint32_t first_cluster) { front_first = first_cluster; }

void forget_global(const void* address, size_t bytes) {
  if (tiles_used == 0) return;
  visit_global(address, bytes, 4, false, [](GlobalWord& word, uintptr_t, uint8_t) {
    word = {};
    return true;
  });
}

}  // namespace sim
