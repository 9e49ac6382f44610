# Cross-compiles for 64-bit ARM under Linux (Grace, DGX Spark, Jetson) with Debian's g++-aarch64-linux-gnu:
#
#   cmake -S . -B build/aarch64 -DCMAKE_TOOLCHAIN_FILE=cmake/aarch64-linux-gnu.cmake
#
# With -DDGEMMA_CUDA=ON nvcc compiles for such a machine too, where the toolkit has a folder targets/sbsa-linux (NVIDIA's
# package cuda-cross-sbsa). That has been tried as far as the objects alone.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_C_COMPILER aarch64-linux-gnu-gcc)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_CUDA_HOST_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_CUDA_FLAGS_INIT "-target-dir sbsa-linux")

# Where qemu-user is, programs for it run here, and CMake's own checks with them.
find_program(dgemma_qemu qemu-aarch64)
if(dgemma_qemu)
  set(CMAKE_CROSSCOMPILING_EMULATOR "${dgemma_qemu};-L;/usr/aarch64-linux-gnu")
endif()

# Programs are this machine's, libraries and headers the other's.
set(CMAKE_FIND_ROOT_PATH /usr/aarch64-linux-gnu)
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY BOTH)
set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE BOTH)
set(CMAKE_FIND_ROOT_PATH_MODE_PACKAGE BOTH)
