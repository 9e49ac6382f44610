// TMA, which lands late. See csrc/device/tma.h.
#pragma once

#include "device/bulk_copy.h"
#include "device/cache_policy.h"
#include "device/cluster.h"
#include "device/language.h"
#include "device/mbarrier.h"
#include "device/tensor_map.h"

namespace dgemma::device {

inline void prefetch_tensor_map(const TensorMap*) {}

inline void tma_load(void* shared, const TensorMap* map, Mbarrier* barrier, CachePolicy, int32_t x,
                     int32_t y, SIM_SOURCE) {
  const int32_t at[] = {x, y};
  sim::tensor_load(shared, &map->layout, &barrier->state, 1u << cluster_block_rank(), at, 2,
                   source);
}
inline void tma_load(void* shared, const TensorMap* map, Mbarrier* barrier, CachePolicy, int32_t x,
                     int32_t y, int32_t z, SIM_SOURCE) {
  const int32_t at[] = {x, y, z};
  sim::tensor_load(shared, &map->layout, &barrier->state, 1u << cluster_block_rank(), at, 3,
                   source);
}
inline void tma_load(void* shared, const TensorMap* map, Mbarrier* barrier, CachePolicy, int32_t x,
                     int32_t y, int32_t z, int32_t w, SIM_SOURCE) {
  const int32_t at[] = {x, y, z, w};
  sim::tensor_load(shared, &map->layout, &barrier->state, 1u << cluster_block_rank(), at, 4,
                   source);
}
inline void tma_load_multicast(void* shared, const TensorMap* map, Mbarrier* barrier, CachePolicy,
                               uint16_t blocks, int32_t x, int32_t y, SIM_SOURCE) {
  const int32_t at[] = {x, y};
  sim::tensor_load(shared, &map->layout, &barrier->state, blocks, at, 2, source);
}
inline void tma_load_multicast(void* shared, const TensorMap* map, Mbarrier* barrier, CachePolicy,
                               uint16_t blocks, int32_t x, int32_t y, int32_t z, SIM_SOURCE) {
  const int32_t at[] = {x, y, z};
  sim::tensor_load(shared, &map->layout, &barrier->state, blocks, at, 3, source);
}
inline void tma_prefetch_to_l2(const TensorMap* map, int32_t x, int32_t y, int32_t z, SIM_SOURCE) {
  const int32_t at[] = {x, y, z};
  sim::tensor_prefetch(&map->layout, at, 3, source);
}
inline void tma_prefetch_to_l2(const TensorMap* map, int32_t x, int32_t y, int32_t z, int32_t w,
                               SIM_SOURCE) {
  const int32_t at[] = {x, y, z, w};
  sim::tensor_prefetch(&map->layout, at, 4, source);
}
inline void tma_store(const TensorMap* map, const void* shared, int32_t x, int32_t y, SIM_SOURCE) {
  const int32_t at[] = {x, y};
  sim::tensor_store(&map->layout, shared, at, 2, source);
}
inline void tma_store(const TensorMap* map, const void* shared, int32_t x, int32_t y, int32_t z,
                      SIM_SOURCE) {
  const int32_t at[] = {x, y, z};
  sim::tensor_store(&map->layout, shared, at, 3, source);
}
inline void tma_store(const TensorMap* map, const void* shared, int32_t x, int32_t y, int32_t z,
                      int32_t w, SIM_SOURCE) {
  const int32_t at[] = {x, y, z, w};
  sim::tensor_store(&map->layout, shared, at, 4, source);
}

}  // namespace dgemma::device
