// TMA moves a box of a tensor between global and shared memory (sm_90).
//
// One thread starts a copy: a tensor map, the box's first coordinates (innermost first; they may
// lie outside), and for a load the mbarrier that counts its bytes, always those of the whole box.
// In shared memory the box is dense, innermost dimension first, swizzled as the map says, at an
// address that is a multiple of 128 (of the swizzle's period, with one). What lies outside the
// tensor is loaded as zero and not stored. Stores are waited for as in bulk_copy.h. PTX ISA, "Data
// Movement and Conversion Instructions: cp.async.bulk.tensor, cp.async.bulk.prefetch.tensor".
#pragma once

#include "device/bulk_copy.h"
#include "device/cache_policy.h"
#include "device/language.h"
#include "device/mbarrier.h"
#include "device/shared_memory.h"
#include "device/tensor_map.h"

namespace dgemma::device {

// Fetches the map itself, which a first copy would wait for.
DGEMMA_DEVICE void prefetch_tensor_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

DGEMMA_DEVICE void tma_load(void* shared, const TensorMap* map, Mbarrier* barrier,
                            CachePolicy policy, int32_t x, int32_t y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1, {%4, %5}], [%2], %3;" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "l"(policy.bits), "r"(x), "r"(y)
      : "memory");
}

DGEMMA_DEVICE void tma_load(void* shared, const TensorMap* map, Mbarrier* barrier,
                            CachePolicy policy, int32_t x, int32_t y, int32_t z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1, {%4, %5, %6}], [%2], %3;" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "l"(policy.bits), "r"(x), "r"(y), "r"(z)
      : "memory");
}

DGEMMA_DEVICE void tma_load(void* shared, const TensorMap* map, Mbarrier* barrier,
                            CachePolicy policy, int32_t x, int32_t y, int32_t z, int32_t w) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1, {%4, %5, %6, %7}], [%2], %3;" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "l"(policy.bits), "r"(x), "r"(y), "r"(z), "r"(w)
      : "memory");
}

// Copies to the same place in the shared memory of every block of the cluster whose bit is set;
// each block's barrier at the same place counts the bytes that it gets.
DGEMMA_DEVICE void tma_load_multicast(void* shared, const TensorMap* map, Mbarrier* barrier,
                                      CachePolicy policy, uint16_t blocks, int32_t x, int32_t y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".multicast::cluster.L2::cache_hint [%0], [%1, {%5, %6}], [%2], %4, %3;" ::"r"(
          shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "l"(policy.bits), "h"(blocks), "r"(x), "r"(y)
      : "memory");
}
DGEMMA_DEVICE void tma_load_multicast(void* shared, const TensorMap* map, Mbarrier* barrier,
                                      CachePolicy policy, uint16_t blocks, int32_t x, int32_t y,
                                      int32_t z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".multicast::cluster.L2::cache_hint [%0], [%1, {%5, %6, %7}], [%2], %4, %3;" ::"r"(
          shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "l"(policy.bits), "h"(blocks), "r"(x), "r"(y), "r"(z)
      : "memory");
}

// Fetches a box into the L2 alone. A hint: nothing is written, and nobody waits for it.
DGEMMA_DEVICE void tma_prefetch_to_l2(const TensorMap* map, int32_t x, int32_t y, int32_t z) {
  asm volatile("cp.async.bulk.prefetch.tensor.3d.L2.global.tile [%0, {%1, %2, %3}];" ::"l"(map),
               "r"(x), "r"(y), "r"(z)
               : "memory");
}

DGEMMA_DEVICE void tma_prefetch_to_l2(const TensorMap* map, int32_t x, int32_t y, int32_t z,
                                      int32_t w) {
  asm volatile("cp.async.bulk.prefetch.tensor.4d.L2.global.tile [%0, {%1, %2, %3, %4}];" ::"l"(map),
               "r"(x), "r"(y), "r"(z), "r"(w)
               : "memory");
}

DGEMMA_DEVICE void tma_store(const TensorMap* map, const void* shared, int32_t x, int32_t y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
      "r"(shared_address(shared)), "r"(x), "r"(y)
      : "memory");
}

DGEMMA_DEVICE void tma_store(const TensorMap* map, const void* shared, int32_t x, int32_t y,
                             int32_t z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(
          map),
      "r"(shared_address(shared)), "r"(x), "r"(y), "r"(z)
      : "memory");
}

DGEMMA_DEVICE void tma_store(const TensorMap* map, const void* shared, int32_t x, int32_t y,
                             int32_t z, int32_t w) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::
          "l"(map),
      "r"(shared_address(shared)), "r"(x), "r"(y), "r"(z), "r"(w)
      : "memory");
}

}  // namespace dgemma::device
