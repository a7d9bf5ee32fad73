#include "cpu/torch.h"

#include "fastdiff/variant_begin.h"

#include "cpu/normals.h"
#include "fastdiff/score_matching.h"

namespace fastdiff::FASTDIFF_VARIANT {
namespace {

Tensor lcss_noise(const Tensor& x, const Tensor& seed, int64_t offset) {
  Tensor out = empty_as(x);
  const Noise noise(seed, Stream::lcss, offset);
  dispatch(x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    T* y = write<T>(out);
    const Samples samples(x);
    for_each_chunk(samples, [&](int64_t b, int64_t begin, int64_t end) {
      with_noise(noise, b, begin, end, [&](int64_t i, int64_t stop, const float* z) {
        T* row = y + b * samples.elements + i;
        for (int64_t j = 0; j < stop - i; ++j) row[j] = store<T>(z[j]);
      });
    });
  });
  return out;
}

Tensor lcss_perturb(const Tensor& x, const Tensor& sigma, const Tensor& seed, int64_t offset) {
  const Tensor input = dense(x);
  Tensor out = empty_as(x);
  const Noise noise(seed, Stream::lcss, offset);
  dispatch(x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    const T* in = read<T>(input);
    T* y = write<T>(out);
    const PerSample<A> sigmas(sigma);
    const Samples samples(x);
    for_each_chunk(samples, [&](int64_t b, int64_t begin, int64_t end) {
      const A s = sigmas[b];
      with_noise(noise, b, begin, end, [&](int64_t i, int64_t stop, const float* z) {
        const int64_t at = b * samples.elements + i;
        for (int64_t j = 0; j < stop - i; ++j) y[at + j] = store<T>(load(in[at + j]) + s * A(z[j]));
      });
    });
  });
  return out;
}

Tensor lcss_perturb_backward(const Tensor& grad, const Tensor&, const Tensor&, const Tensor&, int64_t, std::vector<bool>) {
  // A copy, since an op must not return its argument.
  return torch::stable::clone(dense(grad));
}

struct LcssConstants {
  const Tensor &sigma, &gamma, &weight;
};

template <class T, class Body>
Tensor lcss_sums(const Tensor& score, const LcssConstants& constants, Body&& chunk_sums) {
  using A = Acc<T>;
  Tensor out = empty_batch(score);
  A* loss = write<A>(out);
  const PerSample<A> sigma(constants.sigma), gamma(constants.gamma), weight(constants.weight);
  reduce_samples<2>(Samples(score), chunk_sums, [&](int64_t b, const std::array<double, 2>& sums) {
    loss[b] = static_cast<A>(lcss_value<double>(sums[0], sums[1], sigma[b], gamma[b], weight[b]));
  });
  return out;
}

Tensor lcss_loss(const Tensor& score, const Tensor& noise, const Tensor& sigma, const Tensor& gamma, const Tensor& weight) {
  const Tensor scores = dense(score), noises = dense(noise);
  return dispatch(score.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    const T *s = read<T>(scores), *z = read<T>(noises);
    const int64_t elements = Samples(score).elements;
    return lcss_sums<T>(score, {sigma, gamma, weight}, [=](int64_t b, int64_t begin, int64_t end) {
      const T *row = s + b * elements, *noise_row = z + b * elements;
      return std::array<double, 2>{
          sum<A>(begin, end, [=](int64_t i) { return load(row[i]) * load(noise_row[i]); }),
          sum<A>(begin, end, [=](int64_t i) { return load(row[i]) * load(row[i]); }),
      };
    });
  });
}

Tensor lcss_loss_seeded(
    const Tensor& score, const Tensor& seed, const Tensor& sigma, const Tensor& gamma, const Tensor& weight, int64_t offset) {
  const Tensor scores = dense(score);
  const Noise noise(seed, Stream::lcss, offset);
  return dispatch(score.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    const T* s = read<T>(scores);
    const int64_t elements = Samples(score).elements;
    return lcss_sums<T>(score, {sigma, gamma, weight}, [=](int64_t b, int64_t begin, int64_t end) {
      std::array<double, 2> sums{};
      with_noise(noise, b, begin, end, [&](int64_t i, int64_t stop, const float* z) {
        const T* row = s + b * elements + i;
        sums[0] += sum<A>(0, stop - i, [=](int64_t j) { return load(row[j]) * A(z[j]); });
        sums[1] += sum<A>(0, stop - i, [=](int64_t j) { return load(row[j]) * load(row[j]); });
      });
      return sums;
    });
  });
}

// Both gradients of a sample's chunk, from what the noise is there.
template <class T>
struct LcssGradients {
  using A = Acc<T>;
  PerSample<A> grad, sigma, gamma, weight;

  LcssGradients(const Tensor& grad_loss, const LcssConstants& constants)
      : grad(grad_loss), sigma(constants.sigma), gamma(constants.gamma), weight(constants.weight) {}

  A noise_factor(int64_t b) const { return gamma[b] / sigma[b]; }
  A scale(int64_t b) const { return grad[b] * weight[b]; }
};

std::tuple<Tensor, Tensor> lcss_loss_backward(
    const Tensor& grad, const Tensor& score, const Tensor& noise, const Tensor& sigma, const Tensor& gamma, const Tensor& weight,
    std::vector<bool> needs) {
  const Tensor scores = dense(score), noises = dense(noise), grads = dense(grad);
  Tensor grad_score = needs[0] ? empty_as(score) : absent(score), grad_noise = needs[1] ? empty_as(noise) : absent(noise);
  dispatch(score.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    const T *s = read<T>(scores), *z = read<T>(noises);
    T *out_score = write<T>(grad_score), *out_noise = write<T>(grad_noise);
    const LcssGradients<T> gradients(grads, {sigma, gamma, weight});
    const Samples samples(score);
    for_each_chunk(samples, [&](int64_t b, int64_t begin, int64_t end) {
      const A factor = gradients.noise_factor(b), scale = gradients.scale(b);
      const int64_t first = b * samples.elements + begin, last = b * samples.elements + end;
      if (needs[0]) {
        for (int64_t i = first; i < last; ++i) out_score[i] = store<T>(lcss_score_gradient<A>(load(s[i]), load(z[i]), factor, scale));
      }
      if (needs[1]) {
        for (int64_t i = first; i < last; ++i) out_noise[i] = store<T>(scale * factor * load(s[i]));
      }
    });
  });
  return {grad_score, grad_noise};
}

Tensor lcss_loss_seeded_backward(
    const Tensor& grad, const Tensor& score, const Tensor& seed, const Tensor& sigma, const Tensor& gamma, const Tensor& weight,
    int64_t offset, std::vector<bool>) {
  const Tensor scores = dense(score), grads = dense(grad);
  const Noise noise(seed, Stream::lcss, offset);
  Tensor out = empty_as(score);
  dispatch(score.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    const T* s = read<T>(scores);
    T* y = write<T>(out);
    const LcssGradients<T> gradients(grads, {sigma, gamma, weight});
    const Samples samples(score);
    for_each_chunk(samples, [&](int64_t b, int64_t begin, int64_t end) {
      const A factor = gradients.noise_factor(b), scale = gradients.scale(b);
      with_noise(noise, b, begin, end, [&](int64_t i, int64_t stop, const float* z) {
        const int64_t at = b * samples.elements + i;
        for (int64_t j = 0; j < stop - i; ++j) y[at + j] = store<T>(lcss_score_gradient<A>(load(s[at + j]), A(z[j]), factor, scale));
      });
    });
  });
  return out;
}

Tensor denoising_loss(const Tensor& denoised, const Tensor& clean, const Tensor& weight) {
  const Tensor left = dense(denoised), right = dense(clean);
  Tensor out = empty_batch(denoised);
  dispatch(denoised.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    const T *d = read<T>(left), *x = read<T>(right);
    A* loss = write<A>(out);
    const PerSample<A> weights(weight);
    const Samples samples(denoised);
    const auto chunk = [=](int64_t b, int64_t begin, int64_t end) {
      const T *row = d + b * samples.elements, *clean_row = x + b * samples.elements;
      return std::array<double, 1>{sum<A>(begin, end, [=](int64_t i) {
        const A difference = load(row[i]) - load(clean_row[i]);
        return difference * difference;
      })};
    };
    reduce_samples<1>(samples, chunk, [&](int64_t b, const std::array<double, 1>& sums) { loss[b] = static_cast<A>(weights[b] * sums[0]); });
  });
  return out;
}

std::tuple<Tensor, Tensor> denoising_loss_backward(
    const Tensor& grad, const Tensor& denoised, const Tensor& clean, const Tensor& weight, std::vector<bool> needs) {
  const Tensor left = dense(denoised), right = dense(clean), grads = dense(grad);
  Tensor grad_denoised = needs[0] ? empty_as(denoised) : absent(denoised), grad_clean = needs[1] ? empty_as(clean) : absent(clean);
  dispatch(denoised.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    const T *d = read<T>(left), *x = read<T>(right);
    T *out_denoised = write<T>(grad_denoised), *out_clean = write<T>(grad_clean);
    const PerSample<A> weights(weight), upstream(grads);
    const Samples samples(denoised);
    for_each_chunk(samples, [&](int64_t b, int64_t begin, int64_t end) {
      const A factor = 2 * weights[b] * upstream[b];
      const int64_t first = b * samples.elements + begin, last = b * samples.elements + end;
      if (needs[0]) {
        for (int64_t i = first; i < last; ++i) out_denoised[i] = store<T>(factor * (load(d[i]) - load(x[i])));
      }
      if (needs[1]) {
        for (int64_t i = first; i < last; ++i) out_clean[i] = store<T>(factor * (load(x[i]) - load(d[i])));
      }
    });
  });
  return {grad_denoised, grad_clean};
}

}  // namespace
}  // namespace fastdiff::FASTDIFF_VARIANT

#include "fastdiff/variant_end.h"

FASTDIFF_CPU_KERNELS(m) {
  using namespace fastdiff::FASTDIFF_VARIANT;
  m.impl("lcss_noise", TORCH_BOX(&lcss_noise));
  m.impl("lcss_perturb", TORCH_BOX(&lcss_perturb));
  m.impl("lcss_perturb_backward", TORCH_BOX(&lcss_perturb_backward));
  m.impl("lcss_loss", TORCH_BOX(&lcss_loss));
  m.impl("lcss_loss_backward", TORCH_BOX(&lcss_loss_backward));
  m.impl("lcss_loss_seeded", TORCH_BOX(&lcss_loss_seeded));
  m.impl("lcss_loss_seeded_backward", TORCH_BOX(&lcss_loss_seeded_backward));
  m.impl("denoising_loss", TORCH_BOX(&denoising_loss));
  m.impl("denoising_loss_backward", TORCH_BOX(&denoising_loss_backward));
}
