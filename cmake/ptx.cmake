# The CUDA kernels without a GPU: csrc/tests/ptx runs the PTX that nvcc makes of them. Targets:
#
#   ptx          some cases, for one architecture
#   ptx-full     many cases, for every architecture that differs in what nvcc makes of the kernels
#   ptx-mutants  whether these cases see faults
if(NOT DEFINED RVSM_CUDA_FOUND)
  include(cmake/cuda.cmake)
endif()
if(NOT RVSM_CUDA_FOUND)
  foreach(target ptx ptx-full ptx-mutants)
    add_custom_target(${target} COMMAND ${CMAKE_COMMAND} -E echo
                      "${target}: nothing was run, because this build has no CUDA: ${RVSM_NO_CUDA}")
  endforeach()
  return()
endif()

# As the module is compiled, but to PTX and for one architecture.
set(RVSM_PTX_FLAGS ${RVSM_CUDA_FLAGS})
list(FILTER RVSM_PTX_FLAGS EXCLUDE REGEX gencode)
set(RVSM_PTX_ARCHITECTURES)
file(GLOB RVSM_KERNEL_SOURCES CONFIGURE_DEPENDS csrc/cuda/*.cu)
# The interpreter knows no atomic operations.
list(FILTER RVSM_KERNEL_SOURCES EXCLUDE REGEX "selection\\.cu$")
foreach(arch 90 120)
  if(NOT "compute_${arch}" IN_LIST RVSM_KNOWN)
    continue()
  endif()
  list(APPEND RVSM_PTX_ARCHITECTURES ${arch})
  add_library(rvsm_ptx_${arch} OBJECT EXCLUDE_FROM_ALL ${RVSM_KERNEL_SOURCES})
  set_target_properties(rvsm_ptx_${arch} PROPERTIES CUDA_PTX_COMPILATION ON CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED ON)
  target_compile_definitions(rvsm_ptx_${arch} PRIVATE RVSM_CUDA RVSM_ARCHITECTURES="${arch}")
  target_compile_options(rvsm_ptx_${arch} PRIVATE ${RVSM_PTX_FLAGS} -arch=compute_${arch})
endforeach()

# The CPU engine with its plainest kernels alone: they are compiled in a tenth of the time. `native` gives the
# interpreter an fma that is one instruction; what is contracted is still only what the interpreter says.
include(CheckCXXCompilerFlag)
check_cxx_compiler_flag(-march=native RVSM_HAS_NATIVE)
find_package(Threads REQUIRED)
file(GLOB RVSM_PTX_SOURCES CONFIGURE_DEPENDS csrc/tests/ptx/*.cpp)
add_executable(test_ptx EXCLUDE_FROM_ALL ${RVSM_PTX_SOURCES} csrc/cuda/launches.cpp csrc/cuda/measuring.cpp csrc/cuda/host_kernels.cpp
               csrc/cpu/engine.cpp csrc/cpu/elements.cpp csrc/cpu/norms.cpp
               csrc/cpu/magnitudes.cpp csrc/cpu/selection.cpp csrc/cpu/whole.cpp)
target_compile_definitions(test_ptx PRIVATE RVSM_ISA=base)
target_compile_options(test_ptx PRIVATE -O2 -Wall -Wextra -ffp-contract=off -fno-strict-aliasing
                       $<$<BOOL:${RVSM_HAS_NATIVE}>:-march=native>)
target_link_libraries(test_ptx PRIVATE Threads::Threads)

# A target that runs test_ptx on the PTX of these architectures, one after the other.
function(rvsm_add_ptx_run target architectures)
  set(commands)
  foreach(arch ${architectures})
    list(APPEND commands COMMAND test_ptx $<TARGET_OBJECTS:rvsm_ptx_${arch}> ${ARGN})
  endforeach()
  add_custom_target(${target} ${commands} COMMAND_EXPAND_LISTS USES_TERMINAL)
  foreach(arch ${architectures})
    add_dependencies(${target} rvsm_ptx_${arch})
  endforeach()
endfunction()

list(GET RVSM_PTX_ARCHITECTURES 0 RVSM_PTX_FIRST)
rvsm_add_ptx_run(ptx ${RVSM_PTX_FIRST} --cases 40)
rvsm_add_ptx_run(ptx-full "${RVSM_PTX_ARCHITECTURES}" --cases 450)
rvsm_add_ptx_run(ptx-mutants ${RVSM_PTX_FIRST} --cases 450 --mutants 80)
