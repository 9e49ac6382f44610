# The CUDA kernels and their entry points, compiled into the static library.
#
# The folder says what a file is compiled for: csrc/<family>/sm90 uses what only Hopper has and is compiled for 90a;
# csrc/<family>/sm89 multiplies FP8 by mma.sync and is compiled for 8.9 and 12.x, whose tensor cores do that; every other
# folder (csrc/cuda, csrc/<family>/cuda, csrc/<family>/sm80) for all architectures of the list. The newest of the list is
# kept as PTX too, for GPUs that come later. CUDA's runtime is linked statically, so that the module loads on a machine
# without a driver.

include(${CMAKE_CURRENT_LIST_DIR}/CudaArchitectures.cmake)
set(DGEMMA_CUDA_ARCHITECTURES "${DGEMMA_ALL_CUDA_ARCHITECTURES}" CACHE STRING "Compute capabilities to compile for")
dgemma_read_cuda_architectures("${DGEMMA_CUDA_ARCHITECTURES}" cuda_architectures wrong)
if(wrong)
  message(FATAL_ERROR "${wrong}")
endif()
set(CMAKE_CUDA_ARCHITECTURES OFF) # set per target below

# The toolkit's libraries lie in lib64, those of the packages from PyPI in lib, where nvcc does not look by itself.
if(CMAKE_CUDA_COMPILER AND NOT CMAKE_CROSSCOMPILING)
  get_filename_component(cuda_bin "${CMAKE_CUDA_COMPILER}" DIRECTORY)
  if(EXISTS "${cuda_bin}/../lib/libcudart_static.a" AND NOT EXISTS "${cuda_bin}/../lib64/libcudart_static.a")
    set(CMAKE_CUDA_FLAGS_INIT "-L${cuda_bin}/../lib")
  endif()
endif()
enable_language(CUDA)
get_filename_component(cuda_bin "${CMAKE_CUDA_COMPILER}" DIRECTORY)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 13.0)
  message(FATAL_ERROR "nvcc ${CMAKE_CUDA_COMPILER_VERSION} (${CMAKE_CUDA_COMPILER}) is too old: 13.0 or later is needed")
endif()
execute_process(COMMAND "${CMAKE_CUDA_COMPILER}" --list-gpu-code OUTPUT_VARIABLE known_to_nvcc)
foreach(architecture IN LISTS cuda_architectures)
  # Some releases of nvcc list 90 alone, and compile for 90a too.
  string(REPLACE "90a" "90" listed "${architecture}")
  if(NOT known_to_nvcc MATCHES "sm_${listed}[^0-9]")
    message(FATAL_ERROR "DGEMMA_CUDA_ARCHITECTURES: got ${architecture}, for which nvcc ${CMAKE_CUDA_COMPILER_VERSION} "
                        "does not compile")
  endif()
endforeach()
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)

set(cuda_patterns "${PROJECT_SOURCE_DIR}/csrc/cuda/*.cu")
foreach(family IN LISTS DGEMMA_FAMILIES)
  list(APPEND cuda_patterns "${PROJECT_SOURCE_DIR}/csrc/${family}/*.cu")
endforeach()
file(GLOB_RECURSE cuda_sources CONFIGURE_DEPENDS ${cuda_patterns})
set(hopper_sources ${cuda_sources})
list(FILTER hopper_sources INCLUDE REGEX "/sm90/[^/]*$")
set(fp8_sources ${cuda_sources})
list(FILTER fp8_sources INCLUDE REGEX "/sm89/[^/]*$")
list(FILTER cuda_sources EXCLUDE REGEX "/sm(89|90)/[^/]*$")

# What one pass of the compiler's front end serves. Code for 8.0 and what is like it comes from PTX for 8.0, code for 9.0
# and later from PTX for 9.0: nothing in a file for all asks for more. 90a code runs on 9.0 alone, so such a file is
# compiled for plain 90 there.
string(REPLACE "90a" "90" all_architectures "${cuda_architectures}")
list(SORT all_architectures COMPARE NATURAL)
list(GET all_architectures -1 newest)
set(code_of_80 "")
set(code_of_90 "")
foreach(architecture IN LISTS all_architectures)
  if(architecture LESS 90)
    list(APPEND code_of_80 "sm_${architecture}")
  else()
    list(APPEND code_of_90 "sm_${architecture}")
  endif()
endforeach()
if(newest LESS 90)
  list(APPEND code_of_80 compute_80)
else()
  list(APPEND code_of_90 compute_90)
endif()
set(portable_code "")
foreach(virtual IN ITEMS 80 90)
  if(code_of_${virtual})
    list(JOIN code_of_${virtual} "," code)
    list(APPEND portable_code "SHELL:-gencode arch=compute_${virtual},code=[${code}]")
  endif()
endforeach()

# Of FP8 by mma.sync. PTX for 8.9 does not know what 9.0 has for kernels that follow each other, so 12.x has its own.
set(fp8_code "")
set(code_of_120 ${code_of_90})
list(FILTER code_of_120 INCLUDE REGEX "^sm_12")
if("89" IN_LIST all_architectures)
  list(APPEND fp8_code "SHELL:-gencode arch=compute_89,code=sm_89")
endif()
if(code_of_120)
  list(JOIN code_of_120 "," code)
  list(APPEND fp8_code "SHELL:-gencode arch=compute_90,code=[${code},compute_90]")
endif()

dgemma_cuda_warnings(cuda_warnings)

function(dgemma_add_cuda name code)
  add_library(${name} OBJECT ${ARGN})
  target_include_directories(${name} PRIVATE "${PROJECT_SOURCE_DIR}/csrc" "${PROJECT_SOURCE_DIR}/csrc/include")
  target_compile_options(${name} PRIVATE ${code} ${cuda_warnings} -lineinfo)
  target_sources(dgemma PRIVATE $<TARGET_OBJECTS:${name}>)
  if(TARGET dgemma_shared)
    target_sources(dgemma_shared PRIVATE $<TARGET_OBJECTS:${name}>)
  endif()
endfunction()

# They were made before CUDA was a language here, and link its objects.
set_target_properties(dgemma PROPERTIES CUDA_ARCHITECTURES OFF)
if(TARGET dgemma_shared)
  set_target_properties(dgemma_shared PROPERTIES CUDA_ARCHITECTURES OFF)
endif()

dgemma_add_cuda(dgemma_cuda "${portable_code}" ${cuda_sources})
target_compile_definitions(dgemma PUBLIC $<BUILD_INTERFACE:DGEMMA_WITH_CUDA>)
if("90a" IN_LIST cuda_architectures)
  dgemma_add_cuda(dgemma_cuda_sm90 "SHELL:-gencode arch=compute_90a,code=sm_90a" ${hopper_sources})
  # The entry points are there, beside the kernels for all.
  target_compile_definitions(dgemma_cuda PRIVATE DGEMMA_WITH_SM90)
endif()
if(fp8_code)
  dgemma_add_cuda(dgemma_cuda_sm89 "${fp8_code}" ${fp8_sources})
  # Which of the two the entry points find there.
  target_compile_definitions(
    dgemma_cuda PRIVATE $<$<IN_LIST:89,${all_architectures}>:DGEMMA_WITH_SM89> $<$<BOOL:${code_of_120}>:DGEMMA_WITH_SM120>)
endif()

if(CMAKE_CROSSCOMPILING AND CMAKE_SYSTEM_PROCESSOR STREQUAL "aarch64")
  set(cuda_library_folders "${cuda_bin}/../targets/sbsa-linux/lib")
else()
  set(cuda_library_folders "${cuda_bin}/../lib64" "${cuda_bin}/../lib")
endif()
find_library(
  DGEMMA_CUDART cudart_static
  HINTS ${cuda_library_folders}
  PATHS ${CMAKE_CUDA_IMPLICIT_LINK_DIRECTORIES} REQUIRED NO_DEFAULT_PATH)
find_package(Threads REQUIRED)
# For this build alone: an installed library finds them on its own machine (cmake/dgemmaConfig.cmake.in).
set(dgemma_cuda_libraries "${DGEMMA_CUDART}" Threads::Threads ${CMAKE_DL_LIBS} rt)
target_link_libraries(dgemma PRIVATE "$<BUILD_INTERFACE:${dgemma_cuda_libraries}>")
if(TARGET dgemma_shared)
  target_link_libraries(dgemma_shared PRIVATE "$<BUILD_INTERFACE:${dgemma_cuda_libraries}>")
endif()
