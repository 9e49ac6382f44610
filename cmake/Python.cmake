# The Python module `_C`, built against torch's stable ABI: one build serves torch 2.11 and later.

find_package(Python 3.11 REQUIRED COMPONENTS Interpreter Development.Module)
find_package(pybind11 CONFIG QUIET)
if(NOT pybind11_FOUND)
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c "import pybind11; print(pybind11.get_cmake_dir(), end='')"
    OUTPUT_VARIABLE pybind11_DIR
    OUTPUT_STRIP_TRAILING_WHITESPACE)
  find_package(pybind11 CONFIG REQUIRED)
endif()

# Where torch is, without importing it (which takes seconds).
execute_process(
  COMMAND
    "${Python_EXECUTABLE}" -c
    "import importlib.metadata, importlib.util, os
spec = importlib.util.find_spec('torch')
print(os.path.dirname(spec.origin), importlib.metadata.version('torch'), sep=';') if spec else print('none;none')"
  OUTPUT_VARIABLE torch_found
  OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
list(GET torch_found 0 torch_dir)
list(GET torch_found 1 torch_version)
if(torch_dir STREQUAL "none")
  message(FATAL_ERROR "torch is not installed for ${Python_EXECUTABLE}: install torch 2.11 or later first, then build "
                      "with pip's --no-build-isolation")
endif()
string(REGEX MATCH "^[0-9.]+" torch_release "${torch_version}")
if(torch_release VERSION_LESS 2.11)
  message(FATAL_ERROR "torch ${torch_version} in ${torch_dir} is too old: 2.11 or later is needed")
endif()
message(STATUS "torch ${torch_version} in ${torch_dir}")

# A family's operators are in the file with its name; a file with another name serves all.
file(GLOB binding_sources CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/csrc/torch/*.cpp")
set(family_of_vocabulary_head denoise)
set(family_of_moe_plan grouped_gemm)
foreach(family IN ITEMS grouped_gemm block_attention denoise layer)
  set(family_of_${family} ${family})
endforeach()
foreach(source IN LISTS binding_sources)
  get_filename_component(name "${source}" NAME_WE)
  if(DEFINED family_of_${name} AND NOT family_of_${name} IN_LIST DGEMMA_FAMILIES)
    list(REMOVE_ITEM binding_sources "${source}")
  endif()
endforeach()

# NO_EXTRAS: no link-time optimisation; the kernels are in the library, where each has its own flags.
pybind11_add_module(_C MODULE NO_EXTRAS ${binding_sources})
# 0x020b000000000000 is torch 2.11 in the form of torch/headeronly/version.h.
target_compile_definitions(_C PRIVATE TORCH_TARGET_VERSION=0x020b000000000000)
target_include_directories(_C PRIVATE "${PROJECT_SOURCE_DIR}/csrc")
target_compile_options(_C PRIVATE ${dgemma_warnings} "-ffile-prefix-map=${PROJECT_SOURCE_DIR}/=")
# As a library behind pybind11's own headers: torch ships a copy of them, which refuses to be included here.
add_library(torch_stable INTERFACE)
target_include_directories(torch_stable SYSTEM INTERFACE "${torch_dir}/include")
target_link_libraries(torch_stable INTERFACE "${torch_dir}/lib/libtorch_cpu.so")
target_link_libraries(_C PRIVATE dgemma torch_stable)
# The folder of the torch that is imported beside the module, not the one it was built against.
set_target_properties(_C PROPERTIES BUILD_WITH_INSTALL_RPATH ON INSTALL_RPATH "$ORIGIN/../torch/lib")
if(NOT APPLE)
  target_link_options(_C PRIVATE -Wl,--as-needed)
endif()

install(TARGETS _C LIBRARY DESTINATION dgemma_ext COMPONENT python)
