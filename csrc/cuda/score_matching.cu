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

// What a score, or a score and its mirrored one, are summed and differentiated with.
template <class T, bool Pair>
struct LcssOperands {
  using A = Acc<T>;
  static constexpr bool pair = Pair;
  const T *score, *mirrored;  // mirrored is null for a score alone
  PerSample<A> sigma, gamma, weight;
  T *to_score, *to_noise, *to_mirrored;  // null where not wanted

  __device__ __forceinline__ A noise_factor(int64_t b) const { return gamma[b] / sigma[b]; }
  // Each half of a pair weighs half.
  __device__ __forceinline__ A own_weight(int64_t b) const { return Pair ? A(0.5) * weight[b] : weight[b]; }

  // Writes the gradients of a group of elements that begins at `at`; m is not looked at for a score alone.
  __device__ __forceinline__ void write(
      int64_t at, int count, const A (&s)[kGroup<T>], const A (&m)[kGroup<T>], const A (&z)[kGroup<T>], A factor, A scale) const {
    A out[kGroup<T>];
    if (to_score != nullptr) {
#pragma unroll
      for (int j = 0; j < kGroup<T>; ++j) out[j] = lcss_score_gradient(s[j], z[j], factor, scale);
      store_group(to_score + at, count, out);
    }
    if (to_noise != nullptr) {
#pragma unroll
      for (int j = 0; j < kGroup<T>; ++j) out[j] = scale * factor * (Pair ? s[j] - m[j] : s[j]);
      store_group(to_noise + at, count, out);
    }
    if (Pair && to_mirrored != nullptr) {
#pragma unroll
      for (int j = 0; j < kGroup<T>; ++j) out[j] = lcss_score_gradient(m[j], z[j], -factor, scale);
      store_group(to_mirrored + at, count, out);
    }
  }

  __device__ __forceinline__ void load(int64_t at, int count, A (&s)[kGroup<T>], A (&m)[kGroup<T>]) const {
    load_group(score + at, count, s);
    if constexpr (Pair) load_group(mirrored + at, count, m);
  }
};

template <class T, class Source, bool Pair>
struct LcssTerms {
  using A = Acc<T>;
  static constexpr int sums = 2, group = kGroup<T>;
  LcssOperands<T, Pair> operands;
  Source noise;
  int64_t elements;
  A factor = 0, scale = 0;

  // The division once for a block; inside the loop, its slow path costs registers.
  __device__ __forceinline__ void begin(int64_t b) {
    factor = operands.noise_factor(b);
    scale = operands.own_weight(b);
  }

  // Where gradients are wanted, they are those for an upstream gradient of 1.
  __device__ __forceinline__ void operator()(int64_t b, int64_t i, int count, A (&part)[2]) const {
    A s[group], m[group], z[group];
    operands.load(b * elements + i, count, s, m);
    noise(b, i, count, z);
#pragma unroll
    for (int j = 0; j < group; ++j) {
      part[0] += (Pair ? s[j] - m[j] : s[j]) * z[j];
      part[1] += Pair ? s[j] * s[j] + m[j] * m[j] : s[j] * s[j];
    }
    operands.write(b * elements + i, count, s, m, z, factor, scale);
  }
};

template <class T, bool Pair>
struct LcssFinish {
  LcssOperands<T, Pair> operands;
  Acc<T>* loss;

  __device__ __forceinline__ void operator()(int64_t b, const double (&sums)[2]) const {
    loss[b] = static_cast<Acc<T>>(
        lcss_value<double>(sums[0], sums[1], operands.sigma[b], operands.gamma[b], operands.own_weight(b)));
  }
};

template <class T, class Source, bool Pair>
struct LcssGradients {
  using A = Acc<T>;
  static constexpr int group = kGroup<T>;
  const A* grad;
  LcssOperands<T, Pair> operands;
  Source noise;
  int64_t elements;

  __device__ __forceinline__ void operator()(int64_t b, int64_t i, int count) const {
    A s[group], m[group], z[group];
    operands.load(b * elements + i, count, s, m);
    noise(b, i, count, z);
    operands.write(b * elements + i, count, s, m, z, operands.noise_factor(b), grad[b] * operands.own_weight(b));
  }
};

// Makes the noise of a call: of a contiguous tensor, or of a seed.
auto stored(const Tensor& noise) {
  return [&noise](auto tag) {
    using T = typename decltype(tag)::type;
    return Stored<T>{read<T>(noise), Samples(noise).elements};
  };
}

auto seeded(const Tensor& seed, int64_t offset) {
  return [noise = Noise(seed, Stream::lcss, offset)](auto tag) { return Seeded<typename decltype(tag)::type>{noise}; };
}

// One call of the loss; its gradients are allocated where they are wanted.
class LcssCall {
 public:
  LcssCall(
      const char* where, const Tensor& score, const std::optional<Tensor>& mirrored, const Tensor& sigma, const Tensor& gamma,
      const Tensor& weight, bool to_score = false, bool to_noise = false, bool to_mirrored = false)
      : grad_score(to_score ? empty_as(score) : absent(score)),
        grad_noise(to_noise ? empty_as(score) : absent(score)),
        grad_mirrored(to_mirrored ? empty_as(score) : absent(score)),
        where_(where),
        score_(dense(score)),
        sigma_(sigma),
        gamma_(gamma),
        weight_(weight) {
    if (mirrored) mirrored_ = dense(*mirrored);
  }

  template <class MakeSource>
  Tensor loss(MakeSource&& make_source) const {
    const OnDevice device(score_);
    const Tensor out = empty_batch(score_);
    dispatch(score_.scalar_type(), [&, this](auto tag) {
      using T = typename decltype(tag)::type;
      const auto source = make_source(tag);
      with_operands<T>([&, this](const auto& operands) {
        constexpr bool Pair = std::decay_t<decltype(operands)>::pair;
        using Terms = LcssTerms<T, std::decay_t<decltype(source)>, Pair>;
        reduce_samples(where_, device, score_, Terms{operands, source, Samples(score_).elements},
                       LcssFinish<T, Pair>{operands, write<Acc<T>>(out)});
      });
    });
    return out;
  }

  template <class MakeSource>
  void backward(const Tensor& grad, MakeSource&& make_source) const {
    const OnDevice device(score_);
    const Tensor grads = dense(grad);
    const Samples samples(score_);
    dispatch(score_.scalar_type(), [&, this](auto tag) {
      using T = typename decltype(tag)::type;
      const auto source = make_source(tag);
      with_operands<T>([&, this](const auto& operands) {
        using Gradients = LcssGradients<T, std::decay_t<decltype(source)>, std::decay_t<decltype(operands)>::pair>;
        for_each_group(where_, device, samples, Gradients{read<Acc<T>>(grads), operands, source, samples.elements});
      });
    });
  }

  Tensor grad_score, grad_noise, grad_mirrored;

 private:
  template <class T>
  static T* target(const Tensor& x) {
    return x.numel() == 0 ? nullptr : write<T>(x);
  }

  // Calls body with the LcssOperands of a score alone or of a pair.
  template <class T, class F>
  void with_operands(F&& body) const {
    mirrored_ ? body(bind<T, true>()) : body(bind<T, false>());
  }

  template <class T, bool Pair>
  LcssOperands<T, Pair> bind() const {
    using A = Acc<T>;
    return {read<T>(score_),
            Pair ? read<T>(*mirrored_) : nullptr,
            PerSample<A>(sigma_),
            PerSample<A>(gamma_),
            PerSample<A>(weight_),
            target<T>(grad_score),
            target<T>(grad_noise),
            target<T>(grad_mirrored)};
  }

  const char* where_;
  Tensor score_;
  std::optional<Tensor> mirrored_;
  const Tensor &sigma_, &gamma_, &weight_;
};

Tensor lcss_loss(
    const Tensor& score, const Tensor& noise, std::optional<Tensor> mirrored, const Tensor& sigma, const Tensor& gamma,
    const Tensor& weight) {
  const Tensor noises = dense(noise);
  return LcssCall("lcss_loss", score, mirrored, sigma, gamma, weight).loss(stored(noises));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> lcss_loss_recorded(
    const Tensor& score, const Tensor& noise, std::optional<Tensor> mirrored, const Tensor& sigma, const Tensor& gamma,
    const Tensor& weight, std::vector<bool> needs) {
  const Tensor noises = dense(noise);
  const LcssCall call("lcss_loss_recorded", score, mirrored, sigma, gamma, weight, needs[0], needs[1], needs[2]);
  const Tensor loss = call.loss(stored(noises));
  return {loss, call.grad_score, call.grad_noise, call.grad_mirrored};
}

std::tuple<Tensor, Tensor, Tensor> lcss_loss_backward(
    const Tensor& grad, const Tensor& score, const Tensor& noise, std::optional<Tensor> mirrored, const Tensor& sigma,
    const Tensor& gamma, const Tensor& weight, std::vector<bool> needs) {
  const Tensor noises = dense(noise);
  const LcssCall call("lcss_loss_backward", score, mirrored, sigma, gamma, weight, needs[0], needs[1], needs[2]);
  call.backward(grad, stored(noises));
  return {call.grad_score, call.grad_noise, call.grad_mirrored};
}

Tensor lcss_loss_seeded(
    const Tensor& score, const Tensor& seed, std::optional<Tensor> mirrored, const Tensor& sigma, const Tensor& gamma,
    const Tensor& weight, int64_t offset) {
  return LcssCall("lcss_loss_seeded", score, mirrored, sigma, gamma, weight).loss(seeded(seed, offset));
}

std::tuple<Tensor, Tensor, Tensor> lcss_loss_seeded_recorded(
    const Tensor& score, const Tensor& seed, std::optional<Tensor> mirrored, const Tensor& sigma, const Tensor& gamma,
    const Tensor& weight, int64_t offset, std::vector<bool> needs) {
  const LcssCall call("lcss_loss_seeded_recorded", score, mirrored, sigma, gamma, weight, needs[0], false, needs[1]);
  const Tensor loss = call.loss(seeded(seed, offset));
  return {loss, call.grad_score, call.grad_mirrored};
}

std::tuple<Tensor, Tensor> lcss_loss_seeded_backward(
    const Tensor& grad, const Tensor& score, const Tensor& seed, std::optional<Tensor> mirrored, const Tensor& sigma,
    const Tensor& gamma, const Tensor& weight, int64_t offset, std::vector<bool> needs) {
  const LcssCall call("lcss_loss_seeded_backward", score, mirrored, sigma, gamma, weight, needs[0], false, needs[1]);
  call.backward(grad, seeded(seed, offset));
  return {call.grad_score, call.grad_mirrored};
}

template <class T>
struct DenoisingOperands {
  using A = Acc<T>;
  const T *denoised, *clean;
  T *to_denoised, *to_clean;  // null where not wanted

  __device__ __forceinline__ void differences(int64_t at, int count, A (&d)[kGroup<T>]) const {
    A x[kGroup<T>];
    load_group(denoised + at, count, d);
    load_group(clean + at, count, x);
#pragma unroll
    for (int j = 0; j < kGroup<T>; ++j) d[j] -= x[j];
  }

  __device__ __forceinline__ void write(int64_t at, int count, const A (&d)[kGroup<T>], A factor) const {
    A out[kGroup<T>];
#pragma unroll
    for (int j = 0; j < kGroup<T>; ++j) out[j] = factor * d[j];
    if (to_denoised != nullptr) store_group(to_denoised + at, count, out);
    if (to_clean == nullptr) return;
#pragma unroll
    for (int j = 0; j < kGroup<T>; ++j) out[j] = -out[j];
    store_group(to_clean + at, count, out);
  }
};

template <class T>
struct SquaredErrors {
  using A = Acc<T>;
  static constexpr int sums = 1, group = kGroup<T>;
  DenoisingOperands<T> operands;
  PerSample<A> weight;
  int64_t elements;

  // Where gradients are wanted, they are those for an upstream gradient of 1.
  __device__ __forceinline__ void operator()(int64_t b, int64_t i, int count, A (&part)[1]) const {
    A d[group];
    operands.differences(b * elements + i, count, d);
#pragma unroll
    for (int j = 0; j < group; ++j) part[0] += d[j] * d[j];
    operands.write(b * elements + i, count, d, 2 * weight[b]);
  }
};

template <class A>
struct Weighted {
  PerSample<A> weight;
  A* loss;
  __device__ __forceinline__ void operator()(int64_t b, const double (&sums)[1]) const { loss[b] = static_cast<A>(weight[b] * sums[0]); }
};

struct DenoisingGradients {
  Tensor denoised, clean;
  DenoisingGradients(const Tensor& like, bool to_denoised, bool to_clean)
      : denoised(to_denoised ? empty_as(like) : absent(like)), clean(to_clean ? empty_as(like) : absent(like)) {}

  template <class T>
  DenoisingOperands<T> bind(const Tensor& left, const Tensor& right) const {
    return {read<T>(left), read<T>(right), denoised.numel() ? write<T>(denoised) : nullptr, clean.numel() ? write<T>(clean) : nullptr};
  }
};

Tensor denoising_sums(
    const char* where, const Tensor& denoised, const Tensor& clean, const Tensor& weight, const DenoisingGradients& gradients) {
  const OnDevice device(denoised);
  const Tensor left = dense(denoised), right = dense(clean);
  Tensor out = empty_batch(denoised);
  const int64_t elements = Samples(denoised).elements;
  dispatch(denoised.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    reduce_samples(where, device, denoised, SquaredErrors<T>{gradients.bind<T>(left, right), PerSample<A>(weight), elements},
                   Weighted<A>{PerSample<A>(weight), write<A>(out)});
  });
  return out;
}

Tensor denoising_loss(const Tensor& denoised, const Tensor& clean, const Tensor& weight) {
  return denoising_sums("denoising_loss", denoised, clean, weight, DenoisingGradients(denoised, false, false));
}

std::tuple<Tensor, Tensor, Tensor> denoising_loss_recorded(
    const Tensor& denoised, const Tensor& clean, const Tensor& weight, std::vector<bool> needs) {
  const DenoisingGradients gradients(denoised, needs[0], needs[1]);
  const Tensor loss = denoising_sums("denoising_loss_recorded", denoised, clean, weight, gradients);
  return {loss, gradients.denoised, gradients.clean};
}

template <class T>
struct DenoisingBackward {
  using A = Acc<T>;
  static constexpr int group = kGroup<T>;
  const A* grad;
  DenoisingOperands<T> operands;
  PerSample<A> weight;
  int64_t elements;

  __device__ __forceinline__ void operator()(int64_t b, int64_t i, int count) const {
    A d[group];
    operands.differences(b * elements + i, count, d);
    operands.write(b * elements + i, count, d, 2 * weight[b] * grad[b]);
  }
};

std::tuple<Tensor, Tensor> denoising_loss_backward(
    const Tensor& grad, const Tensor& denoised, const Tensor& clean, const Tensor& weight, std::vector<bool> needs) {
  const OnDevice device(denoised);
  const Tensor left = dense(denoised), right = dense(clean), grads = dense(grad);
  const DenoisingGradients gradients(denoised, needs[0], needs[1]);
  const Samples samples(denoised);
  dispatch(denoised.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    for_each_group("denoising_loss_backward", device, samples,
                   DenoisingBackward<T>{read<A>(grads), gradients.bind<T>(left, right), PerSample<A>(weight), samples.elements});
  });
  return {gradients.denoised, gradients.clean};
}

}  // namespace
}  // namespace fastdiff::FASTDIFF_VARIANT

STABLE_TORCH_LIBRARY_IMPL(fastdiff_cuda, CUDA, m) {
  using namespace fastdiff::FASTDIFF_VARIANT;
  m.impl("lcss_noise", TORCH_BOX(&lcss_noise));
  m.impl("lcss_perturb", TORCH_BOX(&lcss_perturb));
  m.impl("lcss_perturb_backward", TORCH_BOX(&lcss_perturb_backward));
  m.impl("lcss_loss", TORCH_BOX(&lcss_loss));
  m.impl("lcss_loss_recorded", TORCH_BOX(&lcss_loss_recorded));
  m.impl("lcss_loss_backward", TORCH_BOX(&lcss_loss_backward));
  m.impl("lcss_loss_seeded", TORCH_BOX(&lcss_loss_seeded));
  m.impl("lcss_loss_seeded_recorded", TORCH_BOX(&lcss_loss_seeded_recorded));
  m.impl("lcss_loss_seeded_backward", TORCH_BOX(&lcss_loss_seeded_backward));
  m.impl("denoising_loss", TORCH_BOX(&denoising_loss));
  m.impl("denoising_loss_recorded", TORCH_BOX(&denoising_loss_recorded));
  m.impl("denoising_loss_backward", TORCH_BOX(&denoising_loss_backward));
}
