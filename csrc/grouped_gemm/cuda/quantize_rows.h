// Rows of activations in bytes: each divided by its largest magnitude / the largest code, which is
// kept. A row of zeros has the scale 0.
#pragma once

#include <cstdint>

#include "device/bfloat16.h"

namespace dgemma {

struct QuantizeRows {
  const device::bfloat16* input;  // [rows, width]
  uint8_t* output;                // e4m3 or int8 [rows, width]
  float* scales;                  // [rows]: what the row's values are to be multiplied by
  int32_t rows, width;            // width: a multiple of 16
  const int32_t* filled;          // null, or where it stands how many of the rows hold anything
};

// Each enqueues one kernel on `stream`, a cudaStream_t, and returns null or the error's text. To
// e4m3, whose largest is 448, and to int8, by 127.
const char* launch_quantize_rows(const QuantizeRows& call, void* stream);
const char* launch_quantize_rows_int8(const QuantizeRows& call, void* stream);

}  // namespace dgemma
