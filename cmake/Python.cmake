# The Python module `_C`, built against torch's stable ABI and Python's limited interface: one build serves torch 2.11 and
# later, Python 3.11 and later.

find_package(Python 3.11 REQUIRED COMPONENTS Interpreter Development.SABIModule)

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
set(family_of_grammar automaton)
foreach(family IN ITEMS grouped_gemm block_attention denoise layer automaton quantize)
  set(family_of_${family} ${family})
endforeach()
foreach(source IN LISTS binding_sources)
  get_filename_component(name "${source}" NAME_WE)
  if(DEFINED family_of_${name} AND NOT family_of_${name} IN_LIST DGEMMA_FAMILIES)
    list(REMOVE_ITEM binding_sources "${source}")
  endif()
endforeach()

Python_add_library(_C MODULE USE_SABI 3.11 WITH_SOABI ${binding_sources})
# 0x020b000000000000 is torch 2.11 in the form of torch/headeronly/version.h.
target_compile_definitions(_C PRIVATE TORCH_TARGET_VERSION=0x020b000000000000)
target_include_directories(_C PRIVATE "${PROJECT_SOURCE_DIR}/csrc")
target_compile_options(_C PRIVATE ${dgemma_warnings} "-ffile-prefix-map=${PROJECT_SOURCE_DIR}/=")
target_include_directories(_C SYSTEM PRIVATE "${torch_dir}/include")
target_link_libraries(_C PRIVATE dgemma "${torch_dir}/lib/libtorch_cpu.so")
# The folder of the torch that is imported beside the module, not the one it was built against.
set_target_properties(_C PROPERTIES BUILD_WITH_INSTALL_RPATH ON INSTALL_RPATH "$ORIGIN/../torch/lib")
if(DGEMMA_SIM)
  dgemma_sim_watches_tensors(_C "${torch_dir}")
  # What takes time is torch's headers, and the other builds have shown that each file includes what it needs. module.cpp
  # asks whether a function is there that another file may bring.
  set_target_properties(_C PROPERTIES UNITY_BUILD ON UNITY_BUILD_BATCH_SIZE 0)
  set_source_files_properties("${PROJECT_SOURCE_DIR}/csrc/torch/module.cpp" PROPERTIES SKIP_UNITY_BUILD_INCLUSION ON)
endif()
dgemma_link_old_glibc(_C)
if(NOT APPLE)
  target_link_options(_C PRIVATE -Wl,--as-needed)
endif()

install(TARGETS _C LIBRARY DESTINATION dgemma_ext COMPONENT python)
