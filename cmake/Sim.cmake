# For the test suite alone: the CUDA kernels compiled by the C++ compiler and run on the host by the test bed
# (tests/sim), behind the same operators. Tensors of the CPU are then served by the kernels meant for a GPU.

set(sim_patterns "${PROJECT_SOURCE_DIR}/csrc/cuda/*.cu")
foreach(family IN LISTS DGEMMA_FAMILIES)
  list(APPEND sim_patterns "${PROJECT_SOURCE_DIR}/csrc/${family}/*.cu")
endforeach()
file(GLOB_RECURSE sim_kernels CONFIGURE_DEPENDS ${sim_patterns})
# A call in front of every load and store of a kernel, for which tests/sim/plain_access.cpp is there, and the line of each;
# and one where something undefined happens, for tests/sim/undefined.cpp.
set(sim_undefined "alignment,bounds,integer-divide-by-zero,shift,signed-integer-overflow")
set_source_files_properties(
  ${sim_kernels}
  PROPERTIES
    LANGUAGE CXX COMPILE_OPTIONS
             "-xc++;-fsanitize=thread;--param;tsan-instrument-func-entry-exit=0;-fsanitize=${sim_undefined};-g1")
# The test bed is what the time goes to.
set_source_files_properties("${PROJECT_SOURCE_DIR}/tests/sim/all.cpp" PROPERTIES COMPILE_OPTIONS -O3)

add_library(dgemma_sim OBJECT ${sim_kernels} "${PROJECT_SOURCE_DIR}/tests/sim/all.cpp")
target_include_directories(
  dgemma_sim PRIVATE "${PROJECT_SOURCE_DIR}/tests/sim" "${PROJECT_SOURCE_DIR}/csrc" "${PROJECT_SOURCE_DIR}/csrc/include")
target_compile_definitions(dgemma_sim PRIVATE DGEMMA_SIM DGEMMA_WITH_SM89 DGEMMA_WITH_SM90 DGEMMA_WITH_SM120)
# -Wpsabi only tells that vectors are passed otherwise than by GCC 4. Two or four values in shared memory may be read as
# one word, as nvcc allows.
target_compile_options(dgemma_sim PRIVATE -O2 ${dgemma_warnings} -Wno-psabi -Wno-unknown-pragmas -fno-strict-aliasing)
include(CheckCXXSourceRuns)
check_cxx_source_runs("int main() { return !(__builtin_cpu_supports(\"avx2\") && __builtin_cpu_supports(\"fma\")); }"
                      DGEMMA_HAS_AVX2)
if(DGEMMA_HAS_AVX2) # products run several times faster
  target_compile_options(dgemma_sim PRIVATE -mavx2 -mfma)
endif()

target_sources(dgemma PRIVATE $<TARGET_OBJECTS:dgemma_sim>)
target_compile_definitions(dgemma PUBLIC $<BUILD_INTERFACE:DGEMMA_SIM> $<BUILD_INTERFACE:DGEMMA_WITH_CUDA>)

# Where torch's tensors lie. Called by cmake/Python.cmake: torch's C++ headers are not for a file that has its stable ABI.
function(dgemma_sim_watches_tensors module torch_dir)
  add_library(dgemma_sim_tensors OBJECT "${PROJECT_SOURCE_DIR}/tests/sim/torch_memory.cpp")
  target_include_directories(dgemma_sim_tensors SYSTEM PRIVATE "${torch_dir}/include")
  target_include_directories(dgemma_sim_tensors PRIVATE "${PROJECT_SOURCE_DIR}/tests/sim")
  target_sources(${module} PRIVATE $<TARGET_OBJECTS:dgemma_sim_tensors>)
  target_link_libraries(${module} PRIVATE "${torch_dir}/lib/libc10.so")
endfunction()
