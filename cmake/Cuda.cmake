# The CUDA kernels: csrc/<family>/*.cu and what their entry points share, compiled into the static library.
#
# A file named sm90_* uses what only Hopper has and is compiled for 90a; every other file for all architectures of the
# list. The last of the list is kept as PTX too, for GPUs that come later. CUDA's runtime is linked statically, so that
# the module loads on a machine without a driver.

set(DGEMMA_CUDA_ARCHITECTURES "80;86;89;90a;100;120" CACHE STRING "Compute capabilities to compile for")
set(CMAKE_CUDA_ARCHITECTURES OFF) # set per target below
enable_language(CUDA)
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)

set(cuda_patterns "${PROJECT_SOURCE_DIR}/csrc/cuda/*.cu")
foreach(family IN LISTS DGEMMA_FAMILIES)
  list(APPEND cuda_patterns "${PROJECT_SOURCE_DIR}/csrc/${family}/*.cu")
endforeach()
file(GLOB cuda_sources CONFIGURE_DEPENDS ${cuda_patterns})
set(hopper_sources ${cuda_sources})
list(FILTER hopper_sources INCLUDE REGEX "/sm90_[^/]*$")
list(FILTER cuda_sources EXCLUDE REGEX "/sm90_[^/]*$")

# 90a code runs on 9.0 alone, so a file for all is compiled for plain 90 there.
string(REPLACE "90a" "90" all_architectures "${DGEMMA_CUDA_ARCHITECTURES}")
list(TRANSFORM all_architectures APPEND "-real")
list(POP_BACK all_architectures last_architecture)
string(REPLACE "-real" "" last_architecture "${last_architecture}")
list(APPEND all_architectures "${last_architecture}")

function(dgemma_add_cuda name architectures)
  add_library(${name} OBJECT ${ARGN})
  set_target_properties(${name} PROPERTIES CUDA_ARCHITECTURES "${architectures}")
  target_include_directories(${name} PRIVATE "${PROJECT_SOURCE_DIR}/csrc" "${PROJECT_SOURCE_DIR}/csrc/include")
  target_compile_options(${name} PRIVATE -Xcompiler=-Wall,-Wextra -lineinfo)
  target_sources(dgemma PRIVATE $<TARGET_OBJECTS:${name}>)
  target_compile_definitions(dgemma PRIVATE DGEMMA_WITH_CUDA)
endfunction()

if(cuda_sources)
  dgemma_add_cuda(dgemma_cuda "${all_architectures}" ${cuda_sources})
endif()
if(hopper_sources AND "90a" IN_LIST DGEMMA_CUDA_ARCHITECTURES)
  dgemma_add_cuda(dgemma_cuda_sm90 90a-real ${hopper_sources})
  target_compile_definitions(dgemma PRIVATE DGEMMA_WITH_SM90)
  if(TARGET dgemma_cuda) # the entry points are there, beside the kernels for all
    target_compile_definitions(dgemma_cuda PRIVATE DGEMMA_WITH_SM90)
  endif()
endif()
find_package(CUDAToolkit REQUIRED)
target_link_libraries(dgemma PRIVATE CUDA::cudart_static)
if(NOT cuda_sources AND NOT hopper_sources)
  message(STATUS "DGEMMA_CUDA: no CUDA kernels in this source tree; GPU tensors take the plain torch path")
endif()
