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

// x_next = kept x + replaced D, x_next - x = replaced (D - x).
template <class A>
struct StepCoefficients {
  A kept, replaced;
};

template <class A>
FD_INLINE StepCoefficients<A> step_coefficients(double sigma, double sigma_next) {
  return {static_cast<A>(sigma_next / sigma), static_cast<A>((sigma - sigma_next) / sigma)};
}

// From the nearer end, so that a step to sigma_next = 0 is exactly D, and a short one loses nothing of x.
template <class A>
FD_INLINE A step_value(A x, A denoised, const StepCoefficients<A>& c) {
  const bool from_x = c.kept > A(0.5);
  return (from_x ? x : denoised) + (from_x ? -c.replaced : c.kept) * (x - denoised);
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
