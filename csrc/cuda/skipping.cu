#include "cuda/common.h"
#include "fastdiff/skipping.h"

namespace fastdiff::FASTDIFF_VARIANT {
namespace {

// The kernels read one number of the accumulator's type.
inline void check_threshold(const Tensor& threshold, const Tensor& d0) {
  const bool wide = d0.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(threshold.numel() == 1 && threshold.scalar_type() == (wide ? ScalarType::Double : ScalarType::Float),
                  "fastdiff::third_order_skip: threshold must be one number, float64 for float64 changes and float32 for the others");
}

template <class T>
struct Decide {
  static constexpr int group = kGroup<T>;
  const T *d0, *d1, *d2;
  const Acc<T>* threshold;
  bool* out;

  __device__ __forceinline__ void operator()(int64_t, int64_t i, int count) const {
    Acc<T> a[group], b[group], c[group];
    load_group(d0 + i, count, a);
    load_group(d1 + i, count, b);
    load_group(d2 + i, count, c);
    const Acc<T> bound = *threshold;
#pragma unroll
    for (int j = 0; j < group; ++j) {
      if (j < count) out[i + j] = third_order_skip_value(a[j], b[j], c[j], bound);
    }
  }
};

Tensor third_order_skip(const Tensor& d0, const Tensor& d1, const Tensor& d2, const Tensor& threshold) {
  check_threshold(threshold, d0);
  const OnDevice device(d0);
  const Tensor oldest = dense(d0), middle = dense(d1), newest = dense(d2);
  Tensor out = torch::stable::new_empty(d0, d0.sizes(), ScalarType::Bool);
  // The decision knows no samples: all elements are one.
  Samples elements(1, d0.numel());
  dispatch(d0.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    for_each_group("third_order_skip", device, elements,
                   Decide<T>{read<T>(oldest), read<T>(middle), read<T>(newest), read<Acc<T>>(threshold), write<bool>(out)});
  });
  return out;
}

template <class T>
struct Differences {
  using A = Acc<T>;
  static constexpr int sums = 2, group = kGroup<T>;
  const T *x0, *x1, *x2, *x3;
  int64_t elements;

  __device__ __forceinline__ void operator()(int64_t b, int64_t i, int count, A (&part)[2]) const {
    const int64_t at = b * elements + i;
    A a[group], b1[group], c[group], d[group];
    load_group(x0 + at, count, a);
    load_group(x1 + at, count, b1);
    load_group(x2 + at, count, c);
    load_group(x3 + at, count, d);
#pragma unroll
    for (int j = 0; j < group; ++j) {
      part[0] += third_difference(a[j], b1[j], c[j], d[j]);
      part[1] += last_change(c[j], d[j]);
    }
  }
};

template <class A>
struct Means {
  A *third, *last;
  int64_t elements;

  __device__ __forceinline__ void operator()(int64_t b, const double (&sums)[2]) const {
    third[b] = static_cast<A>(sums[0] / static_cast<double>(elements));
    last[b] = static_cast<A>(sums[1] / static_cast<double>(elements));
  }
};

std::tuple<Tensor, Tensor> third_order_difference(const Tensor& x0, const Tensor& x1, const Tensor& x2, const Tensor& x3) {
  const OnDevice device(x0);
  const Tensor a = dense(x0), b = dense(x1), c = dense(x2), d = dense(x3);
  Tensor third = empty_batch(x0), last = empty_batch(x0);
  const int64_t elements = Samples(x0).elements;
  dispatch(x0.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    reduce_samples("third_order_difference", device, x0, Differences<T>{read<T>(a), read<T>(b), read<T>(c), read<T>(d), elements},
                   Means<A>{write<A>(third), write<A>(last), elements});
  });
  return {third, last};
}

}  // namespace
}  // namespace fastdiff::FASTDIFF_VARIANT

STABLE_TORCH_LIBRARY_IMPL(fastdiff_cuda, CUDA, m) {
  using namespace fastdiff::FASTDIFF_VARIANT;
  m.impl("third_order_skip", TORCH_BOX(&third_order_skip));
  m.impl("third_order_difference", TORCH_BOX(&third_order_difference));
}
