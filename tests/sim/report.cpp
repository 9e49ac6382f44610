// What a report says: who, where and what each thread waits for.
#include <cstdarg>
#include <cstdio>
#include <map>
#include <string>
#include <vector>

#include "machine.h"

namespace sim {

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
