// The family's kernels of one instruction set, in one table.
#pragma once

#include "denoise/cpu.h"
#include "denoise/cpu_sample_kernel.h"
#include "denoise/cpu_soft_product_kernel.h"
#include "denoise/cpu_statistics_kernel.h"

namespace dgemma {
namespace {

constexpr DenoiseTable denoise_table = {
    {statistics_row<float>, statistics_row<bfloat16>},
    {sample_row<float>, sample_row<bfloat16>},
    {soft_row<float>, soft_row<bfloat16>},
    {probabilities_row<float>, probabilities_row<bfloat16>},
    {product_strip<float>, product_strip<bfloat16>},
    {write_row<float>, write_row<bfloat16>},
};

}  // namespace
}  // namespace dgemma
