#pragma once
// Softmax attention: one logit's probability and gradient.

#include "fastdiff/macros.h"
#include "fastdiff/math.h"

namespace fastdiff::FASTDIFF_VARIANT {

// Not yet divided by the row's sum. The row's largest logit is taken off, so that nothing overflows.
template <class A>
FD_INLINE A unnormalised_probability(A logit, A largest) {
  return exp(logit - largest);
}

// expected: the row's sum of probability times grad_probability.
template <class A>
FD_INLINE A logit_gradient(A probability, A grad_probability, A expected) {
  return probability * (grad_probability - expected);
}

}  // namespace fastdiff::FASTDIFF_VARIANT
