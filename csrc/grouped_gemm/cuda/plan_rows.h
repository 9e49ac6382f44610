// Rows of tokens that are rounded to bytes, each under a scale of its own, before they are
// multiplied: where they lie in a workspace. Pure host code that allocates nothing.
#pragma once

#include <iosfwd>

#include "common/ceil_divide.h"
#include "cuda/entry.h"
#include "cuda/occupancy.h"

namespace dgemma {

constexpr int32_t kQuantizeRowsThreads = 128;
static_assert(fills_multiprocessor(kQuantizeRowsThreads));
// A warp has a row.
constexpr int64_t quantize_rows_blocks(int64_t rows) {
  return ceil_divide(rows, int64_t{kQuantizeRowsThreads / 32});
}

struct RowsPlan {
  const char* type;  // "int8" or "e4m3"
  int32_t blocks;    // 0: these rows are multiplied as they are
  size_t codes;      // bytes [rows, width]
  size_t scales;     // float32 [rows]
};

inline RowsPlan take_rows(WorkspaceParts* parts, const char* type, int64_t rows, int64_t width) {
  return {.type = type,
          .blocks = static_cast<int32_t>(quantize_rows_blocks(rows)),
          .codes = parts->take<uint8_t>(rows * width),
          .scales = parts->take<float>(rows)};
}

// A line where there is such a kernel.
void print(const char* name, const RowsPlan& plan, std::ostream& out);

}  // namespace dgemma
