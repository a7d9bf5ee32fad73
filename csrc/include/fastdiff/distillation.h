#pragma once
// SIM and moment matching losses: one sample's factors from its sums, one element's gradients.

#include <cmath>

#include "fastdiff/macros.h"

namespace fastdiff::FASTDIFF_VARIANT {

// Of one sample: the loss is -weight * value; the gradients are made of y = fake - teacher and e = fake - sample by the two factors.
template <class A>
struct SimFactors {
  A value;   // <y, e> / n
  A linear;  // 1 / n
  A radial;  // <y, e> / n^3
};

// From |y|^2 and <y, e>, for n = sqrt(|y|^2 + c^2) (0 / 0 being 0) or n = 1.
template <class A>
FD_INLINE SimFactors<A> sim_factors(A gap_squared, A product, A c, bool pseudo_huber) {
  if (!pseudo_huber) return {product, A(1), A(0)};
  const A squared = gap_squared + c * c;
  if (squared == 0) return {A(0), A(0), A(0)};
  const A linear = A(1) / std::sqrt(squared);
  return {product * linear, linear, product * linear / squared};
}

template <class A>
FD_INLINE A sim_sample_gradient(A gap, A scale, A linear) {
  return scale * (linear * gap);
}

template <class A>
FD_INLINE A sim_teacher_gradient(A gap, A error, A scale, A linear, A radial) {
  return scale * (linear * error - radial * gap);
}

template <class A>
FD_INLINE A sim_fake_gradient(A gap, A error, A scale, A linear, A radial) {
  return -scale * (linear * (gap + error) - radial * gap);
}

// Twice this times the weight is the gradient of |sample - auxiliary|^2 + |teacher - auxiliary|^2 in auxiliary.
template <class A>
FD_INLINE A auxiliary_gradient(A sample, A auxiliary, A teacher) {
  return (auxiliary - sample) + (auxiliary - teacher);
}

template <class A>
FD_INLINE A auxiliary_term(A sample, A auxiliary, A teacher) {
  const A to_sample = sample - auxiliary, to_teacher = teacher - auxiliary;
  return to_sample * to_sample + to_teacher * to_teacher;
}

}  // namespace fastdiff::FASTDIFF_VARIANT
