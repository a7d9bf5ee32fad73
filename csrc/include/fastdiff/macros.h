#pragma once

// The same mathematics is compiled for CUDA and, once per instruction set, for the CPU; each compilation has a namespace of its own,
// so that the linker cannot put one in the place of another.
#if defined(__CUDACC__)
#define FD_INLINE __host__ __device__ __forceinline__
#define FASTDIFF_VARIANT device
#else
#define FD_INLINE inline __attribute__((always_inline))
#if defined(FASTDIFF_AVX512)
#define FASTDIFF_VARIANT avx512
#elif defined(FASTDIFF_AVX2)
#define FASTDIFF_VARIANT avx2
#else
#define FASTDIFF_VARIANT baseline
#endif
#endif
