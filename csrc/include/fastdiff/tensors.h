#pragma once
// dtypes and tensors as kernels on the CPU and on GPUs see them. To be included after torch's stable headers.

#include "fastdiff/macros.h"

namespace fastdiff::FASTDIFF_VARIANT {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
// float for everything narrower than double.
template <class T>
using Acc = typename Accumulator<T>::type;

template <class T>
struct Tag {
  using type = T;
};

// Calls body(Tag<T>{}) with the C++ type of a floating dtype.
template <class F>
auto dispatch(ScalarType dtype, F&& body) {
  switch (dtype) {
    case ScalarType::Float:
      return body(Tag<float>{});
    case ScalarType::Double:
      return body(Tag<double>{});
    case ScalarType::BFloat16:
      return body(Tag<BFloat16>{});
    case ScalarType::Half:
      return body(Tag<Half>{});
    default:
      STD_TORCH_CHECK(false, "fastdiff: dtypes are float32, bfloat16, float16 and float64");
  }
}

inline Tensor dense(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

inline Tensor empty_as(const Tensor& x) { return torch::stable::new_empty(x, x.sizes()); }

inline Tensor empty_batch(const Tensor& x) {
  const auto dtype = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const int64_t batch = x.size(0);
  return torch::stable::new_empty(x, {batch}, dtype);
}

// A gradient nobody asked for.
inline Tensor absent(const Tensor& x) {
  const int64_t none = 0;
  return torch::stable::new_empty(x, {none});
}

template <class T>
const T* read(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

template <class T>
T* write(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

}  // namespace fastdiff::FASTDIFF_VARIANT
