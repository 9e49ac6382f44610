// The host forms of the device wrappers (device/*.h) are made of these: each wrapper is one call.
#pragma once

#include <array>

#include "machine.h"

namespace sim {

// shared_memory.cpp

// A shared address as instructions take it starts here: hardware keeps the first kilobyte for
// itself.
constexpr uint32_t kSharedWindow = 1024;

// All of the block's, of which so much is used.
void* own_shared_memory(size_t bytes, const Source& source);

struct SharedPlace {
  Block* block;
  uint32_t offset;
};
// The block of this cluster and the offset in its shared memory that a pointer means; an error
// where it means none, or where fewer than `bytes` are left, or where it is not a multiple of
// `alignment`.
SharedPlace shared_place(const void* pointer, uint32_t bytes, uint32_t alignment, const char* what,
                         const Source& source);
// The instruction is there from this compute capability on.
void check_capability(int32_t first, const char* what, const Source& source);
void check_aligned(const void* pointer, uint32_t alignment, const char* what, const Source& source);
void* shared_of_block(void* pointer, uint32_t rank, const Source& source);
// An atomic operation on shared or global memory: it passes on no order by itself. It is where
// blocks meet: another thread may come first.
void touch_atomic(const void* address, uint32_t bytes, const Source& source);
template <typename T, typename Update>
[[gnu::no_sanitize("thread")]] T atomically(T* address, const Source& source, Update update) {
  touch_atomic(address, sizeof(T), source);
  const T old = *address;
  *address = update(old);
  ++machine->progress;
  return old;
}

// Someone else does something to this block's shared memory, known under this slot and epoch: a
// thread of the block must know of it before the block's last one ends. Of what writes nothing
// there it is enough to know as of a read.
void visit(Block& block, uint32_t slot, uint32_t epoch, uint32_t place, bool writes);
// An asynchronous operation begins that touches the block's shared memory until --block.in_flight.
inline void begin_flight(Block& block, const Source& source) {
  ++block.in_flight;
  block.in_flight_source = source;
}

void fence_proxy_async();
// An error where the async proxy reads bytes that ordinary stores wrote and no fence has made
// visible.
void check_visible_to_async(Block& block, uint32_t offset, uint32_t bytes, const char* what,
                            const Source& source);
// The writes of an asynchronous operation are seen by both proxies.
void write_async(Block& block, uint32_t offset, const void* data, uint32_t bytes);
// The destination of a copy holds nothing that may be used until it lands.
void poison(Block& block, uint32_t offset, uint32_t bytes);

// collective.cpp

// All lanes of `mask` call this with an argument each; `evaluate` sees them by lane, once, before
// anyone goes on.
void warp_collective(uint32_t mask, const char* what, void* argument,
                     void (*evaluate)(void* const* argument, uint32_t mask, void* context),
                     void* context, const Source& source);
// The whole warp executes one instruction (.sync.aligned): nobody goes on before all are here.
void warp_together(const char* what, const Source& source);
void barrier_sync(uint32_t barrier, uint32_t threads, const Source& source);
void barrier_arrive(uint32_t barrier, uint32_t threads, const Source& source);
void cluster_arrive(const Source& source);
void cluster_wait(const Source& source);
uint32_t elected_lane();
uint32_t rank_in_cluster();
uint32_t blocks_of_cluster();
// setmaxnreg of a warp: counts the block's registers, and waits while there are too few.
void set_registers(uint32_t count, bool increase, const Source& source);

// mbarrier.cpp

void mbarrier_init(uint64_t* state, uint32_t arrivals, const Source& source);
void mbarrier_invalidate(uint64_t* state, const Source& source);
void mbarrier_arrive(uint64_t* state, const Source& source);
void mbarrier_arrive_at_block(uint64_t* state, uint32_t rank, const Source& source);
void mbarrier_expect_bytes(uint64_t* state, uint32_t bytes, const Source& source);
bool mbarrier_try_wait(uint64_t* state, uint32_t parity, const Source& source);
void mbarrier_wait(uint64_t* state, uint32_t parity, const Source& source);
void fence_mbarrier_init();
// The copies call these: they check that the barrier may count bytes, and count them when they
// come.
// Whoever uses an mbarrier comes after its initialisation.
void check_use(Block& block, uint32_t offset, const char* what, const Source& source);
void check_counts_bytes(Block& block, uint32_t offset, const Source& source);
// The phase that runs, as others get to know of its end: see clocks.h.
struct PhaseTime {
  uint32_t slot, epoch;
};
PhaseTime running_phase(Block& block, uint32_t offset, const Source& source);
void mbarrier_arrive_in(Block& block, uint32_t offset, const Source& source);
void mbarrier_complete_bytes(Block& block, uint32_t offset, uint32_t bytes, const Source& source);

// copy.cpp

// An asynchronous copy, counted in this phase of an mbarrier, writes there from now on.
void begin_write(Block& block, uint32_t offset, uint32_t bytes, const PhaseTime& phase,
                 const char* what, const Source& source);
void small_copy(void* shared, const void* global, uint32_t bytes, uint32_t bytes_read,
                const Source& source);
void small_copy_commit();
void small_copy_wait(uint32_t pending, const Source& source);
void small_copy_mbarrier_arrive(uint64_t* state, const Source& source);
void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* barrier,
               const Source& source);
void bulk_copy_to_block(void* shared, const void* from, uint32_t bytes, uint64_t* barrier,
                        uint32_t rank, const Source& source);
void bulk_store(void* global, const void* shared, uint32_t bytes, const Source& source);
// What the open bulk group will write to global memory.
void begin_global_write(const void* global, size_t bytes, const char* what, const Source& source);
void bulk_commit();
void bulk_wait(uint32_t pending, bool only_read, const Source& source);

// tensor_copy.cpp

// `layout` is a TensorLayout (device/tensor_layout.h).
void tensor_load(void* shared, const void* layout, uint64_t* barrier, uint32_t blocks,
                 const int32_t* coordinates, int rank, const Source& source);
// A hint: it is only counted, and how much of it the block loads later.
void tensor_prefetch(const void* layout, const int32_t* coordinates, int rank,
                     const Source& source);
void tensor_store(const void* layout, const void* shared, const int32_t* coordinates, int rank,
                  const Source& source);
// A bulk store of the current thread: `read` happens later, and what it gives is written later
// still.
// `range` is what it reads of the block's shared memory.
void later_store(Block& block, const BulkGroup::Range& range, const Source& source,
                 std::function<std::function<void()>()> read);

// tensor_core.cpp

void load_tiles(uint32_t* tile, int count, const void* row, bool transposed, const Source& source);
void store_tiles(void* row, const uint32_t* tile, int count, bool transposed, const Source& source);
// a b + c of numbers that are bfloat16, such that rounding it to bfloat16 is the only rounding:
// where float does not hold the sum, its last bit is odd.
float multiply_add_to_odd(float a, float b, float c);
void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b, const Source& source);
void mma_m16n8k32_e4m3(float* d, const uint32_t* a, const uint32_t* b, const Source& source);
void mma_m16n8k32_int8(int32_t* d, const uint32_t* a, const uint32_t* b, const Source& source);
// The value of a byte of e4m3, by its bits.
extern const std::array<float, 256> e4m3_values;
// An accumulator keeps 14 bits of sums of e4m3 products.
void cut_to_14_bits(float* sums, uint32_t count);

// wgmma.cpp

struct Wgmma {
  int n;
  bool a_in_registers, a_row_major, b_row_major,
      accumulate;  // row-major: m of A, n of B along memory
  uint64_t a, b;
  bool e4m3 = false;  // else bfloat16
};
void wgmma(float* d, const uint32_t* a, const Wgmma& operation, const Source& source);
void wgmma_fence(const Source& source);
void wgmma_commit(const Source& source);
void wgmma_wait(uint32_t pending, const Source& source);

}  // namespace sim
