// wgmma. A warpgroup's products wait in a queue and are computed at a random later time, in order.
// From issue to completion the accumulators hold NaN and their shared-memory operands and A in
// registers are not yet read, so whoever is too early with any sees wrong numbers. A register of A
// that was changed before the wait is reported there too, whenever the product was computed.
#include <array>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstring>

#include "device/swizzle.h"
#include "operations.h"
#include "shadow.h"

namespace sim {

constexpr uint32_t kWarpgroupThreads = 128;

// The accumulators of one chain of products, as a row-major matrix while they are with the unit.
struct WgmmaAccumulators {
  float* d[kWarpgroupThreads] = {};
  int n = 0;
  uint32_t loaded = 0;
  std::vector<float> tile;
};

struct WgmmaOperation {
  Wgmma what;
  Source source;
  uint32_t issued = 0;
  std::shared_ptr<WgmmaAccumulators> accumulators;
  const uint32_t* a_registers[kWarpgroupThreads] = {};  // four each, where A is in registers
  // What each warp knew when it issued this.
  struct View {
    ClockRef clock;
    uint32_t slot, own_fenced;
  };
  View views[kWarpgroupThreads / 32] = {};
};

namespace {

using dgemma::device::Swizzle;
using dgemma::device::swizzle_period;
using dgemma::device::swizzle_row_bytes;
using dgemma::device::swizzled;

constexpr int kRows = 64, kDepth = 16;  // of bfloat16; of e4m3 twice as deep in as many bytes
constexpr int kDepthE4m3 = 2 * kDepth;

// A register of a thread is row `row`, columns `column` and the next, and so on: see
// device/wgmma.h.
template <typename Visit>
void visit_fragment(uint32_t thread, int n, Visit visit) {
  const uint32_t row = 16 * (thread / 32) + thread % 32 / 4, column = 2 * (thread % 4);
  for (uint32_t i = 0; i < static_cast<uint32_t>(n) / 2; i += 2)
    visit(i, row + 8 * (i / 2 % 2), 8 * (i / 4) + column);
}

// The 16-byte pieces of a tile of `rows` by 16: offsets in shared memory. Eight k of one row where
// k-major, eight rows of one k where row-major; piece p of line l stands at [2 l + p] (k-major) or
// [(rows / 8) l + p].
struct Tile {
  uint32_t start, leading, stride;
  Swizzle swizzle;
  bool row_major;
};

Tile decode(uint64_t descriptor, bool row_major) {
  static constexpr Swizzle kMode[4] = {Swizzle::none, Swizzle::bytes_128, Swizzle::bytes_64,
                                       Swizzle::bytes_32};
  return {static_cast<uint32_t>(descriptor & 0x3fff) << 4,
          static_cast<uint32_t>(descriptor >> 16 & 0x3fff) << 4,
          static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4, kMode[descriptor >> 62],
          row_major};
}

// Address of the piece that holds (row, k .. k + 7), or (row .. row + 7, k): see
// device/matrix_descriptor.h.
uint32_t piece_address(const Tile& tile, uint32_t row, uint32_t k) {
  const uint32_t line = swizzle_row_bytes(tile.swizzle);  // bytes
  uint32_t address = tile.start;
  if (!tile.row_major) {
    address += row % 8 * line + row / 8 * tile.stride;
    address += tile.swizzle == Swizzle::none ? k / 8 * tile.leading : k * 2;
  } else if (tile.swizzle == Swizzle::none) {
    address += k % 8 * 16 + row / 8 * tile.stride + k / 8 * tile.leading;
  } else {
    const uint32_t rows_in_line = line / 2;
    address += row % rows_in_line * 2 + row / rows_in_line * tile.leading + k % 8 * line +
               k / 8 * tile.stride;
  }
  return swizzled(address, tile.swizzle);
}

template <typename Visit>
void visit_pieces(const Tile& tile, uint32_t rows, Visit visit) {
  if (!tile.row_major) {
    for (uint32_t row = 0; row < rows; ++row)
      for (uint32_t k = 0; k < kDepth; k += 8) visit(row, k, piece_address(tile, row, k));
  } else {
    for (uint32_t k = 0; k < kDepth; ++k)
      for (uint32_t row = 0; row < rows; row += 8) visit(row, k, piece_address(tile, row, k));
  }
}

// Start, leading and stride offset, base offset (no tile here begins within a swizzle period) and
// swizzle; every other bit is zero.
constexpr uint64_t kDescriptorBits = 0xc000'3fff'3fff'3fffull;

void check_tile(Block& block, const Tile& tile, uint32_t rows, const char* which,
                const WgmmaOperation& operation, uint32_t slot, uint32_t epoch) {
  const Source& source = operation.source;
  const uint32_t period = swizzle_period(tile.swizzle);
  if (tile.swizzle != Swizzle::none && tile.start % period >= swizzle_row_bytes(tile.swizzle))
    fail(source,
         "wgmma: %s begins at shared address %u, not in the first line of a swizzle period of %u "
         "bytes",
         which, tile.start, period);
  visit_pieces(tile, rows, [&](uint32_t row, uint32_t k, uint32_t address) {
    if (address < kSharedWindow || address - kSharedWindow + 16 > block.shared_bytes)
      fail(source,
           "wgmma: row %u, k %u of %s lies at shared address %u, outside the block's %u bytes", row,
           k, which, address, block.shared_bytes);
    for (const WgmmaOperation::View& view : operation.views)
      touch_or_fail(
          block, address - kSharedWindow, 16, kAsync,
          {view.clock.get(), view.slot, view.own_fenced, slot, epoch, block.cluster->number},
          source, "wgmma", &view == &operation.views[0]);
    check_visible_to_async(block, address - kSharedWindow, 16, "wgmma", source);
  });
}

// Converts to floats, k by rows (`by_k`) or rows by k.
void read_tile(const Block& block, const Tile& tile, uint32_t rows, bool by_k, float* out) {
  const uint32_t row_step = by_k ? 1 : kDepth, k_step = by_k ? rows : 1;
  visit_pieces(tile, rows, [&](uint32_t row, uint32_t k, uint32_t address) {
    uint16_t piece[8];
    std::memcpy(piece, block.shared + address - kSharedWindow, 16);
    float* to = out + row * row_step + k * k_step;
    const uint32_t step = tile.row_major ? row_step : k_step;
    for (uint32_t i = 0; i < 8; ++i)
      to[i * step] = std::bit_cast<float>(static_cast<uint32_t>(piece[i]) << 16);
  });
}

void read_e4m3_tile(const Block& block, const Tile& tile, uint32_t rows, bool by_k, float* out) {
  const uint32_t row_step = by_k ? 1 : kDepthE4m3, k_step = by_k ? rows : 1;
  visit_pieces(tile, rows, [&](uint32_t row, uint32_t k, uint32_t address) {
    const uint8_t* piece = block.shared + address - kSharedWindow;
    for (uint32_t i = 0; i < 16; ++i)
      out[row * row_step + (2 * k + i) * k_step] = e4m3_values[piece[i]];
  });
}

// out[64][n] += a[64][kDepth] b[kDepth][n]. Four rows at once, so that four chains of additions
// hide each other's latency.
template <int kDepth>
void multiply_add(const float* a, const float* b, float* out, uint32_t n) {
  typedef float Eight [[gnu::vector_size(32), gnu::aligned(4), gnu::may_alias]];
  for (int i = 0; i < kRows; i += 4) {
    for (uint32_t j = 0; j < n; j += 8) {
      Eight sum[4];
      for (int r = 0; r < 4; ++r) sum[r] = *reinterpret_cast<const Eight*>(out + (i + r) * n + j);
      for (int k = 0; k < kDepth; ++k) {
        const Eight line = *reinterpret_cast<const Eight*>(b + k * n + j);
        for (int r = 0; r < 4; ++r) sum[r] += a[(i + r) * kDepth + k] * line;
      }
      for (int r = 0; r < 4; ++r) *reinterpret_cast<Eight*>(out + (i + r) * n + j) = sum[r];
    }
  }
}

}  // namespace

struct WgmmaQueue {
  Block* block = nullptr;
  Thread* first = nullptr;
  std::deque<WgmmaOperation> operations;
  uint64_t done = 0;
  uint64_t last_time = 0;
  Waiters waiters;
};

Block::Block() = default;
Block::~Block() = default;

namespace {

WgmmaQueue& queue_of(Thread& thread, const Source& source) {
  Block& block = *thread.block;
  if (block.warpgroups.empty()) {
    for (uint32_t first = 0; first + kWarpgroupThreads <= block.threads.size();
         first += kWarpgroupThreads) {
      block.warpgroups.push_back(std::make_unique<WgmmaQueue>());
      block.warpgroups.back()->block = &block;
      block.warpgroups.back()->first = &block.threads[first];
    }
  }
  if (thread.index / kWarpgroupThreads >= block.warpgroups.size())
    fail(source, "wgmma: this thread is in no whole warpgroup of 128");
  return *block.warpgroups[thread.index / kWarpgroupThreads];
}

void compute(WgmmaQueue& queue) {
  WgmmaOperation& operation = queue.operations.front();
  const Wgmma& what = operation.what;
  const auto n = static_cast<uint32_t>(what.n);
  static float a[kRows * kDepthE4m3], b[kDepthE4m3 * 256];
  if (what.e4m3) {
    read_e4m3_tile(*queue.block, decode(what.a, false), kRows, false, a);
    read_e4m3_tile(*queue.block, decode(what.b, false), n, true, b);
  } else if (what.a_in_registers) {
    for (uint32_t t = 0; t < kWarpgroupThreads; ++t) {
      const uint32_t row = 16 * (t / 32) + t % 32 / 4, k = 2 * (t % 4);
      for (uint32_t i = 0; i < 4; ++i) {
        float* to = a + (row + 8 * (i % 2)) * kDepth + k + 8 * (i / 2);
        const uint32_t packed = operation.a_registers[t][i];
        to[0] = std::bit_cast<float>(packed << 16);
        to[1] = std::bit_cast<float>(packed & 0xffff0000u);
      }
    }
  } else {
    read_tile(*queue.block, decode(what.a, what.a_row_major), kRows, false, a);
  }
  if (!what.e4m3) read_tile(*queue.block, decode(what.b, what.b_row_major), n, true, b);

  float* tile = operation.accumulators->tile.data();
  if (!what.accumulate) std::memset(tile, 0, sizeof(float) * kRows * n);
  if (what.e4m3) {
    multiply_add<kDepthE4m3>(a, b, tile, n);
    cut_to_14_bits(tile, kRows * n);
  } else {
    multiply_add<kDepth>(a, b, tile, n);
  }
  machine->statistics.products += uint64_t{kRows} * (what.e4m3 ? kDepthE4m3 : kDepth) * n;

  const std::shared_ptr<WgmmaAccumulators> accumulators = operation.accumulators;
  queue.operations.pop_front();
  ++queue.done;
  --queue.block->in_flight;
  if (accumulators.use_count() == 1) {  // the chain ends here
    for (uint32_t t = 0; t < kWarpgroupThreads; ++t) {
      float* d = accumulators->d[t];
      visit_fragment(t, accumulators->n, [&](uint32_t i, uint32_t row, uint32_t column) {
        std::memcpy(d + i, tile + row * n + column, 2 * sizeof(float));
      });
    }
  }
  wake(queue.waiters);
}

std::string describe_products(const Thread& thread) {
  const auto& queue = *static_cast<const WgmmaQueue*>(thread.wait.object);
  char text[160];
  if (!queue.operations.empty() && queue.operations.front().issued < kWarpgroupThreads)
    std::snprintf(text, sizeof text,
                  "waits for a wgmma that %u of the warpgroup's threads have issued",
                  queue.operations.front().issued);
  else
    std::snprintf(text, sizeof text, "waits for wgmma");
  return text;
}

}  // namespace

void wgmma(float* d, const uint32_t* a, const Wgmma& what, const Source& source) {
  Thread& thread = self();
  if (compute_capability != 90)
    fail(source, "wgmma: only a GPU of compute capability 9.0 has it, this one has %d.%d",
         compute_capability / 10, compute_capability % 10);
  if ((what.a | what.b) & ~kDescriptorBits)
    fail(source, "wgmma: a matrix descriptor (%016llx) has bits where none may be",
         static_cast<unsigned long long>(what.a & ~kDescriptorBits ? what.a : what.b));
  WgmmaQueue& queue = queue_of(thread, source);
  const uint32_t t = thread.index % kWarpgroupThreads;
  if (!thread.wgmma_fenced)
    fail(source, "wgmma without wgmma_fence() since the last wgmma_commit()");
  const uint64_t number = thread.wgmma_issued++;
  thread.wgmma_source = source;
  if (number == queue.done + queue.operations.size()) {
    WgmmaOperation& operation = queue.operations.emplace_back();
    operation.what = what;
    operation.source = source;
    // The accumulators of the product before, where it adds to the same registers and is not done
    // yet.
    if (queue.operations.size() > 1) {
      const auto& before = queue.operations[queue.operations.size() - 2].accumulators;
      if (before->d[t] == d && before->n == what.n) operation.accumulators = before;
    }
    if (!operation.accumulators) {
      for (const WgmmaOperation& other : queue.operations)
        if (other.accumulators && other.accumulators->d[t] == d) {
          if (other.accumulators->n != what.n)
            fail(source, "wgmma: accumulators of a product of another N that is still under way");
          operation.accumulators = other.accumulators;
        }
    }
    if (!operation.accumulators) {
      operation.accumulators = std::make_shared<WgmmaAccumulators>();
      operation.accumulators->n = what.n;
      operation.accumulators->tile.resize(static_cast<size_t>(kRows) * static_cast<size_t>(what.n));
    }
    begin_flight(*queue.block, source);
  }
  WgmmaOperation& operation = queue.operations[number - queue.done];
  const Wgmma& first = operation.what;
  if (first.n != what.n || first.a_in_registers != what.a_in_registers || first.a != what.a ||
      first.b != what.b || first.accumulate != what.accumulate || first.e4m3 != what.e4m3 ||
      first.a_row_major != what.a_row_major || first.b_row_major != what.b_row_major ||
      operation.source.line() != source.line() || operation.source.column() != source.column())
    fail(source, "wgmma: threads of the warpgroup issue different ones (the other at %s)",
         place_of(operation.source).c_str());
  WgmmaAccumulators& accumulators = *operation.accumulators;
  if (accumulators.d[t] == nullptr) {
    accumulators.d[t] = d;
    visit_fragment(t, what.n, [&](uint32_t i, uint32_t row, uint32_t column) {
      std::memcpy(accumulators.tile.data() + row * static_cast<uint32_t>(what.n) + column, d + i,
                  2 * sizeof(float));
    });
    std::memset(d, 0xff, sizeof(float) * static_cast<size_t>(what.n) / 2);
  } else if (accumulators.d[t] != d) {
    fail(source, "wgmma: threads of the warpgroup name different accumulators");
  }
  if (what.a_in_registers) {
    operation.a_registers[t] = a;
    thread.wgmma_lent.push_back({number, a, {a[0], a[1], a[2], a[3]}, source});
  }

  WgmmaOperation::View& view = operation.views[t / 32];
  if (!view.clock) view = {thread.clock, slot_of(thread), thread.own_fenced};
  if (++operation.issued < kWarpgroupThreads) return;
  Block& block = *thread.block;
  const uint32_t slot = warpgroup_slot(block, thread.index / kWarpgroupThreads);
  const uint32_t epoch = block.cluster->first_epoch + static_cast<uint32_t>(number) + 1;
  if (!what.a_in_registers)
    check_tile(block, decode(what.a, what.a_row_major), kRows, "A", operation, slot, epoch);
  check_tile(block, decode(what.b, what.b_row_major), static_cast<uint32_t>(what.n), "B", operation,
             slot, epoch);
  // Groups complete in order: none before the one in front of it.
  queue.last_time = later(source, [&queue] { compute(queue); }, queue.last_time);
}

void wgmma_fence(const Source& source) {
  // The instructions of a group are the warp's, not the lane's: no lane runs ahead of another over
  // this line.
  warp_together("wgmma_fence", source);
  self().wgmma_fenced = true;
}

void wgmma_commit(const Source& source) {
  warp_together("wgmma_commit", source);
  Thread& thread = self();
  queue_of(thread, source);
  thread.wgmma_fenced = false;
  thread.wgmma_groups.push_back(thread.wgmma_issued);
}

void wgmma_wait(uint32_t pending, const Source& source) {
  warp_together("wgmma_wait", source);
  Thread& thread = self();
  WgmmaQueue& queue = queue_of(thread, source);
  if (thread.wgmma_groups.size() <= pending) return;
  const uint64_t needed = thread.wgmma_groups[thread.wgmma_groups.size() - 1 - pending];
  for (; !thread.wgmma_lent.empty() && thread.wgmma_lent.front().product < needed;
       thread.wgmma_lent.pop_front()) {
    const LentRegisters& lent = thread.wgmma_lent.front();
    if (std::memcmp(lent.place, lent.held, sizeof lent.held) != 0)
      fail(source, "wgmma_wait: registers of A were changed before it (the product at %s)",
           place_of(lent.source).c_str());
  }
  while (queue.done < needed) block_on(queue.waiters, {describe_products, &queue, pending, source});
  if (needed == 0) return;
  learn(thread, warpgroup_slot(*thread.block, thread.index / kWarpgroupThreads),
        thread.block->cluster->first_epoch + static_cast<uint32_t>(needed));
}

void check_unfinished_products(Thread& thread) {
  if (thread.wgmma_issued == 0) return;
  if (queue_of(thread, Source::current()).done < thread.wgmma_issued)
    throw Failure{name_of(thread) + " ends before wgmma_wait for its last wgmma (" +
                  place_of(thread.wgmma_source) + ")"};
}

}  // namespace sim
