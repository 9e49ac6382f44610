# The warnings that are asked of a compiler. They are errors where DGEMMA_WARNINGS_AS_ERRORS asks for it, as the test suite
# does, and with compilers that were tried alone: another release may warn of something new, and a user's build must not
# end of that.
option(DGEMMA_WARNINGS_AS_ERRORS "End the build at a warning of a compiler that was tried (for the test suite)" OFF)

function(dgemma_cxx_warnings result)
  set(warnings -Wall -Wextra)
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
    if(DGEMMA_WARNINGS_AS_ERRORS)
      list(APPEND warnings -Werror)
    endif()
    # -Wrestrict sees an overlap in std::string's operator+ that is not there (GCC bug 105651, fixed in 13).
    list(APPEND warnings -Wno-restrict)
  endif()
  set(${result} ${warnings} PARENT_SCOPE)
endfunction()

# Of nvcc, its host compiler and ptxas: registers that spill, and arrays that the compiler puts into memory, cost more than
# any kernel here can bear.
function(dgemma_cuda_warnings result)
  set(warnings -Xcompiler=-Wall,-Wextra -Xptxas=--warn-on-spills,--warn-on-local-memory-usage)
  if(DGEMMA_WARNINGS_AS_ERRORS AND CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 13.1)
    list(APPEND warnings -Werror=all-warnings)
  endif()
  set(${result} ${warnings} PARENT_SCOPE)
endfunction()
