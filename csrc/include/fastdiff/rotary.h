#pragma once
// Query and key normalisation with rotary embedding: one pair's rotation, one run's factor.

#include "fastdiff/macros.h"
#include "fastdiff/math.h"

namespace fastdiff::FASTDIFF_VARIANT {

// By the angle; its own inverse with -sine.
template <class A>
FD_INLINE void rotate(A cosine, A sine, A& first, A& second) {
  const A turned = first * cosine - second * sine;
  second = first * sine + second * cosine;
  first = turned;
}

// What normalised values are x times: of the mean square, or of its root where eps is added to that ("pixel").
template <class A>
FD_INLINE A norm_factor(A mean_square, A eps, bool pixel) {
  return pixel ? A(1) / (eps + std::sqrt(mean_square)) : A(1) / std::sqrt(mean_square + eps);
}

// The gradient of x -> x factor is factor * grad - x * this, with projection the mean of grad * x.
template <class A>
FD_INLINE A norm_correction(A mean_square, A factor, A projection, bool pixel) {
  if (!pixel) return factor * factor * factor * projection;
  // At 0 the norm is differentiable and its second term vanishes.
  return mean_square > 0 ? factor * factor * projection / std::sqrt(mean_square) : A(0);
}

}  // namespace fastdiff::FASTDIFF_VARIANT
