// What was done last to each word of shared memory, by whom, when and how: the memory of the checks
// for races and for proxies. global_shadow.h holds the same of global memory.
#pragma once

#include <cstdint>

#include "clocks.h"
#include "machine.h"

namespace sim {

enum Manner : uint8_t { kRead = 0, kWrite = 1, kAsync = 2, kAtomic = 4 };

// Whoever does something: what it knows, and under which slot and epoch others get to know of it.
struct Actor {
  const Clock* clock;
  uint32_t own_slot, own_fenced;  // of the thread that does it or starts it
  uint32_t slot, epoch;
  uint32_t cluster;  // its number
};

// What is remembered of an access.
struct Record {
  uint32_t epoch, place, cluster;
  uint16_t slot;
  uint8_t bytes;  // of the word, a bit each
  uint8_t manner;
};

struct Access {
  const Actor& who;
  uint32_t place;
  uint8_t manner;
  const char* what;
  std::string (*where)(uint64_t address);  // "shared memory at offset 12"
  std::string problem;
};

// False, with the problem, where the access to these bytes of the word at `address` and the one
// that is remembered must come one after the other and do not.
bool in_order(Access& access, const Record& record, uint64_t address, uint8_t bytes);

// A place in a kernel: of a wrapper's caller, or of a machine instruction.
uint32_t place_number(const Source& source);
uint32_t place_number(const void* instruction);
std::string place_text(uint32_t number);
// "kernel combine<true>", of a kernel's function.
std::string name_of_kernel(const void* function);

Actor actor(const Thread& thread);
// An asynchronous operation that this thread starts; others know it under the slot and the epoch.
Actor actor(const Thread& thread, uint32_t slot, uint32_t epoch);

// Checks the access against what others did there, and remembers it. Empty, or what is wrong.
std::string touch(Block& block, uint32_t offset, uint32_t bytes, uint8_t manner, const Actor& who,
                  uint32_t place, const char* what);
// The same, ending the launch; `keep` false checks alone.
void touch_or_fail(Block& block, uint32_t offset, uint32_t bytes, uint8_t manner, const Actor& who,
                   const Source& source, const char* what, bool keep = true);
// What was remembered as in flight is done now, as far as this slot and epoch know.
void settle_in_flight(Block& block, uint32_t offset, uint32_t bytes, uint32_t slot, uint32_t epoch);

// Memory of a block that begins; after an error nothing that was remembered holds.
void begin_shadow(Block& block);
void forget_shadows();

extern bool checking;  // races and proxies are checked; sim_set_checks

}  // namespace sim
