// Rows of activations in e4m3: each divided by its largest magnitude / 448, which is kept.
#pragma once

#include <cstdint>

#include "device/bfloat16.h"

namespace dgemma {

struct QuantizeRows {
  const device::bfloat16* input;  // [rows, width]
  uint8_t* output;                // e4m3 [rows, width]
  float* scales;                  // [rows]: what the row's values are to be multiplied by
  int32_t rows, width;            // width: a multiple of 16
  const int32_t* filled;          // null, or where it stands how many of the rows hold anything
};

// Enqueues the kernel on `stream`. Returns null or the error's text.
const char* launch_quantize_rows(const QuantizeRows& call, void* stream);

}  // namespace dgemma
