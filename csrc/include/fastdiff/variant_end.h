#if defined(FASTDIFF_AVX512) || defined(FASTDIFF_AVX2)
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
