#include "kernel_order.h"

#include <vector>

#include "clocks.h"
#include "operations.h"
#include "shadow.h"

namespace sim {

namespace {

// A set of pieces of 16 bytes, by open addressing.
class Pieces {
 public:
  void clear() {
    if (count_ != 0) table_.assign(1024, 0);
    count_ = 0;
  }
  bool empty() const { return count_ == 0; }
  bool has(uint64_t piece) const {
    if (count_ == 0) return false;
    for (size_t at = place(piece);; at = (at + 1) & (table_.size() - 1)) {
      if (table_[at] == piece) return true;
      if (table_[at] == 0) return false;
    }
  }
  void add(uint64_t piece) {
    if (2 * (count_ + 1) > table_.size()) grow();
    size_t at = place(piece);
    while (table_[at] != 0 && table_[at] != piece) at = (at + 1) & (table_.size() - 1);
    if (table_[at] == piece) return;
    table_[at] = piece;
    ++count_;
  }
  void add(const Pieces& other) {
    for (const uint64_t piece : other.table_)
      if (piece != 0) add(piece);
  }

 private:
  size_t place(uint64_t piece) const {
    return (piece * 0x9e3779b97f4a7c15u >> 20) & (table_.size() - 1);
  }
  void grow() {
    std::vector<uint64_t> old(table_.empty() ? 1024 : 4 * table_.size());
    old.swap(table_);
    count_ = 0;
    for (const uint64_t piece : old)
      if (piece != 0) add(piece);
  }
  std::vector<uint64_t> table_;
  size_t count_ = 0;
};

Pieces front;    // written by the kernel in front and those that it overlapped in turn
Pieces written;  // by this kernel
uint64_t last_piece = 0;

template <typename Visit>
bool any_piece(const void* address, size_t bytes, Visit visit) {
  const auto first = reinterpret_cast<uintptr_t>(address);
  for (uint64_t piece = first / 16; piece <= (first + bytes - 1) / 16; ++piece)
    if (visit(piece)) return true;
  return false;
}

bool has_waited(const Thread& thread) {
  return thread.clock->known[kFrontSlot] > thread.block->cluster->first_epoch;
}

}  // namespace

// Between calls of the host its memory may be freed and given out anew.
void forget_kernel_in_front() { front.clear(); }

void begin_kernel() {
  written.clear();
  last_piece = 0;
}

void end_kernel() {
  // That this kernel waited for the one in front promises nothing to the next: griddepcontrol.wait
  // alone makes writes visible, and to the grid that waits.
  if (machine->shape.overlaps) written.add(front);
  std::swap(front, written);
}

void remember_global_write(const void* address, size_t bytes) {
  if (!checking || bytes == 0) return;
  any_piece(address, bytes, [](uint64_t piece) {
    if (piece != last_piece) written.add(last_piece = piece);
    return false;
  });
}

const char* global_problem(const Thread& thread, const void* address, size_t bytes, bool write) {
  if (bytes == 0) return nullptr;
  if (machine->shape.overlaps && !front.empty() && !has_waited(thread) &&
      any_piece(address, bytes, [](uint64_t piece) { return front.has(piece); }))
    return write ? "writes global memory that the kernel in front writes, without "
                   "wait_for_previous_kernel() before"
                 : "reads global memory that the kernel in front writes, without "
                   "wait_for_previous_kernel() before";
  if (write) remember_global_write(address, bytes);
  return nullptr;
}

void touch_global(const void* address, size_t bytes, bool write, const Source& source) {
  if (!checking) return;
  if (const char* problem = global_problem(self(), address, bytes, write))
    fail(source, "%s", problem);
}

void check_noncoherent(const void* address, size_t bytes, const Source& source) {
  if (!checking) return;
  if (machine->shape.overlaps &&
      any_piece(address, bytes, [](uint64_t piece) { return front.has(piece); }))
    fail(source,
         "reads past the coherent caches (ld.global.nc) what the kernel in front writes, which may "
         "still run when this one begins");
  if (any_piece(address, bytes, [](uint64_t piece) { return written.has(piece); }))
    fail(source, "reads past the coherent caches (ld.global.nc) what this kernel writes");
}

void store_flag(uint32_t* flag, uint32_t value, const Source& source) {
  touch_global(flag, sizeof *flag, true, source);
  *flag = value;
  ++machine->progress;
}

void wait_for_previous_kernel() {
  Thread& thread = self();
  learn(thread, kFrontSlot, thread.block->cluster->first_epoch + 1);
}

}  // namespace sim
