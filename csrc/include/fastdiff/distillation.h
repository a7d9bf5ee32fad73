#pragma once
// SIM and moment matching losses: one sample's factors from its sums, one element's gradients.

#include <cmath>

#include "fastdiff/macros.h"

namespace fastdiff::FASTDIFF_VARIANT {

// With y = fake - teacher and e = fake - sample: n = sqrt(|y|^2 + c^2), or n = 1. hypot, so that a small or large |y| is not lost.
FD_INLINE double sim_norm(double gap, double c, bool pseudo_huber) { return pseudo_huber ? std::hypot(gap, c) : 1.0; }

// <y, e> / n, minus which times the weight is the loss; 0 / 0 is 0.
FD_INLINE double sim_projection(double product, double gap, double c, bool pseudo_huber) {
  const double norm = sim_norm(gap, c, pseudo_huber);
  return norm == 0 ? 0.0 : product / norm;
}

// What a sample's gradients are made of: 1 / n and <y, e> / n^3.
struct SimFactors {
  double linear, radial;
};

// From |y| and <y, e> / n.
FD_INLINE SimFactors sim_factors(double gap, double projection, double c, bool pseudo_huber) {
  if (!pseudo_huber) return {1.0, 0.0};
  const double norm = sim_norm(gap, c, true);
  if (norm == 0) return {0.0, 0.0};
  return {1 / norm, projection / norm / norm};
}

// The gradients by both networks' outputs, with the factors times everything that is the same for a whole sample.
template <class A>
FD_INLINE A sim_teacher_gradient(A gap, A error, A linear, A radial) {
  return linear * error - radial * gap;
}

template <class A>
FD_INLINE A sim_fake_gradient(A gap, A error, A linear, A radial) {
  return radial * gap - linear * (gap + error);
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
