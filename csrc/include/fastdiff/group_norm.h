#pragma once
// Group normalisation: moments of parts put together, and what a group's gradient is made of.

#include "fastdiff/macros.h"

namespace fastdiff::FASTDIFF_VARIANT {

struct Moments {
  double count, mean, squares;  // squares: sum of squared deviations from the mean
};

// The moments of two parts together (Chan, Golub and LeVeque, 1983).
FD_INLINE Moments merged(Moments a, Moments b) {
  if (b.count == 0) return a;
  const double count = a.count + b.count, share = b.count / count, step = b.mean - a.mean;
  return {count, a.mean + step * share, a.squares + b.squares + step * step * a.count * share};
}

template <class A>
struct Standard {
  A mean, inverse;  // inverse: 1 / sqrt(variance + eps)
};

template <class A>
FD_INLINE Standard<A> standard(Moments m, double eps) {
  const double variance = m.count > 0 ? m.squares / m.count : 0;
  return {static_cast<A>(m.mean), static_cast<A>(1 / std::sqrt(variance + eps))};
}

// The terms of a group's gradient beside gain * grad_z: slope * (x - mean) + constant. sum: of grad_z times the affine gain; product: the
// same weighted by the normalised values.
template <class A>
struct GroupGradient {
  A slope, constant;
};

template <class A>
FD_INLINE GroupGradient<A> group_gradient(double sum, double product, double count, double inverse) {
  return {static_cast<A>(-product / count * inverse * inverse), static_cast<A>(-sum / count * inverse)};
}

}  // namespace fastdiff::FASTDIFF_VARIANT
