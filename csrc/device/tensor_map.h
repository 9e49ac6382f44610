// The tensor map: a tensor in global memory as TMA reads it. Made on the host, passed to a kernel
// by value as a `const __grid_constant__ TensorMap` parameter.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include "device/tensor_layout.h"

namespace dgemma::device {

struct TensorMap {
  CUtensorMap map;
};

// Null on success, else the error's text. The driver's function is looked up when it is first
// needed: a library that linked libcuda would not load on a machine without a driver.
inline const char* encode_tensor_map(TensorMap* map, const TensorLayout& layout) {
  if (const char* error = tensor_layout_error(layout)) return error;
  using Encode =
      CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                   const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                   CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  static const Encode encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    // 12.0 is the first driver interface with tensor maps.
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found,
                                                               12000, cudaEnableDefault, &result);
    const bool usable = error == cudaSuccess && result == cudaDriverEntryPointSuccess;
    return usable ? reinterpret_cast<Encode>(found) : nullptr;
  }();
  if (encode == nullptr) return "this driver has no cuTensorMapEncodeTiled (it needs CUDA 12)";

  CUtensorMapDataType type = CU_TENSOR_MAP_DATA_TYPE_UINT8;
  if (layout.type == ElementType::int32) type = CU_TENSOR_MAP_DATA_TYPE_INT32;
  if (layout.type == ElementType::float32) type = CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
  if (layout.type == ElementType::bfloat16) type = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  CUtensorMapSwizzle swizzle = CU_TENSOR_MAP_SWIZZLE_NONE;
  if (layout.swizzle == Swizzle::bytes_32) swizzle = CU_TENSOR_MAP_SWIZZLE_32B;
  if (layout.swizzle == Swizzle::bytes_64) swizzle = CU_TENSOR_MAP_SWIZZLE_64B;
  if (layout.swizzle == Swizzle::bytes_128) swizzle = CU_TENSOR_MAP_SWIZZLE_128B;
  cuuint64_t size[kMaxTensorRank], stride[kMaxTensorRank];
  cuuint32_t box[kMaxTensorRank], every_element[kMaxTensorRank];
  for (int i = 0; i < layout.rank; ++i) {
    size[i] = layout.size[i];
    box[i] = layout.box[i];
    every_element[i] = 1;
    if (i > 0) stride[i - 1] = layout.stride[i];
  }
  const CUresult error =
      encode(&map->map, type, static_cast<cuuint32_t>(layout.rank), const_cast<void*>(layout.base),
             size, stride, box, every_element, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return error == CUDA_SUCCESS ? nullptr : "cuTensorMapEncodeTiled refused the tensor";
}

}  // namespace dgemma::device
