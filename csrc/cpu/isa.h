// Names of what is compiled once per instruction set: kernels_avx2 where RVSM_ISA is avx2.
#pragma once

#define RVSM_CONCATENATE2(a, b) a##b
#define RVSM_CONCATENATE(a, b) RVSM_CONCATENATE2(a, b)
#define RVSM_STRING2(a) #a
#define RVSM_STRING(a) RVSM_STRING2(a)
#define RVSM_ELEMENT_KERNELS RVSM_CONCATENATE(element_kernels_, RVSM_ISA)
#define RVSM_NORM_KERNELS RVSM_CONCATENATE(norm_kernels_, RVSM_ISA)
#define RVSM_MAGNITUDE_KERNELS RVSM_CONCATENATE(magnitude_kernels_, RVSM_ISA)
#define RVSM_WHOLE_KERNELS RVSM_CONCATENATE(whole_kernels_, RVSM_ISA)
