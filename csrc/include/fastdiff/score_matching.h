#pragma once
// LCSS and denoising losses: one element's terms and gradients, one sample's loss.

#include "fastdiff/macros.h"

namespace fastdiff::FASTDIFF_VARIANT {

template <class A>
FD_INLINE A lcss_value(A stein_sum, A square_sum, A sigma, A gamma, A weight) {
  return weight * (gamma / sigma * stein_sum + A(0.5) * square_sum);
}

template <class A>
FD_INLINE A lcss_score_gradient(A score, A noise, A noise_factor, A grad_times_weight) {
  return grad_times_weight * (noise_factor * noise + score);
}

}  // namespace fastdiff::FASTDIFF_VARIANT
