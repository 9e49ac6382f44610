#include "host_memory.h"

#include <cstdint>
#include <cstdio>
#include <map>
#include <mutex>
#include <vector>

#include "global_shadow.h"

namespace sim {

namespace {

struct Piece {
  uintptr_t begin;
  size_t bytes;
};

std::mutex mutex;  // torch's threads give memory out while a kernel runs
std::map<uintptr_t, size_t> live;
std::vector<Piece> freed;
bool other_memory = false;

// The last piece that begins at the address or before it.
Piece piece_before(uintptr_t address) {
  auto next = live.upper_bound(address);
  if (next == live.begin()) return {0, 0};
  --next;
  return {next->first, next->second};
}

}  // namespace

void host_allocated(const void* memory, size_t bytes) {
  const std::lock_guard<std::mutex> lock(mutex);
  live[reinterpret_cast<uintptr_t>(memory)] = bytes;
}

void host_freed(const void* memory) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = live.find(reinterpret_cast<uintptr_t>(memory));
  if (found == live.end()) return;
  freed.push_back({found->first, found->second});
  live.erase(found);
}

void host_has_other_memory() { other_memory = true; }

bool is_host_memory(const void* address, size_t bytes) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (live.empty()) return true;  // the host does not tell
  const auto first = reinterpret_cast<uintptr_t>(address);
  const Piece piece = piece_before(first);
  return first + bytes <= piece.begin + piece.bytes;
}

std::string host_memory_problem(const void* address, size_t bytes, bool write) {
  if (is_host_memory(address, bytes)) return {};
  const std::lock_guard<std::mutex> lock(mutex);
  const auto first = reinterpret_cast<uintptr_t>(address), end = first + bytes;
  const char* verb = write ? "writes" : "reads";
  char text[160];
  if (const Piece piece = piece_before(first); first < piece.begin + piece.bytes + kHostMargin) {
    std::snprintf(text, sizeof text, "%s %zu bytes at byte %zu of a tensor's memory of %zu bytes",
                  verb, bytes, static_cast<size_t>(first - piece.begin), piece.bytes);
    return text;
  }
  if (const auto next = live.lower_bound(first);
      next != live.end() && end + kHostMargin > next->first) {
    std::snprintf(text, sizeof text, "%s %zu bytes, %zu before a tensor's memory of %zu bytes",
                  verb, bytes, static_cast<size_t>(next->first - first), next->second);
    return text;
  }
  if (!write || other_memory) return {};  // constants, and what others have read
  std::snprintf(text, sizeof text, "writes %zu bytes at %p, which is in no tensor's memory", bytes,
                address);
  return text;
}

std::string place_in_host_memory(const void* address) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto at = reinterpret_cast<uintptr_t>(address);
  const Piece piece = piece_before(at);
  if (at >= piece.begin + piece.bytes) return {};
  return " (byte " + std::to_string(at - piece.begin) + " of a tensor's memory of " +
         std::to_string(piece.bytes) + " bytes)";
}

void forget_freed_memory() {
  std::vector<Piece> pieces;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    pieces.swap(freed);
  }
  for (const Piece& piece : pieces)
    forget_global(reinterpret_cast<const void*>(piece.begin), piece.bytes);
}

}  // namespace sim
