#include "cpu/torch.h"

#include "fastdiff/variant_begin.h"

#include "cpu/normals.h"
#include "fastdiff/sampling.h"

namespace fastdiff::FASTDIFF_VARIANT {
namespace {

Tensor posterior_sample(
    const Tensor& denoised, const Tensor& noisy, const Tensor& sigma_s, const Tensor& sigma_t, const Tensor& seed, int64_t offset) {
  const Tensor left = dense(denoised), right = dense(noisy);
  Tensor out = empty_as(denoised);
  const Noise noise(seed, Stream::posterior, offset);
  dispatch(denoised.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    const T *d = read<T>(left), *x = read<T>(right);
    T* y = write<T>(out);
    const PerSample<A> lower(sigma_s), upper(sigma_t);
    const Samples samples(denoised);
    for_each_chunk(samples, [&](int64_t b, int64_t begin, int64_t end) {
      const auto c = posterior_coefficients<A>(lower[b], upper[b]);
      with_noise(noise, b, begin, end, [&](int64_t i, int64_t stop, const float* z) {
        const int64_t at = b * samples.elements + i;
#pragma omp simd
        for (int64_t j = 0; j < stop - i; ++j) {
          y[at + j] = store<T>(c.kept * load(x[at + j]) + c.forgotten * load(d[at + j]) + c.spread * A(z[j]));
        }
      });
    });
  });
  return out;
}

template <class T>
void write_scaled(const T* in, T* out, Acc<T> factor, int64_t first, int64_t last) {
#pragma omp simd
  for (int64_t i = first; i < last; ++i) out[i] = store<T>(factor * load(in[i]));
}

std::tuple<Tensor, Tensor> posterior_sample_backward(
    const Tensor& grad, const Tensor& denoised, const Tensor& noisy, const Tensor& sigma_s, const Tensor& sigma_t, const Tensor&, int64_t,
    std::vector<bool> needs) {
  const Tensor grads = dense(grad);
  Tensor grad_denoised = needs[0] ? empty_as(denoised) : absent(denoised), grad_noisy = needs[1] ? empty_as(noisy) : absent(noisy);
  dispatch(denoised.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    const T* g = read<T>(grads);
    T *to_denoised = write<T>(grad_denoised), *to_noisy = write<T>(grad_noisy);
    const PerSample<A> lower(sigma_s), upper(sigma_t);
    const Samples samples(denoised);
    for_each_chunk(samples, [&](int64_t b, int64_t begin, int64_t end) {
      const auto c = posterior_coefficients<A>(lower[b], upper[b]);
      const int64_t first = b * samples.elements + begin, last = b * samples.elements + end;
      if (needs[0]) write_scaled(g, to_denoised, c.forgotten, first, last);
      if (needs[1]) write_scaled(g, to_noisy, c.kept, first, last);
    });
  });
  return {grad_denoised, grad_noisy};
}

// D by element, with guidance or without.
template <class T>
struct Guided {
  const T *denoised, *uncond;
  Acc<T> guidance;
  FD_INLINE Acc<T> operator()(int64_t i) const { return guided(load(denoised[i]), load(uncond[i]), guidance); }
};

template <class T>
struct Unguided {
  const T* denoised;
  FD_INLINE Acc<T> operator()(int64_t i) const { return load(denoised[i]); }
};

// Calls body with Guided<T> or Unguided<T> for sample b.
template <class T, class F>
FD_INLINE auto with_guidance(const T* denoised, const T* uncond, Acc<T> guidance, F&& body) {
  return uncond == nullptr ? body(Unguided<T>{denoised}) : body(Guided<T>{denoised, uncond, guidance});
}

std::tuple<Tensor, Tensor> guided_step(
    const Tensor& x, const Tensor& denoised, const Tensor& sigma, const Tensor& sigma_next, std::optional<Tensor> uncond,
    const Tensor& guidance) {
  const Tensor latents = dense(x), predictions = dense(denoised), unconditional = uncond ? dense(*uncond) : predictions;
  Tensor next = empty_as(x), change = empty_batch(x);
  dispatch(x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    const T *in = read<T>(latents), *d = read<T>(predictions), *u = uncond ? read<T>(unconditional) : nullptr;
    T* y = write<T>(next);
    A* moved = write<A>(change);
    const PerSample<A> from(sigma), to(sigma_next), scale(guidance);
    const Samples samples(x);
    const auto chunk = [=](int64_t b, int64_t begin, int64_t end) {
      const auto c = step_coefficients<A>(from[b], to[b]);
      const int64_t first = b * samples.elements + begin, last = b * samples.elements + end;
      return with_guidance(d, u, scale[b], [=](auto guided_at) {
#pragma omp simd
        for (int64_t i = first; i < last; ++i) y[i] = store<T>(step_value<A>(load(in[i]), guided_at(i), c));
        return std::array<double, 1>{sum<A>(first, last, [=](int64_t i) { return std::abs(guided_at(i) - load(in[i])); })};
      });
    };
    reduce_samples<1>(samples, chunk, [&](int64_t b, const std::array<double, 1>& sums) {
      const double replaced = step_coefficients<double>(from[b], to[b]).replaced;
      moved[b] = static_cast<A>(std::abs(replaced) * sums[0] / static_cast<double>(samples.elements));
    });
  });
  return {next, change};
}

// What an element's gradients are made of: of x_next, and of the change per element towards D.
template <class T, class G>
struct StepGradient {
  using A = Acc<T>;
  const T *x, *grad;  // grad is null where nobody used x_next
  G guided_at;
  StepCoefficients<A> c;
  A per_element;

  FD_INLINE A next(int64_t i) const { return grad == nullptr ? A(0) : load(grad[i]); }
  FD_INLINE A towards(int64_t i) const { return per_element == 0 ? A(0) : per_element * sign(guided_at(i) - load(x[i])); }
  FD_INLINE A to_x(int64_t i) const { return c.kept * next(i) - towards(i); }
  FD_INLINE A to_guided(int64_t i) const { return c.replaced * next(i) + towards(i); }
};

template <class T, class F>
void write_if_wanted(T* out, int64_t first, int64_t last, F&& value) {
  if (out == nullptr) return;
#pragma omp simd
  for (int64_t i = first; i < last; ++i) out[i] = store<T>(value(i));
}

std::tuple<Tensor, Tensor, Tensor> guided_step_backward(
    std::optional<Tensor> grad_next, std::optional<Tensor> grad_change, const Tensor& x, const Tensor& denoised, const Tensor& sigma,
    const Tensor& sigma_next, std::optional<Tensor> uncond, const Tensor& guidance, std::vector<bool> needs) {
  const Tensor latents = dense(x), predictions = dense(denoised), unconditional = uncond ? dense(*uncond) : predictions;
  const Tensor grads = grad_next ? dense(*grad_next) : latents;
  Tensor grad_x = needs[0] ? empty_as(x) : absent(x);
  Tensor grad_denoised = needs[1] ? empty_as(denoised) : absent(x);
  Tensor grad_uncond = needs[2] ? empty_as(x) : absent(x);
  dispatch(x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    const T *in = read<T>(latents), *d = read<T>(predictions), *u = uncond ? read<T>(unconditional) : nullptr;
    const T* g = grad_next ? read<T>(grads) : nullptr;
    T* to_x = needs[0] ? write<T>(grad_x) : nullptr;
    T* to_denoised = needs[1] ? write<T>(grad_denoised) : nullptr;
    T* to_uncond = needs[2] ? write<T>(grad_uncond) : nullptr;
    const PerSample<A> from(sigma), to(sigma_next), scale(guidance), upstream(grad_change ? *grad_change : sigma);
    const Samples samples(x);
    for_each_chunk(samples, [&](int64_t b, int64_t begin, int64_t end) {
      const auto c = step_coefficients<A>(from[b], to[b]);
      const A per_element = grad_change ? upstream[b] * std::abs(c.replaced) / static_cast<A>(samples.elements) : A(0);
      const A of_denoised = u == nullptr ? A(1) : scale[b], of_uncond = A(1) - of_denoised;
      with_guidance(d, u, scale[b], [=](auto guided_at) {
        const StepGradient<T, decltype(guided_at)> gradient{in, g, guided_at, c, per_element};
        for_each_run(b * samples.elements + begin, b * samples.elements + end, [=](int64_t first, int64_t last) {
          write_if_wanted(to_x, first, last, [=](int64_t i) { return gradient.to_x(i); });
          write_if_wanted(to_denoised, first, last, [=](int64_t i) { return of_denoised * gradient.to_guided(i); });
          write_if_wanted(to_uncond, first, last, [=](int64_t i) { return of_uncond * gradient.to_guided(i); });
        });
        return 0;
      });
    });
  });
  return {grad_x, grad_denoised, grad_uncond};
}

}  // namespace
}  // namespace fastdiff::FASTDIFF_VARIANT

#include "fastdiff/variant_end.h"

FASTDIFF_CPU_KERNELS(m) {
  using namespace fastdiff::FASTDIFF_VARIANT;
  m.impl("posterior_sample", TORCH_BOX(&posterior_sample));
  m.impl("posterior_sample_backward", TORCH_BOX(&posterior_sample_backward));
  m.impl("guided_step", TORCH_BOX(&guided_step));
  m.impl("guided_step_backward", TORCH_BOX(&guided_step_backward));
}
