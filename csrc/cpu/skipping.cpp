#include "cpu/torch.h"

#include "fastdiff/variant_begin.h"

#include "cpu/common.h"
#include "fastdiff/skipping.h"

namespace fastdiff::FASTDIFF_VARIANT {
namespace {

// The kernels read one number of the accumulator's type.
inline void check_threshold(const Tensor& threshold, const Tensor& d0) {
  const bool wide = d0.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(threshold.numel() == 1 && threshold.scalar_type() == (wide ? ScalarType::Double : ScalarType::Float),
                  "fastdiff::third_order_skip: threshold must be one number, float64 for float64 changes and float32 for the others");
}

Tensor third_order_skip(const Tensor& d0, const Tensor& d1, const Tensor& d2, const Tensor& threshold) {
  check_threshold(threshold, d0);
  const Tensor oldest = dense(d0), middle = dense(d1), newest = dense(d2);
  Tensor out = torch::stable::new_empty(d0, d0.sizes(), ScalarType::Bool);
  dispatch(d0.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    const T *a = read<T>(oldest), *b = read<T>(middle), *c = read<T>(newest);
    bool* skip = write<bool>(out);
    const A bound = *read<A>(threshold);
    torch::stable::parallel_for(0, d0.numel(), kChunk, [=](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) skip[i] = third_order_skip_value<A>(load(a[i]), load(b[i]), load(c[i]), bound);
    });
  });
  return out;
}

std::tuple<Tensor, Tensor> third_order_difference(const Tensor& x0, const Tensor& x1, const Tensor& x2, const Tensor& x3) {
  const Tensor oldest = dense(x0), older = dense(x1), old = dense(x2), newest = dense(x3);
  Tensor third_means = empty_batch(x0), last_means = empty_batch(x0);
  dispatch(x0.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    const T *a = read<T>(oldest), *b = read<T>(older), *c = read<T>(old), *d = read<T>(newest);
    A *third = write<A>(third_means), *last = write<A>(last_means);
    const Samples samples(x0);
    const auto chunk = [=](int64_t sample, int64_t begin, int64_t end) {
      const int64_t row = sample * samples.elements;
      const T *a_row = a + row, *b_row = b + row, *c_row = c + row, *d_row = d + row;
      double third_sum = 0, last_sum = 0;
      // In double over runs that fit the registers, as `sum` does, but in one pass for both.
      constexpr int64_t run = 1024;
      for (int64_t i = begin; i < end; i += run) {
        const int64_t stop = i + run < end ? i + run : end;
        A third_part = 0, last_part = 0;
#pragma omp simd reduction(+ : third_part, last_part)
        for (int64_t j = i; j < stop; ++j) {
          const A x2_value = load(c_row[j]), x3_value = load(d_row[j]);
          third_part += third_difference<A>(load(a_row[j]), load(b_row[j]), x2_value, x3_value);
          last_part += last_change<A>(x2_value, x3_value);
        }
        third_sum += third_part;
        last_sum += last_part;
      }
      return std::array<double, 2>{third_sum, last_sum};
    };
    const double elements = static_cast<double>(samples.elements);
    reduce_samples<2>(samples, chunk, [&](int64_t sample, const std::array<double, 2>& sums) {
      third[sample] = static_cast<A>(sums[0] / elements);
      last[sample] = static_cast<A>(sums[1] / elements);
    });
  });
  return {third_means, last_means};
}

}  // namespace
}  // namespace fastdiff::FASTDIFF_VARIANT

#include "fastdiff/variant_end.h"

FASTDIFF_CPU_KERNELS(m) {
  using namespace fastdiff::FASTDIFF_VARIANT;
  m.impl("third_order_skip", TORCH_BOX(&third_order_skip));
  m.impl("third_order_difference", TORCH_BOX(&third_order_difference));
}
