// ldmatrix and stmatrix. See csrc/device/ldmatrix.h.
#pragma once

#include "device/language.h"

namespace dgemma::device {

template <int kCount>
void load_tiles(uint32_t (&tile)[kCount], const void* row, SIM_SOURCE) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4);
  sim::load_tiles(tile, kCount, row, false, source);
}
template <int kCount>
void load_tiles_transposed(uint32_t (&tile)[kCount], const void* row, SIM_SOURCE) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4);
  sim::load_tiles(tile, kCount, row, true, source);
}
template <int kCount>
void store_tiles(void* row, const uint32_t (&tile)[kCount], SIM_SOURCE) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4);
  sim::store_tiles(row, tile, kCount, false, source);
}
template <int kCount>
void store_tiles_transposed(void* row, const uint32_t (&tile)[kCount], SIM_SOURCE) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4);
  sim::store_tiles(row, tile, kCount, true, source);
}

}  // namespace dgemma::device
