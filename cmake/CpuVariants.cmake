# The CPU kernels, once for each instruction set: a source file for each table of kernels and each set is written into the
# build folder. A table is csrc/<family>/cpu/<what>_table.h; how the entry points find it is said in csrc/cpu/variants.h.

set(dgemma_tables_grouped_gemm moe dense quantized route)
set(dgemma_tables_block_attention attention)
set(dgemma_tables_denoise denoise)
set(dgemma_tables_layer layer)
set(dgemma_tables_automaton automaton)
set(dgemma_tables_quantize quantize)

# The sets beyond scalar exist on x86-64 alone.
set(dgemma_variants scalar)
if(DGEMMA_SIM) # CPU kernels are there, and none is called
  target_compile_definitions(dgemma PRIVATE DGEMMA_SCALAR_ONLY)
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64)$")
  list(APPEND dgemma_variants avx2 avx512 avx512_bf16)
endif()
set(dgemma_flags_scalar "")
set(dgemma_flags_avx2 -mavx2 -mfma -mf16c)
set(dgemma_flags_avx512 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c)
# Every processor with dot products of bfloat16 has those of int8 too (Cooper Lake, Sapphire Rapids, Zen 4).
set(dgemma_flags_avx512_bf16 ${dgemma_flags_avx512} -mavx512bf16 -mavx512vnni)

function(dgemma_add_cpu_table family table variant)
  set(header "${family}/cpu/${table}_table.h")
  set(source "${PROJECT_BINARY_DIR}/cpu_variants/${family}/${table}_${variant}.cpp")
  configure_file("${PROJECT_SOURCE_DIR}/cmake/cpu_variant.cpp.in" "${source}" @ONLY)
  set(flags ${dgemma_flags_${variant}})
  # csrc/cpu/rows.h: the kernels between the products round every product and every sum, as torch does. So do those that
  # quantize, and all of the scalar variant, for the same bits on every machine: on some a compiler would fuse them.
  if(family MATCHES "^(layer|quantize)$" OR table STREQUAL "route" OR variant STREQUAL "scalar")
    list(APPEND flags -ffp-contract=off)
  endif()
  # A tile's sums fill the registers; with this flag fewer of them are kept in memory (csrc/grouped_gemm/LOG.md).
  if(family STREQUAL "grouped_gemm" AND variant MATCHES "avx512" AND CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    list(APPEND flags -flive-range-shrinkage)
  endif()
  set_source_files_properties("${source}" PROPERTIES COMPILE_OPTIONS "${flags}")
  target_sources(dgemma PRIVATE "${source}")
endfunction()

foreach(family IN LISTS DGEMMA_FAMILIES)
  foreach(table IN LISTS dgemma_tables_${family})
    foreach(variant IN LISTS dgemma_variants)
      dgemma_add_cpu_table(${family} ${table} ${variant})
    endforeach()
  endforeach()
endforeach()
