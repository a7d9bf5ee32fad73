#include "cpu/torch.h"

#include "fastdiff/variant_begin.h"

#include "cpu/common.h"
#include "fastdiff/distillation.h"

namespace fastdiff::FASTDIFF_VARIANT {
namespace {

struct SimArguments {
  Tensor fake, teacher, sample;
  const Tensor &weight, &c;
  bool pseudo_huber;
};

template <class T>
struct SimInputs {
  using A = Acc<T>;
  const T *fake, *teacher, *sample;

  explicit SimInputs(const SimArguments& arguments)
      : fake(read<T>(arguments.fake)), teacher(read<T>(arguments.teacher)), sample(read<T>(arguments.sample)) {}

  FD_INLINE A gap(int64_t i) const { return load(fake[i]) - load(teacher[i]); }
  FD_INLINE A error(int64_t i) const { return load(fake[i]) - load(sample[i]); }
};

// Calls finish(b, factors) for every sample; the same sums in the same order in forward and backward.
template <class T, class F>
void for_each_sim_sample(const SimArguments& arguments, F&& finish) {
  const SimInputs<T> inputs(arguments);
  const PerSample<Acc<T>> constants(arguments.c);
  const Samples samples(arguments.fake);
  const bool pseudo_huber = arguments.pseudo_huber;
  const auto chunk = [=](int64_t b, int64_t begin, int64_t end) {
    const int64_t first = b * samples.elements + begin, last = b * samples.elements + end;
    return std::array<double, 2>{
        pseudo_huber ? sum<Acc<T>>(first, last, [=](int64_t i) { return inputs.gap(i) * inputs.gap(i); }) : 0.0,
        sum<Acc<T>>(first, last, [=](int64_t i) { return inputs.gap(i) * inputs.error(i); }),
    };
  };
  reduce_samples<2>(samples, chunk, [&](int64_t b, const std::array<double, 2>& sums) {
    finish(b, sim_factors<double>(sums[0], sums[1], constants[b], pseudo_huber));
  });
}

Tensor sim_loss(const Tensor& fake, const Tensor& teacher, const Tensor& sample, const Tensor& weight, const Tensor& c, std::string distance) {
  const SimArguments arguments{dense(fake), dense(teacher), dense(sample), weight, c, distance == "pseudo_huber"};
  Tensor out = empty_batch(fake);
  dispatch(fake.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    A* loss = write<A>(out);
    const PerSample<A> weights(weight);
    for_each_sim_sample<T>(arguments, [=](int64_t b, const SimFactors<double>& factors) {
      loss[b] = static_cast<A>(-static_cast<double>(weights[b]) * factors.value);
    });
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> sim_loss_backward(
    const Tensor& grad, const Tensor& fake, const Tensor& teacher, const Tensor& sample, const Tensor& weight, const Tensor& c,
    std::string distance, std::vector<bool> needs) {
  const SimArguments arguments{dense(fake), dense(teacher), dense(sample), weight, c, distance == "pseudo_huber"};
  const Tensor grads = dense(grad);
  Tensor grad_fake = needs[0] ? empty_as(fake) : absent(fake);
  Tensor grad_teacher = needs[1] ? empty_as(teacher) : absent(fake);
  Tensor grad_sample = needs[2] ? empty_as(sample) : absent(fake);
  dispatch(fake.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    const Samples samples(fake);
    struct Factors {
      A scale, linear, radial;
    };
    std::vector<Factors> factors(samples.batch);
    const PerSample<A> weights(weight), upstream(grads);
    for_each_sim_sample<T>(arguments, [&](int64_t b, const SimFactors<double>& found) {
      factors[b] = {weights[b] * upstream[b], static_cast<A>(found.linear), static_cast<A>(found.radial)};
    });
    const SimInputs<T> inputs(arguments);
    T *to_fake = write<T>(grad_fake), *to_teacher = write<T>(grad_teacher), *to_sample = write<T>(grad_sample);
    for_each_chunk(samples, [&](int64_t b, int64_t begin, int64_t end) {
      const A scale = factors[b].scale, linear = factors[b].linear, radial = factors[b].radial;
      const int64_t first = b * samples.elements + begin, last = b * samples.elements + end;
      if (needs[0]) {
#pragma omp simd
        for (int64_t i = first; i < last; ++i) {
          to_fake[i] = store<T>(sim_fake_gradient<A>(inputs.gap(i), inputs.error(i), scale, linear, radial));
        }
      }
      if (needs[1]) {
#pragma omp simd
        for (int64_t i = first; i < last; ++i) {
          to_teacher[i] = store<T>(sim_teacher_gradient<A>(inputs.gap(i), inputs.error(i), scale, linear, radial));
        }
      }
      if (needs[2]) {
#pragma omp simd
        for (int64_t i = first; i < last; ++i) to_sample[i] = store<T>(sim_sample_gradient<A>(inputs.gap(i), scale, linear));
      }
    });
  });
  return {grad_fake, grad_teacher, grad_sample};
}

// The weighted sum over each sample of term(sample, auxiliary, teacher).
template <class Term>
Tensor weighted_sums(const Tensor& sample, const Tensor& auxiliary, const Tensor& teacher, const Tensor& weight, Term term) {
  const Tensor samples_in = dense(sample), auxiliaries = dense(auxiliary), teachers = dense(teacher);
  Tensor out = empty_batch(sample);
  dispatch(sample.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    const T *x = read<T>(samples_in), *a = read<T>(auxiliaries), *t = read<T>(teachers);
    A* loss = write<A>(out);
    const PerSample<A> weights(weight);
    const Samples samples(sample);
    const auto chunk = [=](int64_t b, int64_t begin, int64_t end) {
      const int64_t first = b * samples.elements;
      return std::array<double, 1>{sum<A>(first + begin, first + end, [=](int64_t i) { return term(load(x[i]), load(a[i]), load(t[i])); })};
    };
    reduce_samples<1>(samples, chunk, [&](int64_t b, const std::array<double, 1>& sums) { loss[b] = static_cast<A>(weights[b] * sums[0]); });
  });
  return out;
}

// factor * grad * weight * derivative(sample, auxiliary, teacher), element by element.
template <class Derivative>
Tensor weighted_gradient(
    const Tensor& grad, const Tensor& sample, const Tensor& auxiliary, const Tensor& teacher, const Tensor& weight, int factor, Derivative derivative) {
  const Tensor grads = dense(grad), samples_in = dense(sample), auxiliaries = dense(auxiliary), teachers = dense(teacher);
  Tensor out = empty_as(sample);
  dispatch(sample.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    const T *x = read<T>(samples_in), *a = read<T>(auxiliaries), *t = read<T>(teachers);
    T* y = write<T>(out);
    const PerSample<A> weights(weight), upstream(grads);
    const Samples samples(sample);
    for_each_chunk(samples, [&](int64_t b, int64_t begin, int64_t end) {
      const A scale = A(factor) * weights[b] * upstream[b];
      const int64_t first = b * samples.elements + begin, last = b * samples.elements + end;
#pragma omp simd
      for (int64_t i = first; i < last; ++i) y[i] = store<T>(scale * derivative(load(x[i]), load(a[i]), load(t[i])));
    });
  });
  return out;
}

Tensor moment_matching_loss(const Tensor& sample, const Tensor& auxiliary, const Tensor& teacher, const Tensor& weight) {
  return weighted_sums(sample, auxiliary, teacher, weight, [](auto x, auto a, auto t) { return x * (a - t); });
}

Tensor moment_matching_loss_backward(
    const Tensor& grad, const Tensor& sample, const Tensor& auxiliary, const Tensor& teacher, const Tensor& weight, std::vector<bool>) {
  return weighted_gradient(grad, sample, auxiliary, teacher, weight, 1, [](auto, auto a, auto t) { return a - t; });
}

Tensor moment_matching_auxiliary_loss(const Tensor& sample, const Tensor& auxiliary, const Tensor& teacher, const Tensor& weight) {
  return weighted_sums(sample, auxiliary, teacher, weight, [](auto x, auto a, auto t) { return auxiliary_term(x, a, t); });
}

Tensor moment_matching_auxiliary_loss_backward(
    const Tensor& grad, const Tensor& sample, const Tensor& auxiliary, const Tensor& teacher, const Tensor& weight, std::vector<bool>) {
  return weighted_gradient(grad, sample, auxiliary, teacher, weight, 2, [](auto x, auto a, auto t) { return auxiliary_gradient(x, a, t); });
}

}  // namespace
}  // namespace fastdiff::FASTDIFF_VARIANT

#include "fastdiff/variant_end.h"

FASTDIFF_CPU_KERNELS(m) {
  using namespace fastdiff::FASTDIFF_VARIANT;
  m.impl("sim_loss", TORCH_BOX(&sim_loss));
  m.impl("sim_loss_backward", TORCH_BOX(&sim_loss_backward));
  m.impl("moment_matching_loss", TORCH_BOX(&moment_matching_loss));
  m.impl("moment_matching_loss_backward", TORCH_BOX(&moment_matching_loss_backward));
  m.impl("moment_matching_auxiliary_loss", TORCH_BOX(&moment_matching_auxiliary_loss));
  m.impl("moment_matching_auxiliary_loss_backward", TORCH_BOX(&moment_matching_auxiliary_loss_backward));
}
