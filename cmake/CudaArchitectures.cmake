# The GPUs to compile for, in the names that builds of CUDA programs use, as this build writes them: 80;86;90a;120.
#
# It takes 90, 90a, 9.0, sm_90, compute_90, with -real, -virtual or +PTX behind it, native and all; commas, spaces and
# semicolons between them. 9.0 is always 90a, which Hopper's kernels need; other GPUs have no kernels of their own behind
# an "a" or "f". In script mode it prints the list, or one line on stderr:
#
#   cmake -DNAMES="9.0, sm_80" -P cmake/CudaArchitectures.cmake

set(DGEMMA_ALL_CUDA_ARCHITECTURES 80 86 89 90a 100 120)

# Sets `result` to the list, or `error` to what is wrong with the names.
function(dgemma_read_cuda_architectures names result error)
  string(REGEX REPLACE "[ ,;]+" ";" names "${names}")
  set(found "")
  set(wrong "")
  list(REMOVE_ITEM names "")
  if("native" IN_LIST names)
    execute_process(
      COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader
      OUTPUT_VARIABLE native
      ERROR_QUIET
      RESULT_VARIABLE failed)
    string(REGEX MATCHALL "[0-9]+\\.[0-9]" native "${native}")
    if(failed OR NOT native)
      set(wrong "native, and nvidia-smi finds no GPU here")
    endif()
    list(REMOVE_ITEM names native)
    list(APPEND names ${native})
  endif()
  if("all" IN_LIST names OR "all-major" IN_LIST names)
    list(REMOVE_ITEM names all all-major)
    list(APPEND names ${DGEMMA_ALL_CUDA_ARCHITECTURES})
  endif()
  foreach(name IN LISTS names)
    string(TOLOWER "${name}" plain)
    if(NOT plain MATCHES "^(sm_|compute_)?([1-9][0-9]?)\\.?([0-9])[af]?(-real|-virtual|\\+ptx)?$")
      set(wrong "${name}")
    elseif("${CMAKE_MATCH_2}${CMAKE_MATCH_3}" LESS 80)
      set(wrong "${name}, and the kernels need 8.0 or later")
    elseif("${CMAKE_MATCH_2}${CMAKE_MATCH_3}" EQUAL 90)
      list(APPEND found 90a)
    else()
      list(APPEND found "${CMAKE_MATCH_2}${CMAKE_MATCH_3}")
    endif()
  endforeach()
  list(REMOVE_DUPLICATES found)
  list(SORT found COMPARE NATURAL)
  if(NOT found AND NOT wrong)
    set(wrong "nothing")
  endif()
  if(wrong)
    set(wrong "DGEMMA_CUDA_ARCHITECTURES: got ${wrong}; wants compute capabilities, as 80;90a or 9.0 or sm_120, or native")
  endif()
  set(${result} "${found}" PARENT_SCOPE)
  set(${error} "${wrong}" PARENT_SCOPE)
endfunction()

if(CMAKE_SCRIPT_MODE_FILE STREQUAL CMAKE_CURRENT_LIST_FILE)
  dgemma_read_cuda_architectures("${NAMES}" found wrong)
  if(wrong)
    message(NOTICE "${wrong}")
    message(FATAL_ERROR "not a list of architectures")
  endif()
  execute_process(COMMAND "${CMAKE_COMMAND}" -E echo "${found}")
endif()
