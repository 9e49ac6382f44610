# libdgemma: C interface and kernels, no torch, no Python. Static for the Python module and for hosts, and shared from the
# same objects.

# The version and the ABI number that the headers tell.
file(STRINGS "${PROJECT_SOURCE_DIR}/csrc/include/dgemma/base.h" dgemma_numbers REGEX "^#define DGEMMA_[A-Z]+_[A-Z]+ [0-9]+$")
string(REGEX REPLACE "#define [A-Z_]+ " "" dgemma_numbers "${dgemma_numbers}")
list(POP_BACK dgemma_numbers dgemma_abi)
list(JOIN dgemma_numbers "." dgemma_header_version)
if(NOT dgemma_header_version VERSION_EQUAL PROJECT_VERSION)
  message(FATAL_ERROR "csrc/include/dgemma/base.h is version ${dgemma_header_version}, pyproject.toml ${PROJECT_VERSION}")
endif()

include(cmake/Warnings.cmake)
dgemma_cxx_warnings(dgemma_warnings)

add_library(dgemma STATIC)
target_include_directories(
  dgemma
  PUBLIC "$<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}/csrc/include>" $<INSTALL_INTERFACE:include>
  PRIVATE "${PROJECT_SOURCE_DIR}/csrc")
target_compile_definitions(dgemma PRIVATE DGEMMA_VERSION="${PROJECT_VERSION}")
# Messages and debug information name files relative to the repository.
target_compile_options(dgemma PRIVATE ${dgemma_warnings} "-ffile-prefix-map=${PROJECT_SOURCE_DIR}/=")

set(dgemma_patterns "${PROJECT_SOURCE_DIR}/csrc/cpu/*.cpp")
foreach(family IN LISTS DGEMMA_FAMILIES)
  list(APPEND dgemma_patterns "${PROJECT_SOURCE_DIR}/csrc/${family}/*.cpp")
endforeach()
# The launch plans of csrc/<family>/cuda are host code, which is here without CUDA too.
file(GLOB_RECURSE dgemma_sources CONFIGURE_DEPENDS ${dgemma_patterns})
target_sources(dgemma PRIVATE ${dgemma_sources})
# What entry points compute themselves is rounded after every operation, as denoise.h and the scalar variant promise.
set_source_files_properties(${dgemma_sources} PROPERTIES COMPILE_OPTIONS -ffp-contract=off)
include(cmake/CpuVariants.cmake)

# The same objects as a shared library, for hosts of the C interface: the test bed and partial builds have none.
if(NOT DGEMMA_SIM AND NOT DGEMMA_ONLY)
  add_library(dgemma_shared SHARED $<TARGET_OBJECTS:dgemma>)
  set_target_properties(
    dgemma_shared
    PROPERTIES OUTPUT_NAME dgemma
               VERSION "${PROJECT_VERSION}"
               SOVERSION "${dgemma_abi}"
               LINKER_LANGUAGE CXX
               LINK_DEPENDS "${PROJECT_SOURCE_DIR}/cmake/dgemma.map")
  # Nothing but the interface is visible, of the C++ and CUDA run-time libraries neither; and nothing is left undefined.
  if(NOT APPLE)
    target_link_options(dgemma_shared PRIVATE "-Wl,--version-script=${PROJECT_SOURCE_DIR}/cmake/dgemma.map" -Wl,-z,defs)
  endif()
endif()
