#include "cpu/torch.h"

#include "fastdiff/variant_begin.h"

#include "cpu/common.h"
#include "fastdiff/distillation.h"

namespace fastdiff::FASTDIFF_VARIANT {
namespace {

struct SimArguments {
  Tensor fake, teacher, sample;
  std::optional<Tensor> noisy, c_skip, c_out;
  const Tensor &weight, &c;
  bool pseudo_huber;

  SimArguments(
      const Tensor& fake_in, const Tensor& teacher_in, const Tensor& sample_in, const std::optional<Tensor>& noisy_in,
      const std::optional<Tensor>& skip, const std::optional<Tensor>& out, const Tensor& weight_in, const Tensor& constant,
      const std::string& distance)
      : fake(dense(fake_in)),
        teacher(dense(teacher_in)),
        sample(dense(sample_in)),
        c_skip(skip),
        c_out(out),
        weight(weight_in),
        c(constant),
        pseudo_huber(distance == "pseudo_huber") {
    if (noisy_in) noisy = dense(*noisy_in);
  }
};

struct SimGradients {
  Tensor fake, teacher, sample, noisy;

  SimGradients(const SimArguments& arguments, const std::vector<bool>& needs)
      : fake(needs[0] ? empty_as(arguments.fake) : absent(arguments.fake)),
        teacher(needs[1] ? empty_as(arguments.teacher) : absent(arguments.fake)),
        sample(needs[2] ? empty_as(arguments.sample) : absent(arguments.fake)),
        noisy(needs[3] ? empty_as(arguments.sample) : absent(arguments.fake)) {}
};

Tensor empty_doubles(const Tensor& x) {
  const int64_t batch = x.size(0);
  return torch::stable::new_empty(x, {batch}, ScalarType::Double);
}

template <class T>
T* target(const Tensor& x) {
  return x.numel() == 0 ? nullptr : write<T>(x);
}

// Both networks' outputs in T, the samples they are compared with in S. Raw: the outputs are F of D = skip noisy + out F.
template <class T, class S, bool Raw>
class Sim {
  using A = Acc<T>;

 public:
  explicit Sim(const SimArguments& arguments)
      : fake_(read<T>(arguments.fake)),
        teacher_(read<T>(arguments.teacher)),
        sample_(read<S>(arguments.sample)),
        noisy_(Raw ? read<S>(*arguments.noisy) : nullptr),
        skip_(Raw ? *arguments.c_skip : arguments.weight),
        out_(Raw ? *arguments.c_out : arguments.weight),
        weight_(arguments.weight),
        c_(arguments.c),
        samples_(arguments.fake),
        pseudo_huber_(arguments.pseudo_huber) {}

  void forward(const Tensor& loss, const Tensor& gap, const Tensor& projection) const {
    A* losses = write<A>(loss);
    double *gaps = write<double>(gap), *projections = write<double>(projection);
    const auto chunk = [this](int64_t b, int64_t begin, int64_t end) {
      const Sample self = sample(b);
      std::array<double, 2> sums{};
      for_each_run(begin, end, [&](int64_t first, int64_t last) {
        sums[0] += sum<A>(first, last, [=](int64_t i) { return self.gap(i) * self.gap(i); });
        sums[1] += sum<A>(first, last, [=](int64_t i) { return self.gap(i) * self.error(i); });
      });
      return sums;
    };
    reduce_samples<2>(samples_, chunk, [&, this](int64_t b, const std::array<double, 2>& sums) {
      const double length = std::sqrt(sums[0]), projected = sim_projection(sums[1], length, c_[b], pseudo_huber_);
      losses[b] = static_cast<A>(-static_cast<double>(weight_[b]) * projected);
      gaps[b] = length;
      projections[b] = projected;
    });
  }

  void backward(const Tensor& grad, const Tensor& gap, const Tensor& projection, const SimGradients& gradients) const {
    T *to_fake = target<T>(gradients.fake), *to_teacher = target<T>(gradients.teacher);
    S *to_sample = target<S>(gradients.sample), *to_noisy = target<S>(gradients.noisy);
    const PerSample<A> upstream(grad);
    const double *gaps = read<double>(gap), *projections = read<double>(projection);
    for_each_chunk(samples_, [=, this](int64_t b, int64_t begin, int64_t end) {
      const Sample self = sample(b);
      const SimFactors f = sim_factors(gaps[b], projections[b], c_[b], pseudo_huber_);
      const double scale = static_cast<double>(weight_[b]) * upstream[b], network = Raw ? self.out * scale : scale;
      const A linear = static_cast<A>(network * f.linear), radial = static_cast<A>(network * f.radial);
      const A of_sample = static_cast<A>(scale * f.linear), of_noisy = static_cast<A>(-self.skip * scale * f.linear);
      const int64_t at = b * samples_.elements;
      // One target after another: a run's operands are read from memory once, from the cache thereafter.
      for_each_run(begin, end, [=](int64_t first, int64_t last) {
        if (to_fake != nullptr) {
          for (int64_t i = first; i < last; ++i) to_fake[at + i] = store<T>(sim_fake_gradient(self.gap(i), self.error(i), linear, radial));
        }
        if (to_teacher != nullptr) {
          for (int64_t i = first; i < last; ++i) {
            to_teacher[at + i] = store<T>(sim_teacher_gradient(self.gap(i), self.error(i), linear, radial));
          }
        }
        if (to_sample != nullptr) {
          for (int64_t i = first; i < last; ++i) to_sample[at + i] = store<S>(of_sample * self.gap(i));
        }
        if (to_noisy != nullptr) {
          for (int64_t i = first; i < last; ++i) to_noisy[at + i] = store<S>(of_noisy * self.gap(i));
        }
      });
    });
  }

 private:
  struct Sample {
    const T *fake, *teacher;
    const S *clean, *noisy;
    A skip, out;

    FD_INLINE A gap(int64_t i) const {
      const A difference = load(fake[i]) - load(teacher[i]);
      return Raw ? out * difference : difference;
    }
    FD_INLINE A error(int64_t i) const {
      if constexpr (Raw) return skip * load(noisy[i]) + out * load(fake[i]) - load(clean[i]);
      return load(fake[i]) - load(clean[i]);
    }
  };

  FD_INLINE Sample sample(int64_t b) const {
    const int64_t at = b * samples_.elements;
    return {fake_ + at, teacher_ + at, sample_ + at, Raw ? noisy_ + at : nullptr, skip_[b], out_[b]};
  }

  const T *fake_, *teacher_;
  const S *sample_, *noisy_;
  PerSample<A> skip_, out_, weight_, c_;
  Samples samples_;
  bool pseudo_huber_;
};

// Calls body with the Sim of the arguments' dtypes: samples have that of the networks' outputs, or are float32 beside 16 bits.
template <class Body>
void with_sim(const SimArguments& arguments, Body&& body) {
  dispatch(arguments.fake.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto with_samples = [&](auto companion) {
      using S = typename decltype(companion)::type;
      arguments.noisy ? body(Sim<T, S, true>(arguments)) : body(Sim<T, S, false>(arguments));
    };
    arguments.sample.scalar_type() == arguments.fake.scalar_type() ? with_samples(tag) : with_samples(Tag<Acc<T>>{});
  });
}

std::tuple<Tensor, Tensor, Tensor> sim_loss(
    const Tensor& fake, const Tensor& teacher, const Tensor& sample, std::optional<Tensor> noisy, std::optional<Tensor> c_skip,
    std::optional<Tensor> c_out, const Tensor& weight, const Tensor& c, std::string distance) {
  const SimArguments arguments(fake, teacher, sample, noisy, c_skip, c_out, weight, c, distance);
  const Tensor loss = empty_batch(fake), gap = empty_doubles(fake), projection = empty_doubles(fake);
  with_sim(arguments, [&](const auto& sim) { sim.forward(loss, gap, projection); });
  return {loss, gap, projection};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sim_loss_backward(
    const Tensor& grad, const Tensor& fake, const Tensor& teacher, const Tensor& sample, std::optional<Tensor> noisy,
    std::optional<Tensor> c_skip, std::optional<Tensor> c_out, const Tensor& weight, const Tensor& c, std::string distance,
    const Tensor& gap, const Tensor& projection, std::vector<bool> needs) {
  const SimArguments arguments(fake, teacher, sample, noisy, c_skip, c_out, weight, c, distance);
  const SimGradients gradients(arguments, needs);
  const Tensor grads = dense(grad);
  with_sim(arguments, [&](const auto& sim) { sim.backward(grads, gap, projection, gradients); });
  return {gradients.fake, gradients.teacher, gradients.sample, gradients.noisy};
}

// The two losses of moment matching: an element's term, and its derivative in what is differentiated.
struct Generator {
  template <class A>
  static FD_INLINE A term(A sample, A auxiliary, A teacher) {
    return sample * (auxiliary - teacher);
  }
  template <class A>
  static FD_INLINE A derivative(A, A auxiliary, A teacher) {
    return auxiliary - teacher;
  }
};

struct Auxiliary {
  template <class A>
  static FD_INLINE A term(A sample, A auxiliary, A teacher) {
    return auxiliary_term(sample, auxiliary, teacher);
  }
  template <class A>
  static FD_INLINE A derivative(A sample, A auxiliary, A teacher) {
    return 2 * auxiliary_gradient(sample, auxiliary, teacher);
  }
};

template <class Kind>
class MomentMatching {
 public:
  MomentMatching(const Tensor& sample, const Tensor& auxiliary, const Tensor& teacher, const Tensor& weight)
      : sample_(dense(sample)), auxiliary_(dense(auxiliary)), teacher_(dense(teacher)), weight_(weight) {}

  // The loss and, where `gradient` has elements, the gradient for an upstream gradient of 1 in the same pass.
  Tensor forward(const Tensor& gradient) const {
    const Tensor out = empty_batch(sample_);
    dispatch(sample_.scalar_type(), [&, this](auto tag) {
      using T = typename decltype(tag)::type;
      using A = Acc<T>;
      const T *x = read<T>(sample_), *a = read<T>(auxiliary_), *t = read<T>(teacher_);
      T* y = target<T>(gradient);
      A* loss = write<A>(out);
      const PerSample<A> weights(weight_);
      const Samples samples(sample_);
      const auto chunk = [=](int64_t b, int64_t begin, int64_t end) {
        std::array<double, 1> sums{};
        for_each_run(b * samples.elements + begin, b * samples.elements + end, [&](int64_t first, int64_t last) {
          sums[0] += sum<A>(first, last, [=](int64_t i) { return Kind::template term<A>(load(x[i]), load(a[i]), load(t[i])); });
          if (y != nullptr) write_gradient<T>(x, a, t, y, weights[b], first, last);
        });
        return sums;
      };
      reduce_samples<1>(samples, chunk, [&](int64_t b, const std::array<double, 1>& sums) { loss[b] = static_cast<A>(weights[b] * sums[0]); });
    });
    return out;
  }

  Tensor backward(const Tensor& grad) const {
    const Tensor grads = dense(grad), out = empty_as(sample_);
    dispatch(sample_.scalar_type(), [&, this](auto tag) {
      using T = typename decltype(tag)::type;
      using A = Acc<T>;
      const T *x = read<T>(sample_), *a = read<T>(auxiliary_), *t = read<T>(teacher_);
      T* y = write<T>(out);
      const PerSample<A> weights(weight_), upstream(grads);
      const Samples samples(sample_);
      for_each_chunk(samples, [&](int64_t b, int64_t begin, int64_t end) {
        write_gradient<T>(x, a, t, y, weights[b] * upstream[b], b * samples.elements + begin, b * samples.elements + end);
      });
    });
    return out;
  }

  Tensor empty_gradient() const { return empty_as(sample_); }
  Tensor absent_gradient() const { return absent(sample_); }

 private:
  template <class T>
  static FD_INLINE void write_gradient(const T* x, const T* a, const T* t, T* y, Acc<T> scale, int64_t first, int64_t last) {
#pragma omp simd
    for (int64_t i = first; i < last; ++i) y[i] = store<T>(scale * Kind::template derivative<Acc<T>>(load(x[i]), load(a[i]), load(t[i])));
  }

  Tensor sample_, auxiliary_, teacher_;
  const Tensor& weight_;
};

template <class Kind>
Tensor moment_loss(const Tensor& sample, const Tensor& auxiliary, const Tensor& teacher, const Tensor& weight) {
  const MomentMatching<Kind> loss(sample, auxiliary, teacher, weight);
  return loss.forward(loss.absent_gradient());
}

template <class Kind>
std::tuple<Tensor, Tensor> moment_loss_recorded(
    const Tensor& sample, const Tensor& auxiliary, const Tensor& teacher, const Tensor& weight, std::vector<bool> needs) {
  const MomentMatching<Kind> loss(sample, auxiliary, teacher, weight);
  const Tensor gradient = needs[0] ? loss.empty_gradient() : loss.absent_gradient();
  return {loss.forward(gradient), gradient};
}

template <class Kind>
Tensor moment_loss_backward(
    const Tensor& grad, const Tensor& sample, const Tensor& auxiliary, const Tensor& teacher, const Tensor& weight, std::vector<bool>) {
  return MomentMatching<Kind>(sample, auxiliary, teacher, weight).backward(grad);
}

}  // namespace
}  // namespace fastdiff::FASTDIFF_VARIANT

#include "fastdiff/variant_end.h"

FASTDIFF_CPU_KERNELS(m) {
  using namespace fastdiff::FASTDIFF_VARIANT;
  m.impl("sim_loss", TORCH_BOX(&sim_loss));
  m.impl("sim_loss_backward", TORCH_BOX(&sim_loss_backward));
  m.impl("moment_matching_loss", TORCH_BOX(&moment_loss<Generator>));
  m.impl("moment_matching_loss_recorded", TORCH_BOX(&moment_loss_recorded<Generator>));
  m.impl("moment_matching_loss_backward", TORCH_BOX(&moment_loss_backward<Generator>));
  m.impl("moment_matching_auxiliary_loss", TORCH_BOX(&moment_loss<Auxiliary>));
  m.impl("moment_matching_auxiliary_loss_recorded", TORCH_BOX(&moment_loss_recorded<Auxiliary>));
  m.impl("moment_matching_auxiliary_loss_backward", TORCH_BOX(&moment_loss_backward<Auxiliary>));
}
