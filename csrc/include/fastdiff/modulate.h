#pragma once
// Normalisation of a row with scale and shift: one element of the result and of each gradient, given the row's statistics.

#include "fastdiff/macros.h"

namespace fastdiff::FASTDIFF_VARIANT {

// The RMS norm is the layer norm with a mean of zero.
template <class A>
struct RowStatistics {
  A mean, inverse_deviation;

  FD_INLINE A normalise(A x) const { return (x - mean) * inverse_deviation; }
};

// Means over the row of g and of g * normalised, for g = grad * factor: what the gradient loses to the norm's own degrees of freedom.
template <class A>
struct RowProjections {
  A constant, along;
};

template <class A>
FD_INLINE A modulated(A normal, A factor, A shift) {
  return normal * factor + shift;
}

template <class A>
FD_INLINE A norm_input_gradient(A grad, A normal, const RowStatistics<A>& row, const RowProjections<A>& projections) {
  return row.inverse_deviation * (grad - projections.constant - normal * projections.along);
}

}  // namespace fastdiff::FASTDIFF_VARIANT
