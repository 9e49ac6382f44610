// TMA with a tensor map: boxes of a tensor, swizzled in shared memory.
#include <algorithm>
#include <array>
#include <cstring>
#include <iterator>
#include <memory>

#include "device/tensor_layout.h"
#include "global_shadow.h"
#include "operations.h"
#include "shadow.h"

namespace sim {

namespace {

using dgemma::device::box_bytes;
using dgemma::device::element_bytes;
using dgemma::device::Swizzle;
using dgemma::device::swizzle_period;
using dgemma::device::swizzled;
using dgemma::device::TensorLayout;

struct Box {
  TensorLayout layout;
  int64_t first[5];
};

// Calls visit(offset in the dense box, its row in global memory, first and last + 1 byte of it that
// lie inside) for every innermost row; the global address is null where the whole row lies outside.
template <typename Visit>
void visit_rows(const Box& box, Visit visit) {
  const TensorLayout& layout = box.layout;
  const int64_t bytes = element_bytes(layout.type);
  const int64_t row_bytes = layout.box[0] * bytes;
  const int64_t size = static_cast<int64_t>(layout.size[0]);
  const int64_t begin = std::clamp<int64_t>(-box.first[0], 0, layout.box[0]) * bytes;
  const int64_t end = std::clamp<int64_t>(size - box.first[0], 0, layout.box[0]) * bytes;
  uint32_t at[5] = {};
  for (int64_t offset = 0;; offset += row_bytes) {
    bool inside = begin < end;
    uint64_t address =
        reinterpret_cast<uint64_t>(layout.base) + static_cast<uint64_t>(box.first[0] * bytes);
    for (int i = 1; i < layout.rank; ++i) {
      const int64_t x = box.first[i] + at[i];
      inside = inside && x >= 0 && x < static_cast<int64_t>(layout.size[i]);
      address += static_cast<uint64_t>(x) * layout.stride[i];
    }
    visit(static_cast<uint32_t>(offset), inside ? reinterpret_cast<uint8_t*>(address) : nullptr,
          begin, end);
    int i = 1;
    for (; i < layout.rank && ++at[i] == layout.box[i]; ++i) at[i] = 0;
    if (i >= layout.rank) return;
  }
}

Box make_box(const void* layout, const int32_t* coordinates, int rank, const char* what,
             const Source& source) {
  Box box{*static_cast<const TensorLayout*>(layout), {}};
  if (box.layout.rank != rank)
    fail(source, "%s: %d coordinates for a tensor map of rank %d", what, rank, box.layout.rank);
  for (int i = 0; i < rank; ++i) box.first[i] = coordinates[i];
  return box;
}

uint32_t alignment_of(const Box& box) { return std::max(128u, swizzle_period(box.layout.swizzle)); }

void load(Block& block, uint32_t offset, const Box& box) {
  const uint32_t row_bytes = box.layout.box[0] * element_bytes(box.layout.type);
  uint8_t row[1024];  // 256 elements of 4 bytes
  visit_rows(box, [&](uint32_t at, const uint8_t* global, int64_t begin, int64_t end) {
    std::memset(row, 0, row_bytes);
    if (global) std::memcpy(row + begin, global + begin, static_cast<size_t>(end - begin));
    for (uint32_t piece = 0; piece < row_bytes; piece += 16)
      write_async(block, swizzled(offset + at + piece, box.layout.swizzle), row + piece, 16);
  });
}

uint64_t bytes_inside(const Box& box) {
  uint64_t bytes = 0;
  visit_rows(box, [&](uint32_t, const uint8_t* global, int64_t begin, int64_t end) {
    if (global) bytes += static_cast<uint64_t>(end - begin);
  });
  return bytes;
}

// A box of a tensor, as one block names it.
std::array<int64_t, 7> name_of(const Box& box) {
  std::array<int64_t, 7> name = {self().block->index.x, reinterpret_cast<int64_t>(box.layout.base)};
  std::copy(std::begin(box.first), std::end(box.first), name.begin() + 2);
  return name;
}

// Calls visit(address, bytes) for every run of global memory that lies inside.
template <typename Visit>
void visit_runs(const Box& box, Visit visit) {
  visit_rows(box, [&](uint32_t, const uint8_t* global, int64_t begin, int64_t end) {
    if (global) visit(global + begin, static_cast<size_t>(end - begin));
  });
}

}  // namespace

void tensor_load(void* shared, const void* layout, uint64_t* barrier, uint32_t blocks,
                 const int32_t* coordinates, int rank, const Source& source) {
  check_capability(90, "tma_load", source);
  const Box box = make_box(layout, coordinates, rank, "tma_load", source);
  const auto bytes = static_cast<uint32_t>(box_bytes(box.layout));
  const SharedPlace place = shared_place(shared, bytes, alignment_of(box), "tma_load", source);
  const SharedPlace counter = shared_place(barrier, 8, 8, "tma_load's mbarrier", source);
  std::deque<Block>& cluster = place.block->cluster->blocks;
  if (blocks == 0 || blocks >> cluster.size() != 0)
    fail(source, "tma_load_multicast: blocks 0x%x of a cluster of %zu", blocks, cluster.size());
  machine->statistics.bulk_bytes_read += bytes_inside(box);
  machine->statistics.prefetched_and_loaded += machine->prefetched.erase(name_of(box));
  for (Block& block : cluster) {
    if (!(blocks >> block.rank & 1)) continue;
    if (block.live == 0) fail(source, "tma_load_multicast: block %u has ended", block.rank);
    check_counts_bytes(block, counter.offset, source);
    const PhaseTime phase = running_phase(block, counter.offset, source);
    begin_write(block, place.offset, bytes, phase, "tma_load", source);
    visit_runs(box, [&](const uint8_t* global, size_t run) {
      copy_global(global, run, false, phase.slot, phase.epoch, source, "tma_load");
    });
    poison(block, place.offset, bytes);
    begin_flight(block, source);
    later(source, [&block, box, bytes, offset = place.offset, counted = counter.offset, source] {
      load(block, offset, box);
      --block.in_flight;
      mbarrier_complete_bytes(block, counted, bytes, source);
    });
  }
}

void tensor_prefetch(const void* layout, const int32_t* coordinates, int rank,
                     const Source& source) {
  check_capability(90, "tma_prefetch_to_l2", source);
  machine->prefetched.insert(
      name_of(make_box(layout, coordinates, rank, "tma_prefetch_to_l2", source)));
  ++machine->statistics.prefetches;
}

void tensor_store(const void* layout, const void* shared, const int32_t* coordinates, int rank,
                  const Source& source) {
  check_capability(90, "tma_store", source);
  const Box box = make_box(layout, coordinates, rank, "tma_store", source);
  const auto bytes = static_cast<uint32_t>(box_bytes(box.layout));
  const SharedPlace place = shared_place(shared, bytes, alignment_of(box), "tma_store", source);
  check_visible_to_async(*place.block, place.offset, bytes, "tma_store", source);
  later_store(*place.block, {place.block, place.offset, bytes}, source, [=] {
    std::vector<uint8_t> dense(bytes);
    for (uint32_t piece = 0; piece < bytes; piece += 16)
      std::memcpy(dense.data() + piece,
                  place.block->shared + swizzled(place.offset + piece, box.layout.swizzle), 16);
    return [box, dense = std::move(dense)] {
      visit_rows(box, [&](uint32_t at, uint8_t* global, int64_t begin, int64_t end) {
        if (global)
          std::memcpy(global + begin, dense.data() + at + begin, static_cast<size_t>(end - begin));
      });
      machine->statistics.bulk_bytes_written += bytes_inside(box);
    };
  });
  visit_runs(box, [&](const uint8_t* global, size_t run) {
    begin_global_write(global, run, "tma_store", source);
  });
}

}  // namespace sim
