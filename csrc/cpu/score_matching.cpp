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

// Where the noise of a loss comes from: tiles() calls body(begin, end, noise), noise[j] being that of element begin + j.
template <class T>
struct Stored {
  const T* noise;
  int64_t elements;

  template <class F>
  FD_INLINE void tiles(int64_t b, int64_t begin, int64_t end, F&& body) const {
    for (int64_t i = begin; i < end; i += kTile) body(i, i + kTile < end ? i + kTile : end, noise + b * elements + i);
  }
};

struct Seeded {
  Noise noise;

  template <class F>
  FD_INLINE void tiles(int64_t b, int64_t begin, int64_t end, F&& body) const {
    with_noise(noise, b, begin, end, body);
  }
};

struct LcssArguments {
  Tensor score;
  std::optional<Tensor> mirrored;
  const Tensor &sigma, &gamma, &weight;

  LcssArguments(
      const Tensor& score_in, const std::optional<Tensor>& mirrored_in, const Tensor& sigma_in, const Tensor& gamma_in,
      const Tensor& weight_in)
      : score(dense(score_in)), sigma(sigma_in), gamma(gamma_in), weight(weight_in) {
    if (mirrored_in) mirrored = dense(*mirrored_in);
  }
};

// Gradients by score, noise and mirrored score; empty where not wanted.
struct LcssGradients {
  Tensor score, noise, mirrored;

  LcssGradients(const Tensor& like, bool to_score, bool to_noise, bool to_mirrored)
      : score(to_score ? empty_as(like) : absent(like)),
        noise(to_noise ? empty_as(like) : absent(like)),
        mirrored(to_mirrored ? empty_as(like) : absent(like)) {}
};

// One sample's tile, of a score alone or of a score and its mirrored one.
template <class T, bool Pair>
struct LcssTile {
  using A = Acc<T>;
  const T *score, *mirrored;

  FD_INLINE A difference(int64_t j) const { return Pair ? load(score[j]) - load(mirrored[j]) : load(score[j]); }
  FD_INLINE A squares(int64_t j) const {
    const A s = load(score[j]);
    if constexpr (!Pair) return s * s;
    const A m = load(mirrored[j]);
    return s * s + m * m;
  }
};

template <class T, class Source, bool Pair>
class Lcss {
  using A = Acc<T>;

 public:
  Lcss(const LcssArguments& arguments, const Source& source)
      : score_(read<T>(arguments.score)),
        mirrored_(Pair ? read<T>(*arguments.mirrored) : nullptr),
        source_(source),
        sigma_(arguments.sigma),
        gamma_(arguments.gamma),
        weight_(arguments.weight),
        samples_(arguments.score) {}

  void forward(const Tensor& loss) const {
    finish(loss, [this](int64_t b, int64_t begin, int64_t end) {
      std::array<double, 2> sums{};
      source_.tiles(b, begin, end, [&](int64_t i, int64_t stop, const auto* z) { add(sums, tile(b, i), stop - i, z); });
      return sums;
    });
  }

  // While a tile is in the cache, its gradients for an upstream gradient of 1.
  void record(const Tensor& loss, const LcssGradients& gradients) const {
    const Targets targets(gradients);
    finish(loss, [&, this](int64_t b, int64_t begin, int64_t end) {
      std::array<double, 2> sums{};
      const A factor = noise_factor(b), scale = own_weight(b);
      source_.tiles(b, begin, end, [&](int64_t i, int64_t stop, const auto* z) {
        add(sums, tile(b, i), stop - i, z);
        targets.write(tile(b, i), b * samples_.elements + i, stop - i, z, factor, scale);
      });
      return sums;
    });
  }

  void backward(const Tensor& grad, const LcssGradients& gradients) const {
    const Targets targets(gradients);
    const PerSample<A> upstream(grad);
    for_each_chunk(samples_, [&, this](int64_t b, int64_t begin, int64_t end) {
      const A factor = noise_factor(b), scale = upstream[b] * own_weight(b);
      source_.tiles(b, begin, end, [&](int64_t i, int64_t stop, const auto* z) {
        targets.write(tile(b, i), b * samples_.elements + i, stop - i, z, factor, scale);
      });
    });
  }

 private:
  using Tile = LcssTile<T, Pair>;

  struct Targets {
    T *score, *noise, *mirrored;  // null where not wanted

    explicit Targets(const LcssGradients& gradients)
        : score(target(gradients.score)), noise(target(gradients.noise)), mirrored(target(gradients.mirrored)) {}

    static T* target(const Tensor& x) { return x.numel() == 0 ? nullptr : fastdiff::FASTDIFF_VARIANT::write<T>(x); }

    template <class Z>
    FD_INLINE void write(const Tile& tile, int64_t at, int64_t count, const Z* z, A factor, A scale) const {
      if (score != nullptr) {
        for (int64_t j = 0; j < count; ++j) {
          score[at + j] = store<T>(lcss_score_gradient<A>(load(tile.score[j]), A(load(z[j])), factor, scale));
        }
      }
      if (noise != nullptr) {
        for (int64_t j = 0; j < count; ++j) noise[at + j] = store<T>(scale * factor * tile.difference(j));
      }
      if (mirrored != nullptr) {
        for (int64_t j = 0; j < count; ++j) {
          mirrored[at + j] = store<T>(lcss_score_gradient<A>(load(tile.mirrored[j]), A(load(z[j])), -factor, scale));
        }
      }
    }
  };

  FD_INLINE Tile tile(int64_t b, int64_t i) const {
    const int64_t at = b * samples_.elements + i;
    return {score_ + at, Pair ? mirrored_ + at : nullptr};
  }
  FD_INLINE A noise_factor(int64_t b) const { return gamma_[b] / sigma_[b]; }
  // Each half of a pair weighs half.
  FD_INLINE A own_weight(int64_t b) const { return Pair ? A(0.5) * weight_[b] : weight_[b]; }

  template <class Z>
  FD_INLINE void add(std::array<double, 2>& sums, const Tile& tile, int64_t count, const Z* z) const {
    sums[0] += sum<A>(0, count, [=](int64_t j) { return tile.difference(j) * A(load(z[j])); });
    sums[1] += sum<A>(0, count, [=](int64_t j) { return tile.squares(j); });
  }

  template <class F>
  void finish(const Tensor& loss, F&& chunk_sums) const {
    A* out = write<A>(loss);
    reduce_samples<2>(samples_, chunk_sums, [&, this](int64_t b, const std::array<double, 2>& sums) {
      out[b] = static_cast<A>(lcss_value<double>(sums[0], sums[1], sigma_[b], gamma_[b], own_weight(b)));
    });
  }

  const T *score_, *mirrored_;
  Source source_;
  PerSample<A> sigma_, gamma_, weight_;
  Samples samples_;
};

// Calls body with the Lcss of the arguments' dtype; make_source(Tag<T>{}) gives the noise.
template <class MakeSource, class Body>
void with_lcss(const LcssArguments& arguments, MakeSource&& make_source, Body&& body) {
  dispatch(arguments.score.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto source = make_source(tag);
    using Source = std::decay_t<decltype(source)>;
    arguments.mirrored ? body(Lcss<T, Source, true>(arguments, source)) : body(Lcss<T, Source, false>(arguments, source));
  });
}

// Makes the noise of with_lcss: of a contiguous tensor, or of a seed.
auto stored(const Tensor& noise) {
  return [&noise](auto tag) {
    using T = typename decltype(tag)::type;
    return Stored<T>{read<T>(noise), Samples(noise).elements};
  };
}

auto seeded(const Tensor& seed, int64_t offset) {
  return [noise = Noise(seed, Stream::lcss, offset)](auto) { return Seeded{noise}; };
}

Tensor lcss_loss(
    const Tensor& score, const Tensor& noise, std::optional<Tensor> mirrored, const Tensor& sigma, const Tensor& gamma,
    const Tensor& weight) {
  const LcssArguments arguments(score, mirrored, sigma, gamma, weight);
  const Tensor noises = dense(noise), loss = empty_batch(score);
  with_lcss(arguments, stored(noises), [&](const auto& lcss) { lcss.forward(loss); });
  return loss;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> lcss_loss_recorded(
    const Tensor& score, const Tensor& noise, std::optional<Tensor> mirrored, const Tensor& sigma, const Tensor& gamma,
    const Tensor& weight, std::vector<bool> needs) {
  const LcssArguments arguments(score, mirrored, sigma, gamma, weight);
  const LcssGradients gradients(score, needs[0], needs[1], needs[2]);
  const Tensor noises = dense(noise), loss = empty_batch(score);
  with_lcss(arguments, stored(noises), [&](const auto& lcss) { lcss.record(loss, gradients); });
  return {loss, gradients.score, gradients.noise, gradients.mirrored};
}

std::tuple<Tensor, Tensor, Tensor> lcss_loss_backward(
    const Tensor& grad, const Tensor& score, const Tensor& noise, std::optional<Tensor> mirrored, const Tensor& sigma,
    const Tensor& gamma, const Tensor& weight, std::vector<bool> needs) {
  const LcssArguments arguments(score, mirrored, sigma, gamma, weight);
  const LcssGradients gradients(score, needs[0], needs[1], needs[2]);
  const Tensor noises = dense(noise), grads = dense(grad);
  with_lcss(arguments, stored(noises), [&](const auto& lcss) { lcss.backward(grads, gradients); });
  return {gradients.score, gradients.noise, gradients.mirrored};
}

Tensor lcss_loss_seeded(
    const Tensor& score, const Tensor& seed, std::optional<Tensor> mirrored, const Tensor& sigma, const Tensor& gamma,
    const Tensor& weight, int64_t offset) {
  const LcssArguments arguments(score, mirrored, sigma, gamma, weight);
  const Tensor loss = empty_batch(score);
  with_lcss(arguments, seeded(seed, offset), [&](const auto& lcss) { lcss.forward(loss); });
  return loss;
}

std::tuple<Tensor, Tensor, Tensor> lcss_loss_seeded_recorded(
    const Tensor& score, const Tensor& seed, std::optional<Tensor> mirrored, const Tensor& sigma, const Tensor& gamma,
    const Tensor& weight, int64_t offset, std::vector<bool> needs) {
  const LcssArguments arguments(score, mirrored, sigma, gamma, weight);
  const LcssGradients gradients(score, needs[0], false, needs[1]);
  const Tensor loss = empty_batch(score);
  with_lcss(arguments, seeded(seed, offset), [&](const auto& lcss) { lcss.record(loss, gradients); });
  return {loss, gradients.score, gradients.mirrored};
}

std::tuple<Tensor, Tensor> lcss_loss_seeded_backward(
    const Tensor& grad, const Tensor& score, const Tensor& seed, std::optional<Tensor> mirrored, const Tensor& sigma,
    const Tensor& gamma, const Tensor& weight, int64_t offset, std::vector<bool> needs) {
  const LcssArguments arguments(score, mirrored, sigma, gamma, weight);
  const LcssGradients gradients(score, needs[0], false, needs[1]);
  const Tensor grads = dense(grad);
  with_lcss(arguments, seeded(seed, offset), [&](const auto& lcss) { lcss.backward(grads, gradients); });
  return {gradients.score, gradients.mirrored};
}

// Both operands of the denoising loss, and where the gradients go.
template <class T>
struct Denoising {
  using A = Acc<T>;
  const T *denoised, *clean;
  T *to_denoised = nullptr, *to_clean = nullptr;

  FD_INLINE A difference(int64_t i) const { return load(denoised[i]) - load(clean[i]); }
  FD_INLINE double squares(int64_t first, int64_t last) const {
    const Denoising self = *this;
    return sum<A>(first, last, [=](int64_t i) { return self.difference(i) * self.difference(i); });
  }
  FD_INLINE void write_gradients(int64_t first, int64_t last, A factor) const {
    if (to_denoised != nullptr) {
      for (int64_t i = first; i < last; ++i) to_denoised[i] = store<T>(factor * difference(i));
    }
    if (to_clean != nullptr) {
      for (int64_t i = first; i < last; ++i) to_clean[i] = store<T>(-factor * difference(i));
    }
  }
};

struct DenoisingGradients {
  Tensor denoised, clean;
  DenoisingGradients(const Tensor& like, const std::vector<bool>& needs)
      : denoised(needs[0] ? empty_as(like) : absent(like)), clean(needs[1] ? empty_as(like) : absent(like)) {}

  template <class T>
  Denoising<T> of(const Tensor& left, const Tensor& right) const {
    return {read<T>(left), read<T>(right), denoised.numel() ? write<T>(denoised) : nullptr, clean.numel() ? write<T>(clean) : nullptr};
  }
};

// The losses, and the gradients that are wanted for an upstream gradient of 1.
Tensor denoising_sums(const Tensor& denoised, const Tensor& clean, const Tensor& weight, const DenoisingGradients& gradients) {
  const Tensor left = dense(denoised), right = dense(clean);
  Tensor out = empty_batch(denoised);
  dispatch(denoised.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    const Denoising<T> operands = gradients.of<T>(left, right);
    A* loss = write<A>(out);
    const PerSample<A> weights(weight);
    const Samples samples(denoised);
    const auto chunk = [=](int64_t b, int64_t begin, int64_t end) {
      std::array<double, 1> sums{};
      for_each_run(b * samples.elements + begin, b * samples.elements + end, [&](int64_t first, int64_t last) {
        sums[0] += operands.squares(first, last);
        operands.write_gradients(first, last, 2 * weights[b]);
      });
      return sums;
    };
    reduce_samples<1>(samples, chunk, [&](int64_t b, const std::array<double, 1>& sums) { loss[b] = static_cast<A>(weights[b] * sums[0]); });
  });
  return out;
}

Tensor denoising_loss(const Tensor& denoised, const Tensor& clean, const Tensor& weight) {
  return denoising_sums(denoised, clean, weight, DenoisingGradients(denoised, {false, false}));
}

std::tuple<Tensor, Tensor, Tensor> denoising_loss_recorded(
    const Tensor& denoised, const Tensor& clean, const Tensor& weight, std::vector<bool> needs) {
  const DenoisingGradients gradients(denoised, needs);
  const Tensor loss = denoising_sums(denoised, clean, weight, gradients);
  return {loss, gradients.denoised, gradients.clean};
}

std::tuple<Tensor, Tensor> denoising_loss_backward(
    const Tensor& grad, const Tensor& denoised, const Tensor& clean, const Tensor& weight, std::vector<bool> needs) {
  const Tensor left = dense(denoised), right = dense(clean), grads = dense(grad);
  const DenoisingGradients gradients(denoised, needs);
  dispatch(denoised.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    const Denoising<T> operands = gradients.of<T>(left, right);
    const PerSample<A> weights(weight), upstream(grads);
    const Samples samples(denoised);
    for_each_chunk(samples, [&](int64_t b, int64_t begin, int64_t end) {
      operands.write_gradients(b * samples.elements + begin, b * samples.elements + end, 2 * weights[b] * upstream[b]);
    });
  });
  return {gradients.denoised, gradients.clean};
}

// factor[b] * gradient[b] in place, what is left for backward where forward has written the gradients. Where factor is 1 nothing is touched.
void scale_samples(Tensor gradient, const Tensor& factor) {
  dispatch(gradient.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    T* values = write<T>(gradient);
    const PerSample<A> factors(factor);
    const Samples samples(gradient);
    bool touched = false;
    for (int64_t b = 0; b < samples.batch; ++b) touched |= factors[b] != A(1);
    if (!touched) return;
    // From the end of each thread's part, which it wrote last and which is still in its cache.
    torch::stable::parallel_for(0, gradient.numel(), kChunk, [=](int64_t first, int64_t last) {
      for (int64_t end = last; end > first;) {
        const int64_t b = (end - 1) / samples.elements, begin = std::max(first, std::max(b * samples.elements, end - kChunk));
        const A scale = factors[b];
        if (scale != A(1)) {
#pragma omp simd
          for (int64_t i = begin; i < end; ++i) values[i] = store<T>(scale * load(values[i]));
        }
        end = begin;
      }
    });
  });
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
  m.impl("lcss_loss_recorded", TORCH_BOX(&lcss_loss_recorded));
  m.impl("lcss_loss_backward", TORCH_BOX(&lcss_loss_backward));
  m.impl("lcss_loss_seeded", TORCH_BOX(&lcss_loss_seeded));
  m.impl("lcss_loss_seeded_recorded", TORCH_BOX(&lcss_loss_seeded_recorded));
  m.impl("lcss_loss_seeded_backward", TORCH_BOX(&lcss_loss_seeded_backward));
  m.impl("scale_samples_", TORCH_BOX(&scale_samples));
  m.impl("denoising_loss", TORCH_BOX(&denoising_loss));
  m.impl("denoising_loss_recorded", TORCH_BOX(&denoising_loss_recorded));
  m.impl("denoising_loss_backward", TORCH_BOX(&denoising_loss_backward));
}
