#include "cuda/common.h"
#include "cuda/normals.h"
#include "fastdiff/score_matching.h"

namespace fastdiff::FASTDIFF_VARIANT {
namespace {

template <class T>
struct Draw {
  static constexpr int group = kGroup<T>;
  Noise noise;
  T* out;
  int64_t elements;

  __device__ __forceinline__ void operator()(int64_t b, int64_t i, int count) const {
    Acc<T> z[group];
    noise.draw(b, i, z);
    store_group(out + b * elements + i, count, z);
  }
};

Tensor lcss_noise(const Tensor& x, const Tensor& seed, int64_t offset) {
  const OnDevice device(x);
  Tensor out = empty_as(x);
  const Samples samples(x);
  dispatch(x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    for_each_group("lcss_noise", device, samples, Draw<T>{Noise(seed, Stream::lcss, offset), write<T>(out), samples.elements});
  });
  return out;
}

template <class T>
struct Perturb {
  static constexpr int group = kGroup<T>;
  const T* x;
  PerSample<Acc<T>> sigma;
  Noise noise;
  T* out;
  int64_t elements;

  __device__ __forceinline__ void operator()(int64_t b, int64_t i, int count) const {
    const int64_t at = b * elements + i;
    const Acc<T> scale = sigma[b];
    Acc<T> clean[group], z[group];
    load_group(x + at, count, clean);
    noise.draw(b, i, z);
#pragma unroll
    for (int j = 0; j < group; ++j) z[j] = clean[j] + scale * z[j];
    store_group(out + at, count, z);
  }
};

Tensor lcss_perturb(const Tensor& x, const Tensor& sigma, const Tensor& seed, int64_t offset) {
  const OnDevice device(x);
  const Tensor input = dense(x);
  Tensor out = empty_as(x);
  const Samples samples(x);
  dispatch(x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    for_each_group("lcss_perturb", device, samples,
                   Perturb<T>{read<T>(input), PerSample<Acc<T>>(sigma), Noise(seed, Stream::lcss, offset), write<T>(out), samples.elements});
  });
  return out;
}

Tensor lcss_perturb_backward(const Tensor& grad, const Tensor&, const Tensor&, const Tensor&, int64_t, std::vector<bool>) {
  // A copy, since an op must not return its argument.
  return torch::stable::clone(dense(grad));
}

// Where the noise of a loss comes from.
template <class T>
struct Stored {
  const T* noise;
  int64_t elements;
  __device__ __forceinline__ void operator()(int64_t b, int64_t i, int count, Acc<T> (&z)[kGroup<T>]) const {
    load_group(noise + b * elements + i, count, z);
  }
};

template <class T>
struct Seeded {
  Noise noise;
  __device__ __forceinline__ void operator()(int64_t b, int64_t i, int, Acc<T> (&z)[kGroup<T>]) const { noise.draw(b, i, z); }
};

template <class A>
struct LcssConstants {
  PerSample<A> sigma, gamma, weight;
};

template <class T, class Source>
struct LcssTerms {
  using A = Acc<T>;
  static constexpr int sums = 2, group = kGroup<T>;
  const T* score;
  Source noise;
  int64_t elements;

  __device__ __forceinline__ void operator()(int64_t b, int64_t i, int count, A (&part)[2]) const {
    A s[group], z[group];
    load_group(score + b * elements + i, count, s);
    noise(b, i, count, z);
#pragma unroll
    for (int j = 0; j < group; ++j) {
      part[0] += s[j] * z[j];
      part[1] += s[j] * s[j];
    }
  }
};

template <class A>
struct LcssFinish {
  LcssConstants<A> constants;
  A* loss;

  __device__ __forceinline__ void operator()(int64_t b, const double (&sums)[2]) const {
    loss[b] = static_cast<A>(lcss_value<double>(sums[0], sums[1], constants.sigma[b], constants.gamma[b], constants.weight[b]));
  }
};

// make_source(Tag<T>{}, elements) gives the noise.
template <class F>
Tensor lcss_sums(
    const char* where, const Tensor& score, const Tensor& sigma, const Tensor& gamma, const Tensor& weight, F&& make_source) {
  const OnDevice device(score);
  const Tensor scores = dense(score);
  Tensor out = empty_batch(score);
  const int64_t elements = Samples(score).elements;
  dispatch(score.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    const auto source = make_source(tag, elements);
    const LcssConstants<A> constants{PerSample<A>(sigma), PerSample<A>(gamma), PerSample<A>(weight)};
    reduce_samples(where, device, score, LcssTerms<T, std::decay_t<decltype(source)>>{read<T>(scores), source, elements},
                   LcssFinish<A>{constants, write<A>(out)});
  });
  return out;
}

Tensor lcss_loss(const Tensor& score, const Tensor& noise, const Tensor& sigma, const Tensor& gamma, const Tensor& weight) {
  const Tensor noises = dense(noise);
  return lcss_sums("lcss_loss", score, sigma, gamma, weight, [&](auto tag, int64_t elements) {
    using T = typename decltype(tag)::type;
    return Stored<T>{read<T>(noises), elements};
  });
}

Tensor lcss_loss_seeded(
    const Tensor& score, const Tensor& seed, const Tensor& sigma, const Tensor& gamma, const Tensor& weight, int64_t offset) {
  const Noise noise(seed, Stream::lcss, offset);
  return lcss_sums("lcss_loss_seeded", score, sigma, gamma, weight, [&](auto tag, int64_t) {
    return Seeded<typename decltype(tag)::type>{noise};
  });
}

template <class T, class Source>
struct LcssGradients {
  using A = Acc<T>;
  static constexpr int group = kGroup<T>;
  const A* grad;
  const T* score;
  Source noise;
  LcssConstants<A> constants;
  T *to_score, *to_noise;  // null where not wanted
  int64_t elements;

  __device__ __forceinline__ void operator()(int64_t b, int64_t i, int count) const {
    const int64_t at = b * elements + i;
    const A factor = constants.gamma[b] / constants.sigma[b], scale = grad[b] * constants.weight[b];
    A s[group], z[group];
    load_group(score + at, count, s);
    if (to_score != nullptr) {
      noise(b, i, count, z);
#pragma unroll
      for (int j = 0; j < group; ++j) z[j] = lcss_score_gradient(s[j], z[j], factor, scale);
      store_group(to_score + at, count, z);
    }
    if (to_noise != nullptr) {
#pragma unroll
      for (int j = 0; j < group; ++j) z[j] = scale * factor * s[j];
      store_group(to_noise + at, count, z);
    }
  }
};

struct LcssCall {
  const char* where;
  const Tensor &grad, &score, &sigma, &gamma, &weight;
};

template <class F>
void lcss_gradients(const LcssCall& call, const Tensor* grad_score, const Tensor* grad_noise, F&& make_source) {
  const OnDevice device(call.score);
  const Tensor scores = dense(call.score), grads = dense(call.grad);
  const Samples samples(call.score);
  dispatch(call.score.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    const auto source = make_source(tag, samples.elements);
    const LcssConstants<A> constants{PerSample<A>(call.sigma), PerSample<A>(call.gamma), PerSample<A>(call.weight)};
    T* to_score = grad_score ? write<T>(*grad_score) : nullptr;
    T* to_noise = grad_noise ? write<T>(*grad_noise) : nullptr;
    using Gradients = LcssGradients<T, std::decay_t<decltype(source)>>;
    for_each_group(call.where, device, samples,
                   Gradients{read<A>(grads), read<T>(scores), source, constants, to_score, to_noise, samples.elements});
  });
}

std::tuple<Tensor, Tensor> lcss_loss_backward(
    const Tensor& grad, const Tensor& score, const Tensor& noise, const Tensor& sigma, const Tensor& gamma, const Tensor& weight,
    std::vector<bool> needs) {
  const Tensor noises = dense(noise);
  Tensor grad_score = needs[0] ? empty_as(score) : absent(score), grad_noise = needs[1] ? empty_as(noise) : absent(noise);
  lcss_gradients({"lcss_loss_backward", grad, score, sigma, gamma, weight}, needs[0] ? &grad_score : nullptr,
                 needs[1] ? &grad_noise : nullptr, [&](auto tag, int64_t elements) {
                   using T = typename decltype(tag)::type;
                   return Stored<T>{read<T>(noises), elements};
                 });
  return {grad_score, grad_noise};
}

Tensor lcss_loss_seeded_backward(
    const Tensor& grad, const Tensor& score, const Tensor& seed, const Tensor& sigma, const Tensor& gamma, const Tensor& weight,
    int64_t offset, std::vector<bool>) {
  const Noise noise(seed, Stream::lcss, offset);
  Tensor grad_score = empty_as(score);
  lcss_gradients({"lcss_loss_seeded_backward", grad, score, sigma, gamma, weight}, &grad_score, nullptr, [&](auto tag, int64_t) {
    return Seeded<typename decltype(tag)::type>{noise};
  });
  return grad_score;
}

template <class T>
struct SquaredErrors {
  using A = Acc<T>;
  static constexpr int sums = 1, group = kGroup<T>;
  const T *denoised, *clean;
  int64_t elements;

  __device__ __forceinline__ void operator()(int64_t b, int64_t i, int count, A (&part)[1]) const {
    A d[group], x[group];
    load_group(denoised + b * elements + i, count, d);
    load_group(clean + b * elements + i, count, x);
#pragma unroll
    for (int j = 0; j < group; ++j) part[0] += (d[j] - x[j]) * (d[j] - x[j]);
  }
};

template <class A>
struct Weighted {
  PerSample<A> weight;
  A* loss;
  __device__ __forceinline__ void operator()(int64_t b, const double (&sums)[1]) const { loss[b] = static_cast<A>(weight[b] * sums[0]); }
};

Tensor denoising_loss(const Tensor& denoised, const Tensor& clean, const Tensor& weight) {
  const OnDevice device(denoised);
  const Tensor left = dense(denoised), right = dense(clean);
  Tensor out = empty_batch(denoised);
  const int64_t elements = Samples(denoised).elements;
  dispatch(denoised.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    reduce_samples("denoising_loss", device, denoised, SquaredErrors<T>{read<T>(left), read<T>(right), elements},
                   Weighted<A>{PerSample<A>(weight), write<A>(out)});
  });
  return out;
}

template <class T>
struct DenoisingGradients {
  using A = Acc<T>;
  static constexpr int group = kGroup<T>;
  const A* grad;
  const T *denoised, *clean;
  PerSample<A> weight;
  T *to_denoised, *to_clean;  // null where not wanted
  int64_t elements;

  __device__ __forceinline__ void operator()(int64_t b, int64_t i, int count) const {
    const int64_t at = b * elements + i;
    const A factor = 2 * weight[b] * grad[b];
    A d[group], x[group];
    load_group(denoised + at, count, d);
    load_group(clean + at, count, x);
#pragma unroll
    for (int j = 0; j < group; ++j) d[j] = factor * (d[j] - x[j]);
    if (to_denoised != nullptr) store_group(to_denoised + at, count, d);
    if (to_clean == nullptr) return;
#pragma unroll
    for (int j = 0; j < group; ++j) d[j] = -d[j];
    store_group(to_clean + at, count, d);
  }
};

std::tuple<Tensor, Tensor> denoising_loss_backward(
    const Tensor& grad, const Tensor& denoised, const Tensor& clean, const Tensor& weight, std::vector<bool> needs) {
  const OnDevice device(denoised);
  const Tensor left = dense(denoised), right = dense(clean), grads = dense(grad);
  Tensor grad_denoised = needs[0] ? empty_as(denoised) : absent(denoised), grad_clean = needs[1] ? empty_as(clean) : absent(clean);
  const Samples samples(denoised);
  dispatch(denoised.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    T *to_denoised = needs[0] ? write<T>(grad_denoised) : nullptr, *to_clean = needs[1] ? write<T>(grad_clean) : nullptr;
    for_each_group("denoising_loss_backward", device, samples,
                   DenoisingGradients<T>{read<A>(grads), read<T>(left), read<T>(right), PerSample<A>(weight), to_denoised, to_clean,
                                         samples.elements});
  });
  return {grad_denoised, grad_clean};
}

}  // namespace
}  // namespace fastdiff::FASTDIFF_VARIANT

STABLE_TORCH_LIBRARY_IMPL(fastdiff_cuda, CUDA, m) {
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
