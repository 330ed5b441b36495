# RVSM_CUDA_FOUND, the language CUDA and RVSM_ARCHITECTURES, where nvcc is there. Where it is not, RVSM_NO_CUDA says why:
# the end of a sentence of missing_cuda() in native.py, without a semicolon, which would divide it.
#
# The variable RVSM_CUDA, or the environment variable of that name, asks for CUDA (1) or against it (0); without it nvcc
# decides. Whether this machine has a GPU is never asked.
if(NOT DEFINED RVSM_CUDA)
  string(STRIP "$ENV{RVSM_CUDA}" RVSM_CUDA)
endif()
string(TOUPPER "${RVSM_CUDA}" RVSM_ASKED)
if(NOT RVSM_ASKED MATCHES "^(|0|1|OFF|ON|NO|YES|FALSE|TRUE)$")
  message(FATAL_ERROR "RVSM_CUDA is \"${RVSM_CUDA}\"; it is 0, 1 or not set")
endif()
set(RVSM_CUDA_FOUND OFF)
if(NOT RVSM_ASKED STREQUAL "" AND NOT RVSM_ASKED)
  set(RVSM_NO_CUDA "it was told RVSM_CUDA=${RVSM_CUDA}")
  message(STATUS "CUDA: switched off (RVSM_CUDA=${RVSM_CUDA})")
  return()
endif()

# An nvcc that is not on PATH is looked for where toolkits are installed.
if(NOT CMAKE_CUDA_COMPILER)
  unset(CMAKE_CUDA_COMPILER CACHE) # what an earlier run did not find is looked for again
  if("$ENV{CUDACXX}" STREQUAL "")
    find_program(RVSM_NVCC nvcc PATHS ENV CUDA_HOME ENV CUDA_PATH /usr/local/cuda PATH_SUFFIXES bin)
    if(RVSM_NVCC)
      set(ENV{CUDACXX} "${RVSM_NVCC}")
    endif()
  endif()
endif()
# Set below, per target; CMake wants to hear of some when it tries the compiler.
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES OFF)
endif()
include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  if(RVSM_ASKED)
    message(FATAL_ERROR "RVSM_CUDA=${RVSM_CUDA}, but there is no nvcc that works; set CUDACXX or CUDA_HOME")
  endif()
  if("$ENV{CUDACXX}" STREQUAL "")
    set(RVSM_NO_CUDA "it found no nvcc")
    message(STATUS "CUDA: no nvcc; the build is for the CPU")
  else()
    set(RVSM_NO_CUDA "its nvcc could not compile a test")
    message(WARNING "CUDA: $ENV{CUDACXX} could not compile a test (CMake's log has its messages, under CMakeFiles); "
                    "the build is for the CPU. RVSM_CUDA=0 does so without a word, RVSM_CUDA=1 insists on CUDA")
  endif()
  return()
endif()
enable_language(CUDA)
# Tables of 32,764 bytes as kernel parameters.
if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.1)
  if(RVSM_ASKED)
    message(FATAL_ERROR "the CUDA engine needs nvcc 12.1 or newer; this is ${CMAKE_CUDA_COMPILER_VERSION}")
  endif()
  set(RVSM_NO_CUDA "its nvcc was ${CMAKE_CUDA_COMPILER_VERSION}, older than 12.1")
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
execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --list-gpu-arch OUTPUT_VARIABLE RVSM_KNOWN)
string(REGEX MATCHALL "compute_[0-9]+[af]?" RVSM_KNOWN "${RVSM_KNOWN}")
if(NOT RVSM_KNOWN)
  message(FATAL_ERROR "${CMAKE_CUDA_COMPILER} --list-gpu-arch lists nothing; is it nvcc? Set CUDACXX to nvcc")
endif()
string(REGEX REPLACE "[ ,;]+" ";" RVSM_LIST "$ENV{TORCH_CUDA_ARCH_LIST}")
foreach(entry ${RVSM_LIST})
  if(NOT entry MATCHES "^([0-9]+)\\.([0-9][af]?)(\\+PTX)?$")
    message(FATAL_ERROR "TORCH_CUDA_ARCH_LIST: ${entry} is no architecture (8.0, 9.0a, 12.0+PTX …)")
  endif()
  list(APPEND RVSM_WANTED "${CMAKE_MATCH_1}${CMAKE_MATCH_2}${CMAKE_MATCH_3}")
  string(REGEX REPLACE "[af]$" "" arch "${CMAKE_MATCH_1}${CMAKE_MATCH_2}")
  if(NOT "compute_${arch}" IN_LIST RVSM_KNOWN)
    list(JOIN RVSM_KNOWN " " known)
    message(FATAL_ERROR "TORCH_CUDA_ARCH_LIST: nvcc ${CMAKE_CUDA_COMPILER_VERSION} does not know ${entry}; "
                        "it knows ${known}")
  endif()
endforeach()
if(NOT RVSM_WANTED)
  foreach(arch 80 86 89 90 100 120)
    if("compute_${arch}" IN_LIST RVSM_KNOWN)
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
list(REMOVE_DUPLICATES RVSM_CUDA_FLAGS)
string(REPLACE ";" " " RVSM_ARCHITECTURES "${RVSM_WANTED}")
message(STATUS "CUDA: nvcc ${CMAKE_CUDA_COMPILER_VERSION} for ${RVSM_ARCHITECTURES}")

# No --use_fast_math: it can flip a threshold. Divisions and square roots of float32 without their slow branch: 2 ulp,
# which no threshold sees, for a quarter fewer registers.
# The architectures of a file are compiled two at a time: it is the longest of the build.
list(APPEND RVSM_CUDA_FLAGS --extended-lambda --expt-relaxed-constexpr -prec-div=false -prec-sqrt=false
     -Xfatbin=-compress-all --threads=2)
