#pragma once
// Sampling steps: one sample's coefficients, one element's arithmetic.

#include <cmath>

#include "fastdiff/macros.h"

namespace fastdiff::FASTDIFF_VARIANT {

// z_s = kept z_t + forgotten denoised + spread noise.
template <class A>
struct PosteriorCoefficients {
  A kept, forgotten, spread;
};

// In double: 1 - (sigma_s / sigma_t)^2 would cancel for close levels, its factored form does not.
template <class A>
FD_INLINE PosteriorCoefficients<A> posterior_coefficients(double sigma_s, double sigma_t) {
  const double ratio = sigma_s / sigma_t;
  const double forgotten = (sigma_t - sigma_s) * (sigma_t + sigma_s) / (sigma_t * sigma_t);
  return {static_cast<A>(ratio * ratio), static_cast<A>(forgotten), static_cast<A>(sigma_s * std::sqrt(forgotten))};
}

// x_next = kept x + replaced D: exactly D at sigma_next = 0, where adding a change to a large x would lose D's last digits.
template <class A>
struct StepCoefficients {
  A kept, replaced;
};

template <class A>
FD_INLINE StepCoefficients<A> step_coefficients(A sigma, A sigma_next) {
  return {sigma_next / sigma, (sigma - sigma_next) / sigma};
}

template <class A>
FD_INLINE A guided(A denoised, A uncond, A guidance) {
  return uncond + guidance * (denoised - uncond);
}

template <class A>
FD_INLINE A sign(A x) {
  return x > 0 ? A(1) : (x < 0 ? A(-1) : x);  // NaN stays NaN
}

}  // namespace fastdiff::FASTDIFF_VARIANT
