# rvsm_torch: the headers and libraries of the torch that Python imports.
#
# Not find_package(Torch): for a CUDA build of torch that one stops where nvcc is missing, and a build without nvcc must
# be complete for the CPU. torch's own Python knows its folders; its headers bring pybind11 along.
execute_process(
  COMMAND ${Python3_EXECUTABLE} -c
          "import torch, torch.utils.cpp_extension as e; \
print(';'.join(e.include_paths())); print(';'.join(e.library_paths())); print(int(torch.compiled_with_cxx11_abi()))"
  OUTPUT_VARIABLE RVSM_TORCH
  RESULT_VARIABLE RVSM_TORCH_RESULT
  OUTPUT_STRIP_TRAILING_WHITESPACE)
if(NOT RVSM_TORCH_RESULT EQUAL 0)
  message(FATAL_ERROR "${Python3_EXECUTABLE} cannot import torch; install it first (with pip: --no-build-isolation)")
endif()
string(REPLACE "\n" "|" RVSM_TORCH "${RVSM_TORCH}")
string(REGEX MATCH "^(.*)\\|(.*)\\|([01])$" _ "${RVSM_TORCH}")
set(RVSM_TORCH_INCLUDES "${CMAKE_MATCH_1}")
set(RVSM_TORCH_LIBRARY_DIRS "${CMAKE_MATCH_2}")
set(RVSM_TORCH_ABI "${CMAKE_MATCH_3}")

add_library(rvsm_torch INTERFACE)
target_include_directories(rvsm_torch SYSTEM INTERFACE ${RVSM_TORCH_INCLUDES})
target_compile_definitions(rvsm_torch INTERFACE _GLIBCXX_USE_CXX11_ABI=${RVSM_TORCH_ABI} TORCH_API_INCLUDE_EXTENSION_H)
foreach(library c10 torch torch_cpu torch_python)
  unset(RVSM_LIB_${library} CACHE) # with build isolation each build has its torch in another folder
  find_library(RVSM_LIB_${library} ${library} PATHS ${RVSM_TORCH_LIBRARY_DIRS} NO_DEFAULT_PATH REQUIRED)
  target_link_libraries(rvsm_torch INTERFACE ${RVSM_LIB_${library}})
endforeach()
