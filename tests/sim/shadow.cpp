#include "shadow.h"

#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <cstdio>
#include <cstring>
#include <map>
#include <string_view>
#include <vector>

#include "operations.h"

namespace sim {

bool checking = true;

namespace {

// One for every four bytes. Most words have one writer and one reader at a time; what there is
// more of stands in a list.
struct Word {
  Record write, read;
  uint32_t others;
};

constexpr size_t kMostOthers = 32;
// Forgotten when the last block that uses them ends, with their memory.
std::vector<std::vector<Record>> lists(1);
std::map<const uint8_t*, std::pair<Word*, size_t>> shadows;  // by the memory that they stand for

// Of a block that had this memory before.
bool past(const Record& record, const Cluster& cluster) {
  return record.cluster != cluster.number || record.epoch <= cluster.first_epoch;
}

void add_other(Word& word, const Record& record, const Cluster& cluster) {
  if (record.bytes == 0 || past(record, cluster)) return;
  if (word.others == 0) {
    word.others = static_cast<uint32_t>(lists.size());
    lists.emplace_back();
  }
  std::vector<Record>& list = lists[word.others];
  std::erase_if(list, [&](const Record& one) { return past(one, cluster); });
  if (list.size() < kMostOthers)
    list.push_back(record);
  else
    list[record.slot % kMostOthers] = record;
}

// The list keeps what the new record does not stand for as well.
void thin_out(Word& word, const Record& record, const Actor& who) {
  if (word.others == 0) return;
  std::erase_if(lists[word.others], [&](const Record& one) {
    if (one.bytes & ~record.bytes) return false;
    if (record.manner & kWrite) return one.slot != kInFlightSlot;
    return one.slot == record.slot && one.manner == record.manner;
  });
  (void)who;
}

bool touch_word(const Cluster& cluster, Word& word, uint32_t offset, uint8_t bytes, Access& access,
                bool keep) {
  const Actor& who = access.who;
  const Record now{who.epoch, access.place, who.cluster, static_cast<uint16_t>(who.slot),
                   bytes,     access.manner};
  Record& same = access.manner & kWrite ? word.write : word.read;
  const auto is_again = [&](const Record& one) {
    return one.slot == now.slot && one.epoch == now.epoch && one.manner == now.manner &&
           !(bytes & ~one.bytes);
  };
  if (word.others == 0 && keep) {
    if (!(access.manner & kWrite) && is_again(word.read) && past(word.write, cluster)) return true;
    if (is_again(word.write) && past(word.read, cluster)) return true;
  }
  for (const Record* one : {&word.write, &word.read})
    if (one->bytes & bytes && !past(*one, cluster) && !in_order(access, *one, offset, bytes))
      return false;
  if (word.others != 0)
    for (const Record& one : lists[word.others])
      if (one.bytes & bytes && !past(one, cluster) && !in_order(access, one, offset, bytes))
        return false;
  if (!keep) return true;
  thin_out(word, now, who);
  if (access.manner & kWrite) {
    if (word.write.bytes & ~bytes) add_other(word, word.write, cluster);
    if (word.read.bytes & ~bytes) add_other(word, word.read, cluster);
    word.read.bytes = 0;
  } else {
    // A reader that comes after another of the same kind stands for both.
    const bool stands =
        word.read.manner == now.manner && !(word.read.bytes & ~bytes) &&
        (word.read.slot == who.own_slot || who.clock->known[word.read.slot] >= word.read.epoch) &&
        now.slot != kInFlightSlot;
    if (!stands) add_other(word, word.read, cluster);
  }
  same = now;
  return true;
}

// Words, with the bytes of each that belong to a run.
template <typename Visit>
void visit_words(uint32_t offset, uint32_t bytes, Visit visit) {
  const uint32_t end = offset + bytes;
  for (uint32_t at = offset & ~3u; at < end; at += 4) {
    uint32_t mask = 15;
    if (at < offset) mask &= 15u << (offset - at);
    if (at + 4 > end) mask &= 15u >> (at + 4 - end);
    visit(at, static_cast<uint8_t>(mask & 15));
  }
}

// From this slot on, those of copies that an mbarrier counts, and of wgmmas.
uint32_t end_of_thread_slots() {
  return kFirstThreadSlot + machine->shape.cluster_blocks * machine->shape.threads;
}

std::string describe(const Record& record, const Actor& to) {
  const uint32_t threads = machine->shape.threads, blocks = machine->shape.cluster_blocks;
  const uint32_t all = end_of_thread_slots();
  const char* verb = record.manner & kWrite ? "wrote" : "read";
  std::string who = "a copy still under way";
  if (record.slot >= kFirstThreadSlot && record.slot < all) {
    const uint32_t index = record.slot - kFirstThreadSlot;
    who = "thread " + std::to_string(index % threads);
    if (record.cluster != to.cluster)
      who += " of " + name_of_block(record.cluster, index / threads);
    else if (blocks > 1)
      who += " of block " + std::to_string(index / threads);
  } else if (record.slot >= all) {
    const bool copy = record.slot - all < blocks * kMbarrierSlots;
    who = copy ? "a copy that an mbarrier counts" : "a wgmma";
  }
  return who + " " + verb + " (" + place_text(record.place) + ")";
}

std::vector<Source> sources;
std::map<std::pair<const char*, uint32_t>, uint32_t> source_numbers;
constexpr uint32_t kIsSource = 0x80000000u;

const uint8_t* module_base(const void* address, const char** file) {
  Dl_info information{};
  if (dladdr(address, &information) == 0) return nullptr;
  *file = information.dli_fname;
  return static_cast<const uint8_t*>(information.dli_fbase);
}

const uint8_t* own_base() {
  const char* file;
  static const uint8_t* base = module_base(reinterpret_cast<const void*>(&forget_shadows), &file);
  return base;
}

}  // namespace

uint32_t place_number(const Source& source) {
  const auto [found, is_new] = source_numbers.try_emplace({source.file_name(), source.line()},
                                                          static_cast<uint32_t>(sources.size()));
  if (is_new) sources.push_back(source);
  return found->second | kIsSource;
}

uint32_t place_number(const void* instruction) {
  return static_cast<uint32_t>(static_cast<const uint8_t*>(instruction) - own_base());
}

namespace {
// What addr2line, of binutils (which g++ needs), says of a place in this program: each line.
template <typename Visit>
void ask_addr2line(const char* options, size_t place, Visit visit) {
  const char* file = nullptr;
  module_base(reinterpret_cast<const void*>(&forget_shadows), &file);
  char command[1024], line[4096];
  std::snprintf(command, sizeof command, "addr2line %s -e '%s' 0x%zx", options, file, place);
  FILE* pipe = popen(command, "r");
  if (pipe == nullptr) return;
  while (std::fgets(line, sizeof line, pipe)) {
    std::string text = line;
    text.erase(text.find_last_not_of(" \n") + 1);
    visit(text);
  }
  pclose(pipe);
}
}  // namespace

// Of the functions that are inlined there the innermost that is no wrapper's and no library's.
std::string place_text(uint32_t number) {
  if (number & kIsSource) return place_of(sources[number & ~kIsSource]);
  // Each is asked for once: stores of the same value are suspects again and again.
  static std::map<uint32_t, std::string> known;
  std::string& found = known[number];
  if (!found.empty()) return found;
  found = "somewhere";
  bool done = false;
  ask_addr2line("-i", number - 1, [&](std::string text) {
    if (done) return;
    if (const size_t note = text.find(" ("); note != std::string::npos) text.erase(note);
    done = text.find("/usr/") != 0 && text.find("sim/device/") == text.npos;
    found = text.substr(text.find_last_of('/') + 1);
  });
  return found;
}

std::string name_of_kernel(const void* function) {
  std::string name;
  const auto place = static_cast<size_t>(static_cast<const uint8_t*>(function) - own_base());
  ask_addr2line("-f -C", place, [&](std::string text) {
    if (name.empty()) name = text;
  });
  // "void dgemma::(anonymous namespace)::combine<true>(dgemma::Rows)": the name alone.
  constexpr std::string_view kAnonymous = "(anonymous namespace)::";
  for (size_t at; (at = name.find(kAnonymous)) != name.npos;) name.erase(at, kAnonymous.size());
  size_t first = 0, end = 0;
  int depth = 0;
  for (; end < name.size() && (depth > 0 || name[end] != '('); ++end) {
    depth += (name[end] == '<') - (name[end] == '>');
    if (depth == 0 && (name[end] == ':' || name[end] == ' ')) first = end + 1;
  }
  name = name.substr(first, end - first);
  return "kernel " + name;
}

bool in_order(Access& access, const Record& record, uint64_t address, uint8_t bytes) {
  const Actor& who = access.who;
  if (!((access.manner | record.manner) & kWrite)) return true;
  if (access.manner & record.manner & kAtomic) return true;
  const bool same_cluster = record.cluster == who.cluster;
  const bool own = same_cluster && record.slot == who.own_slot;
  const uint32_t known = same_cluster ? who.clock->known[record.slot]
                                      : known_of(*who.clock, record.cluster, record.slot);
  // A write over what was read, or over what a copy brought, needs no more than that to be over.
  const bool by_copy = record.slot >= end_of_thread_slots();
  const bool over =
      same_cluster && access.manner & kWrite && (!(record.manner & kWrite) || by_copy);
  const bool before = own || known >= record.epoch ||
                      (over && reads_known(*who.clock, record.slot) >= record.epoch);
  address += static_cast<uint64_t>(std::countr_zero(static_cast<unsigned>(bytes & record.bytes)));
  const auto what = [&] {
    const char* verb = access.manner & kWrite ? " writes " : " reads ";
    return access.what + std::string(verb) + access.where(address) + ", which " +
           describe(record, who);
  };
  if (!before) {
    access.problem = "race: " + what() + ", and neither comes first";
    return false;
  }
  if (!same_cluster || !(access.manner & kAsync) || record.manner & kAsync) return true;
  uint32_t fenced = std::max(who.clock->fenced[record.slot], own ? who.own_fenced : 0u);
  if (over && who.clock->reads) fenced = std::max(fenced, who.clock->reads->fenced[record.slot]);
  if (fenced >= record.epoch) return true;
  access.problem = what() + " by ordinary access, with no fence_proxy_async() between";
  return false;
}

Actor actor(const Thread& thread) {
  const uint32_t slot = slot_of(thread);
  return {thread.clock.get(),           slot, thread.own_fenced, slot, thread.epoch,
          thread.block->cluster->number};
}

Actor actor(const Thread& thread, uint32_t slot, uint32_t epoch) {
  return {thread.clock.get(),           slot_of(thread), thread.own_fenced, slot, epoch,
          thread.block->cluster->number};
}

namespace {
std::string touch_words(Block& block, uint32_t offset, uint32_t bytes, uint8_t manner,
                        const Actor& who, uint32_t place, const char* what, bool keep) {
  const auto where = [](uint64_t at) { return "shared memory at offset " + std::to_string(at); };
  Access access{who, place, manner, what, where, {}};
  auto* words = static_cast<Word*>(block.shadow);
  bool fine = true;
  visit_words(offset, bytes, [&](uint32_t at, uint8_t mask) {
    fine = fine && touch_word(*block.cluster, words[at / 4], at, mask, access, keep);
  });
  return access.problem;
}
}  // namespace

std::string touch(Block& block, uint32_t offset, uint32_t bytes, uint8_t manner, const Actor& who,
                  uint32_t place, const char* what) {
  return touch_words(block, offset, bytes, manner, who, place, what, true);
}

void touch_or_fail(Block& block, uint32_t offset, uint32_t bytes, uint8_t manner, const Actor& who,
                   const Source& source, const char* what, bool keep) {
  if (!checking) return;
  const std::string problem =
      touch_words(block, offset, bytes, manner, who, place_number(source), what, keep);
  if (!problem.empty()) fail(source, "%s", problem.c_str());
}

void settle_in_flight(Block& block, uint32_t offset, uint32_t bytes, uint32_t slot,
                      uint32_t epoch) {
  if (!checking) return;
  auto* words = static_cast<Word*>(block.shadow);
  visit_words(offset, bytes, [&](uint32_t at, uint8_t) {
    Word& word = words[at / 4];
    const auto settle = [&](Record& record) {
      if (record.slot != kInFlightSlot || record.epoch != kInFlight) return;
      record.slot = static_cast<uint16_t>(slot);
      record.epoch = epoch;
    };
    settle(word.write);
    settle(word.read);
    if (word.others != 0)
      for (Record& record : lists[word.others]) settle(record);
  });
}

void begin_shadow(Block& block) {
  // Memory is reused by blocks of about the same size, see shared_memory.cpp.
  const size_t bytes = (block.shared_bytes / 1024 + 1) * 256 * sizeof(Word);
  auto& [words, size] = shadows[block.shared];
  if (words == nullptr) {
    size = bytes;
    words = static_cast<Word*>(mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  }
  block.shadow = words;
}

void forget_shadows() {
  for (auto& [memory, shadow] : shadows)
    madvise(shadow.first, shadow.second, MADV_DONTNEED);  // reads as zeros again
  lists.resize(1);
}

}  // namespace sim
