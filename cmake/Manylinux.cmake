# The Python module for distributions older than the one that builds it: linked against the symbols of an older glibc,
# and with what g++'s library has gained since. tools/wheel.py makes the folder of libraries and checks the result.
set(DGEMMA_OLD_GLIBC "" CACHE PATH "Folder with libc.so.6, libm.so.6, libpthread.so.0, libdl.so.2 and librt.so.1 to link against")

function(dgemma_link_old_glibc target)
  if(NOT DGEMMA_OLD_GLIBC)
    return()
  endif()
  target_sources(${target} PRIVATE "${PROJECT_SOURCE_DIR}/cmake/manylinux.cpp")
  # The linker takes a symbol from the first library that has it, so these stand in front of the machine's own.
  set(libraries libm.so.6 libpthread.so.0 libdl.so.2 librt.so.1 libc.so.6)
  list(TRANSFORM libraries PREPEND "${DGEMMA_OLD_GLIBC}/")
  target_link_options(${target} PRIVATE "LINKER:--push-state,--no-as-needed" ${libraries} "LINKER:--pop-state")
endfunction()
