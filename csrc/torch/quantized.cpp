// Of Operands: the four arguments of a matrix of quantized weights. What its codes and scales may
// be depends on its format, so no shape in a description says it.
#include "grouped_gemm/cpu/quantized.h"

#include "torch/operands.h"

namespace dgemma {
dgemma_quantized& Operands::matrix(const Argument& argument) {
  return at<dgemma_quantized>(argument.field);
}

void Operands::check_format(const Argument& argument) const {
  const auto format = at<dgemma_quantized>(argument.field).format;
  switch (format) {
    case DGEMMA_WEIGHTS_FP8:
    case DGEMMA_WEIGHTS_INT4:
    case DGEMMA_WEIGHTS_NVFP4:
    case DGEMMA_WEIGHTS_INT8:
      return;
  }
  refuse(argument.name, std::to_string(static_cast<int>(format)),
         "1 (fp8), 2 (int4), 3 (nvfp4) or 4 (int8)");
}

// Messages give shapes in columns; a byte of a 4-bit format holds two.
void Operands::check_codes(const Argument& argument, const Tensor& tensor) {
  dgemma_quantized& codes = matrix(argument);
  if (argument.format != dgemma_weight_format{}) codes.format = argument.format;
  Shape wanted = wanted_shape(argument);
  const auto sizes = tensor.sizes();
  Shape got(sizes.begin(), sizes.end());
  const int64_t columns = wanted.back();
  wanted.back() = stored_row_bytes(codes, columns);
  if (got != wanted) {
    const int64_t in_a_byte = is_weight_format(codes.format) ? 8 / describe(codes.format).bits : 2;
    got.back() *= in_a_byte;
    wanted.back() = columns;
    refuse(argument.name, "shape " + describe(got), describe(wanted));
  }
  codes.values = tensor.const_data_ptr();
}

void Operands::check_group_scales(const Argument& argument, const Tensor& tensor) {
  const char* name = argument.matrix;
  dgemma_quantized& codes = matrix(argument);
  Shape wanted = wanted_shape(argument);
  const int64_t columns = wanted.back();
  const int64_t groups = tensor.dim() > 0 ? tensor.size(tensor.dim() - 1) : 0;
  if (groups < 1 || columns % groups != 0)
    refuse(name, std::to_string(groups) + " scales in a row",
           "a divisor of its " + std::to_string(columns) + " columns");
  const ScalarType type = tensor.scalar_type();
  if (codes.format == DGEMMA_WEIGHTS_INT4) {
    if (type != ScalarType::Half && type != ScalarType::BFloat16)
      refuse(name, "scales of " + name_of(type), "torch.bfloat16 or torch.float16");
    codes.scale_dtype = type == ScalarType::Half ? DGEMMA_FLOAT16 : DGEMMA_BFLOAT16;
  } else if (type != ScalarType::Byte) {
    refuse(name, "scales of " + name_of(type), "torch.uint8");
  }
  wanted.back() = groups;
  const auto sizes = tensor.sizes();
  const Shape got(sizes.begin(), sizes.end());
  if (got != wanted) refuse(name, "scales of shape " + describe(got), describe(wanted));
  codes.group = static_cast<int32_t>(columns / groups);
  codes.scales = tensor.const_data_ptr();
}

void Operands::check_row_scales(const Argument& argument, const Tensor& tensor) {
  int64_t rows = 1;
  Shape leading = wanted_shape(argument);
  leading.pop_back();
  for (const int64_t extent : leading) rows *= extent;
  const int64_t count = tensor.numel();
  if (count < 1 || rows % count != 0)
    refuse(argument.matrix, std::to_string(count) + " scales of rows",
           "a divisor of its " + std::to_string(rows) + " rows");
  matrix(argument).factors = static_cast<const float*>(tensor.const_data_ptr());
  matrix(argument).rows_per_factor = rows / count;
}

}  // namespace dgemma
