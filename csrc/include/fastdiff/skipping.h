#pragma once
// The third-order criteria of AdaptiveDiffusion: one element's decision, one element's differences.

#include <cmath>

#include "fastdiff/macros.h"

namespace fastdiff::FASTDIFF_VARIANT {

FD_INLINE float magnitude(float x) { return fabsf(x); }
FD_INLINE double magnitude(double x) { return fabs(x); }

template <class A>
FD_INLINE bool third_order_skip_value(A d0, A d1, A d2, A threshold) {
  return magnitude((d0 + d2) * A(0.5) - d1) <= threshold * d1;
}

template <class A>
FD_INLINE A third_difference(A x0, A x1, A x2, A x3) {
  return magnitude((x3 - x0) - A(3) * (x2 - x1));
}

template <class A>
FD_INLINE A last_change(A x2, A x3) {
  return magnitude(x3 - x2);
}

}  // namespace fastdiff::FASTDIFF_VARIANT
