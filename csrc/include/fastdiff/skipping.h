#pragma once
// The third-order criteria of AdaptiveDiffusion: one element's decision, one element's differences; and a trajectory's next decision.

#include <cmath>
#include <cstdint>

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

// Columns of the state of a trajectory, as reference/skipping.py names them.
enum StateColumn : int { kSteps, kRun, kReuse, kStored, kNewestAt, kOlderAt, kD0, kD1, kD2, kStateWidth };

enum class Criterion : int { none, official, tensor };

constexpr double kWarmUpSteps = 4;
// The authors' cap looks at their list of decisions only once it is longer than this.
constexpr double kCapFreeEntries = 4;

// How far beyond the older of two predictions `at` lies, in units of their distance; 0 where there are not two.
FD_INLINE double continuation(const double* state, double at) {
  return state[kStored] >= 2 ? (at - state[kOlderAt]) / (state[kNewestAt] - state[kOlderAt]) : 0;
}

// A noise prediction made at `at` has taken the place of the newest.
FD_INLINE void note_prediction(double* state, double at) {
  state[kOlderAt] = state[kNewestAt];
  state[kNewestAt] = at;
  state[kStored] = state[kStored] < 2 ? state[kStored] + 1 : 2;
}

// Whether the step after the one that moved by `last` reuses; `third` is NaN until four latents exist, and any NaN means no.
FD_INLINE void decide(double* state, Criterion criterion, double third, double last, double threshold, double max_skip) {
  if (criterion == Criterion::none) return;
  state[kSteps] += 1;
  state[kD0] = state[kD1];
  state[kD1] = state[kD2];
  state[kD2] = last;
  bool reuse = false;
  if (criterion == Criterion::official) {
    const double entries = state[kSteps] - kWarmUpSteps;
    const double cap = max_skip < entries ? max_skip : entries;
    reuse = entries >= 0 && third_order_skip_value(state[kD0], state[kD1], state[kD2], threshold) &&
            (entries <= kCapFreeEntries || state[kRun] < cap);
  } else {
    reuse = third <= threshold * last && state[kRun] < max_skip;
  }
  state[kReuse] = reuse;
  state[kRun] = reuse ? state[kRun] + 1 : 0;
}

// The scalars of one step, in the accumulator's type.
template <class A>
struct StepScalars {
  A sigma, guidance, replaced, kept, weight, second, noise_factor, scale_next, scale_change, scale, scale1, scale0;
  bool from_x;
};

template <class A>
FD_INLINE StepScalars<A> step_scalars(
    double sigma, double sigma_next, double guidance, double weight, bool has_point, const double* scales) {
  const double kept = sigma_next / sigma;
  return {A(sigma),
          A(guidance),
          A((sigma - sigma_next) / sigma),
          A(kept),
          A(weight),
          A(0.5 * (sigma_next - sigma) / sigma_next),
          A(1 / (has_point ? sigma_next : sigma)),
          A(scales[0]),
          A(scales[0] - scales[1]),
          A(scales[1]),
          A(scales[2]),
          A(scales[3]),
          kept > 0.5};
}

}  // namespace fastdiff::FASTDIFF_VARIANT
