# RVSM_CUDA_FOUND, the language CUDA and RVSM_ARCHITECTURES, where nvcc is there.
#
# The variable RVSM_CUDA, or the environment variable of that name, asks for CUDA (1) or against it (0); without it nvcc
# decides. Whether this machine has a GPU is never asked.
if(NOT DEFINED RVSM_CUDA AND DEFINED ENV{RVSM_CUDA})
  set(RVSM_CUDA $ENV{RVSM_CUDA})
endif()
set(RVSM_CUDA_FOUND OFF)
if(DEFINED RVSM_CUDA AND NOT RVSM_CUDA)
  message(STATUS "CUDA: switched off (RVSM_CUDA=${RVSM_CUDA})")
  return()
endif()

# An nvcc that is not on PATH is looked for where toolkits are installed.
if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
  find_program(RVSM_NVCC nvcc PATHS ENV CUDA_HOME ENV CUDA_PATH /usr/local/cuda PATH_SUFFIXES bin)
  if(RVSM_NVCC)
    set(CMAKE_CUDA_COMPILER ${RVSM_NVCC})
  endif()
endif()
# Set below, per target; CMake wants to hear of some when it tries the compiler.
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES OFF)
endif()
include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  if(RVSM_CUDA)
    message(FATAL_ERROR "RVSM_CUDA=${RVSM_CUDA}, but there is no nvcc that works; set CUDACXX or CUDA_HOME")
  endif()
  message(STATUS "CUDA: no nvcc; the build is for the CPU")
  return()
endif()
enable_language(CUDA)
# Tables of 32,764 bytes as kernel parameters.
if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.1)
  if(RVSM_CUDA)
    message(FATAL_ERROR "the CUDA engine needs nvcc 12.1 or newer; this is ${CMAKE_CUDA_COMPILER_VERSION}")
  endif()
  message(STATUS "CUDA: nvcc ${CMAKE_CUDA_COMPILER_VERSION} is older than 12.1; the build is for the CPU")
  return()
endif()
set(RVSM_CUDA_FOUND ON)

# ---- architectures ---------------------------------------------------------------------------------------------------

# TORCH_CUDA_ARCH_LIST as torch reads it ("8.0;9.0+PTX"), else all that matter today as far as this nvcc knows them, with
# PTX of the newest for what comes after it.
set(RVSM_CUDA_FLAGS)
set(RVSM_ARCHITECTURES)
set(RVSM_WANTED)
if(DEFINED ENV{TORCH_CUDA_ARCH_LIST} AND NOT "$ENV{TORCH_CUDA_ARCH_LIST}" STREQUAL "")
  string(REGEX REPLACE "[ ,]+" ";" RVSM_LIST "$ENV{TORCH_CUDA_ARCH_LIST}")
  foreach(entry ${RVSM_LIST})
    if(NOT entry MATCHES "^([0-9]+)\\.([0-9][af]?)(\\+PTX)?$")
      message(FATAL_ERROR "TORCH_CUDA_ARCH_LIST: ${entry} is no architecture (8.0, 9.0a, 12.0+PTX …)")
    endif()
    list(APPEND RVSM_WANTED "${CMAKE_MATCH_1}${CMAKE_MATCH_2}${CMAKE_MATCH_3}")
  endforeach()
else()
  execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --list-gpu-arch OUTPUT_VARIABLE RVSM_KNOWN)
  foreach(arch 80 86 89 90 100 120)
    if(RVSM_KNOWN MATCHES "compute_${arch}[ \r\n]")
      list(APPEND RVSM_WANTED ${arch})
    endif()
  endforeach()
  list(POP_BACK RVSM_WANTED RVSM_NEWEST)
  list(APPEND RVSM_WANTED "${RVSM_NEWEST}+PTX")
endif()
foreach(entry ${RVSM_WANTED})
  string(REPLACE "+PTX" "" arch ${entry})
  list(APPEND RVSM_CUDA_FLAGS "SHELL:-gencode arch=compute_${arch},code=sm_${arch}")
  if(entry MATCHES "PTX")
    list(APPEND RVSM_CUDA_FLAGS "SHELL:-gencode arch=compute_${arch},code=compute_${arch}")
  endif()
endforeach()
string(REPLACE ";" " " RVSM_ARCHITECTURES "${RVSM_WANTED}")
message(STATUS "CUDA: nvcc ${CMAKE_CUDA_COMPILER_VERSION} for ${RVSM_ARCHITECTURES}")

# No --use_fast_math: it can flip a threshold. Divisions and square roots of float32 without their slow branch: 2 ulp,
# which no threshold sees, for a quarter fewer registers.
list(APPEND RVSM_CUDA_FLAGS --extended-lambda --expt-relaxed-constexpr -prec-div=false -prec-sqrt=false
     -Xfatbin=-compress-all)
