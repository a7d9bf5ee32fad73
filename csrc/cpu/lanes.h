#pragma once
// Registers of the variant's width, for loops in which sums have to stay in registers: compilers keep arrays of these there, not arrays of
// numbers. To be included between variant_begin.h and variant_end.h, after cpu/common.h.

#include "cpu/common.h"

namespace fastdiff::FASTDIFF_VARIANT {

#if defined(FASTDIFF_AVX512)
constexpr int64_t kLaneBytes = 64;
#elif defined(FASTDIFF_AVX2)
constexpr int64_t kLaneBytes = 32;
#else
constexpr int64_t kLaneBytes = 16;
#endif

template <class A>
constexpr int64_t kLanes = kLaneBytes / int64_t{sizeof(A)};

template <class A>
struct LanesOf {
  typedef A type __attribute__((vector_size(kLaneBytes)));
};
template <class A>
using Lanes = typename LanesOf<A>::type;

template <class A>
FD_INLINE void load_lanes(const A* from, Lanes<A>& to) {
  memcpy(&to, from, kLaneBytes);
}

template <class A>
FD_INLINE void store_lanes(const Lanes<A>& from, A* to) {
  memcpy(to, &from, kLaneBytes);
}

template <class A>
FD_INLINE A sum_of_lanes(const Lanes<A>& lanes) {
  A total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < kLanes<A>; ++i) total += lanes[i];
  return total;
}

// The sum of term(x) over count numbers, the term taking lanes or one number; count at most a few thousand.
template <class A, class F>
FD_INLINE A sum_in_lanes(const A* x, int64_t count, F&& term) {
  constexpr int64_t width = kLanes<A>;
  Lanes<A> sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * width <= count; i += 4 * width) {
    for (int64_t k = 0; k < 4; ++k) {
      Lanes<A> v;
      load_lanes(x + i + k * width, v);
      sums[k] += term(v);
    }
  }
  for (; i + width <= count; i += width) {
    Lanes<A> v;
    load_lanes(x + i, v);
    sums[0] += term(v);
  }
  A total = sum_of_lanes<A>((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; i < count; ++i) total += term(x[i]);
  return total;
}

}  // namespace fastdiff::FASTDIFF_VARIANT
