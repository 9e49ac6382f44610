# What a C host gets, as the component `c`: headers, both libraries, a CMake package and a pkg-config file. The Python
# package installs its own component (pyproject.toml).

include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

set(dgemma_package_dir "${CMAKE_INSTALL_LIBDIR}/cmake/dgemma")
set_target_properties(dgemma PROPERTIES EXPORT_NAME static)
set_target_properties(dgemma_shared PROPERTIES EXPORT_NAME shared)
target_include_directories(dgemma_shared INTERFACE $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>)

install(
  TARGETS dgemma dgemma_shared
  EXPORT dgemma
  ARCHIVE DESTINATION "${CMAKE_INSTALL_LIBDIR}" COMPONENT c
  LIBRARY DESTINATION "${CMAKE_INSTALL_LIBDIR}" COMPONENT c)
install(DIRECTORY csrc/include/dgemma DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}" COMPONENT c)
install(FILES LICENSE DESTINATION "${CMAKE_INSTALL_DOCDIR}" COMPONENT c)

set(dgemma_has_cuda "${DGEMMA_CUDA}")
set(dgemma_private_libraries "-lstdc++ -lm")
if(DGEMMA_CUDA)
  string(APPEND dgemma_private_libraries " -lcudart_static -lpthread -ldl -lrt")
endif()
install(
  EXPORT dgemma
  FILE dgemmaTargets.cmake
  NAMESPACE dgemma::
  DESTINATION "${dgemma_package_dir}"
  COMPONENT c)
configure_package_config_file(cmake/dgemmaConfig.cmake.in "${PROJECT_BINARY_DIR}/dgemmaConfig.cmake"
                              INSTALL_DESTINATION "${dgemma_package_dir}")
# Releases with one major version have one ABI number; before 1.0 the minor version stands for it.
write_basic_package_version_file("${PROJECT_BINARY_DIR}/dgemmaConfigVersion.cmake" COMPATIBILITY SameMinorVersion)
install(
  FILES "${PROJECT_BINARY_DIR}/dgemmaConfig.cmake" "${PROJECT_BINARY_DIR}/dgemmaConfigVersion.cmake"
  DESTINATION "${dgemma_package_dir}"
  COMPONENT c)
file(RELATIVE_PATH dgemma_prefix_from_pc "/prefix/${CMAKE_INSTALL_LIBDIR}/pkgconfig" "/prefix")
string(REGEX REPLACE "/$" "" dgemma_prefix_from_pc "${dgemma_prefix_from_pc}")
configure_file(cmake/dgemma.pc.in "${PROJECT_BINARY_DIR}/dgemma.pc" @ONLY)
install(FILES "${PROJECT_BINARY_DIR}/dgemma.pc" DESTINATION "${CMAKE_INSTALL_LIBDIR}/pkgconfig" COMPONENT c)
