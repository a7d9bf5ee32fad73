#pragma once
// Softmax attention: the gradient of a logit.

#include "fastdiff/macros.h"

namespace fastdiff::FASTDIFF_VARIANT {

// expected: the row's sum of probability times grad_probability.
template <class A>
FD_INLINE A logit_gradient(A probability, A grad_probability, A expected) {
  return probability * (grad_probability - expected);
}

}  // namespace fastdiff::FASTDIFF_VARIANT
