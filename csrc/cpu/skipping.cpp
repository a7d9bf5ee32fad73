#include "cpu/torch.h"

#include <limits>

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

// One call of solver_step, for tensors of T.
template <class T>
struct SolverStep {
  using A = Acc<T>;
  static constexpr int64_t kBlock = 4096 / sizeof(A);

  StepScalars<A> scalars;
  int64_t elements;
  Criterion criterion;
  const int64_t* rows;
  int64_t row_stride;
  const T *x, *denoised, *uncond, *newest, *older, *previous, *point, *before1, *before0;
  const double* state;  // of one row for the batch, or of one for each sample
  int64_t state_stride;
  double reuse_at;
  T *next, *noise, *used;

  // The row of `denoised` that holds sample b's prediction; below 0 where it reuses.
  int64_t row(int64_t b) const { return rows != nullptr ? rows[b * row_stride] : (denoised != nullptr ? b : -1); }

  // Sums of the third difference and of the last change over elements begin ... end of sample b.
  std::array<double, 2> operator()(int64_t b, int64_t begin, int64_t end) const {
    const int64_t from = row(b);
    const double* own = state == nullptr ? nullptr : state + b * state_stride;
    const A ahead = older != nullptr && own != nullptr ? static_cast<A>(continuation(own, reuse_at)) : A(0);
    const bool line = older != nullptr && own != nullptr && own[kStored] >= 2;
    const bool plain = used == nullptr && previous == nullptr && (point == nullptr || from < 0) && criterion != Criterion::tensor;
    if (plain && (from >= 0 || noise == nullptr)) {
      return {0, fused(b * elements + begin, from * elements + begin, end - begin, from >= 0, ahead, line)};
    }
    std::array<double, 2> sums{};
    for (int64_t i = begin; i < end; i += kBlock) {
      const int64_t at = b * elements + i, count = end - i < kBlock ? end - i : kBlock;
      const auto part = block(at, from >= 0 ? from * elements + i : -1, count, ahead, line);
      sums[0] += part[0];
      sums[1] += part[1];
    }
    return sums;
  }

 private:
  // Euler's step alone, which most calls are, in one loop: the sum of the last change.
  double fused(int64_t at, int64_t from, int64_t count, bool computed, A ahead, bool line) const {
    const A sigma = scalars.sigma;
    if (computed) {
      const T* d = denoised + from;
      const auto with = [&](auto guided_at) {
        const auto error_at = [=](int64_t, A here, A guided_here) { return here - guided_here; };
        return noise == nullptr ? euler<false>(at, count, guided_at, error_at) : euler<true>(at, count, guided_at, error_at);
      };
      if (uncond == nullptr) return with([=](int64_t i, A) { return load(d[i]); });
      const T* u = uncond + from;
      const A guidance = scalars.guidance;
      return with([=](int64_t i, A) {
        const A without = load(u[i]);
        return without + guidance * (load(d[i]) - without);
      });
    }
    const T* kept = newest + at;
    const auto with = [&](auto noise_at) {
      return euler<false>(at, count, [=](int64_t i, A here) { return here - sigma * noise_at(i); },
                          [=](int64_t i, A, A) { return sigma * noise_at(i); });
    };
    if (!line) return with([=](int64_t i) { return load(kept[i]); });
    const T* past = older + at;
    return with([=](int64_t i) {
      const A start = load(past[i]);
      return start + ahead * (load(kept[i]) - start);
    });
  }

  template <bool kNoise, class GuidedAt, class ErrorAt>
  FD_INLINE double euler(int64_t at, int64_t count, GuidedAt guided_at, ErrorAt error_at) const {
    const T* in = x + at;
    T *out = next + at, *to_noise = kNoise ? noise + at : nullptr;
    const StepScalars<A> c = scalars;
    const auto step = [=](int64_t i) {
      const A here = load(in[i]), guided_here = guided_at(i, here), error = error_at(i, here, guided_here);
      if constexpr (kNoise) to_noise[i] = store<T>(error * c.noise_factor);
      out[i] = store<T>(c.from_x ? here - c.replaced * error : guided_here + c.kept * error);
      return std::abs(c.scale_change * here - c.scale_next * c.replaced * error);
    };
    if (criterion != Criterion::none) return sum<A>(0, count, step);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) step(i);
    return 0;
  }

  // Short runs that stay in the first cache, so that each stage is a plain loop and memory is still read once.
  std::array<double, 2> block(int64_t at, int64_t computed_at, int64_t count, A ahead, bool line) const {
    A here[kBlock], guided_here[kBlock], error[kBlock], move[kBlock];
    const T* in = x + at;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) here[i] = load(in[i]);
    const bool computed = computed_at >= 0;
    if (computed) {
      compute(at, computed_at, count, here, guided_here, error);
    } else {
      reuse(at, count, ahead, line, here, guided_here, error);
    }
    if (noise != nullptr) write_noise(at, count, computed, error);
    if (used != nullptr) {
      T* out = used + at;
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) out[i] = store<T>(guided_here[i]);
    }
    advance(at, count, computed && point != nullptr, here, guided_here, error, move);
    if (criterion == Criterion::none) return {};
    return measure(at, count, here, move);
  }

  FD_INLINE void compute(int64_t at, int64_t from, int64_t count, const A* here, A* guided_here, A* error) const {
    const T *d = denoised + from, *u = uncond == nullptr ? nullptr : uncond + from, *p = point == nullptr ? nullptr : point + at;
    if (u == nullptr) {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) guided_here[i] = load(d[i]);
    } else {
      const A guidance = scalars.guidance;
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) {
        const A without = load(u[i]);
        guided_here[i] = without + guidance * (load(d[i]) - without);
      }
    }
    if (p == nullptr) {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) error[i] = here[i] - guided_here[i];
    } else {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) error[i] = load(p[i]) - guided_here[i];
    }
  }

  FD_INLINE void reuse(int64_t at, int64_t count, A ahead, bool line, const A* here, A* guided_here, A* error) const {
    const T* kept = newest + at;
    const A sigma = scalars.sigma;
    if (line) {
      const T* past = older + at;
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) {
        const A start = load(past[i]);
        error[i] = sigma * (start + ahead * (load(kept[i]) - start));
      }
    } else {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) error[i] = sigma * load(kept[i]);
    }
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) guided_here[i] = here[i] - error[i];
  }

  FD_INLINE void write_noise(int64_t at, int64_t count, bool computed, const A* error) const {
    T* out = noise + at;
    const A factor = scalars.noise_factor;
    if (computed) {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) out[i] = store<T>(error[i] * factor);
    } else {
      memcpy(out, newest + at, count * sizeof(T));
    }
  }

  FD_INLINE void advance(int64_t at, int64_t count, bool second, const A* here, A* guided_here, A* error, A* move) const {
    T* out = next + at;
    const StepScalars<A> c = scalars;
    if (second) {
      const T* p = point + at;
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) {
        move[i] = A(0.5) * (load(p[i]) - here[i]) + c.second * error[i];
        out[i] = store<T>(here[i] + move[i]);
      }
      return;
    }
    if (previous != nullptr) {
      const T* last = previous + at;
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) {
        const A extra = c.weight * (guided_here[i] - load(last[i]));
        guided_here[i] += extra;
        error[i] -= extra;
      }
    }
    const A *start = c.from_x ? here : guided_here, factor = c.from_x ? -c.replaced : c.kept;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      move[i] = -c.replaced * error[i];
      out[i] = store<T>(start[i] + factor * error[i]);
    }
  }

  FD_INLINE std::array<double, 2> measure(int64_t at, int64_t count, const A* here, const A* move) const {
    const StepScalars<A> c = scalars;
    const auto change = [=](int64_t i) { return c.scale_next * move[i] + c.scale_change * here[i]; };
    const double last = sum<A>(0, count, [=](int64_t i) { return std::abs(change(i)); });
    if (before1 == nullptr || before0 == nullptr) return {0, last};
    const T *one = before1 + at, *zero = before0 + at;
    const double third = sum<A>(0, count, [=](int64_t i) {
      const A older_value = c.scale1 * load(one[i]);
      return std::abs(change(i) - A(2) * (c.scale * here[i] - older_value) + (older_value - c.scale0 * load(zero[i])));
    });
    return {third, last};
  }
};

inline Criterion criterion_of(const std::string& mode) {
  if (mode == "official") return Criterion::official;
  if (mode == "tensor") return Criterion::tensor;
  STD_TORCH_CHECK(mode == "none", "fastdiff::solver_step: mode must be 'official', 'tensor' or 'none'");
  return Criterion::none;
}

// Moves the state's rows to `out`: what was stored of this step's predictions, then the decision that its means lead to.
template <class T>
void next_state(const SolverStep<T>& step, int64_t batch, int64_t decisions, const std::vector<std::array<double, 2>>& sums, bool stored,
                bool has_third, double at, double threshold, int64_t max_skip, double* out) {
  const double unknown = std::numeric_limits<double>::quiet_NaN();
  const int64_t pooled = decisions == batch ? 1 : batch;
  for (int64_t r = 0; r < decisions; ++r) {
    double* own = out + r * kStateWidth;
    memcpy(own, step.state + r * kStateWidth, kStateWidth * sizeof(double));
    if (stored && step.row(r) >= 0) note_prediction(own, at);
    double third = 0, last = 0;
    for (int64_t b = r * pooled; b < (r + 1) * pooled; ++b) {
      third += sums[b][0];
      last += sums[b][1];
    }
    const double count = static_cast<double>(pooled) * static_cast<double>(step.elements);
    decide(own, step.criterion, has_third ? third / count : unknown, last / count, threshold, static_cast<double>(max_skip));
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> solver_step(
    const Tensor& x, std::optional<Tensor> denoised, std::optional<Tensor> uncond, std::optional<Tensor> rows, std::optional<Tensor> newest,
    std::optional<Tensor> older, std::optional<Tensor> previous, std::optional<Tensor> point, std::optional<Tensor> before1,
    std::optional<Tensor> before0, std::optional<Tensor> state, double sigma, double sigma_next, double guidance, double at, double reuse_at,
    double previous_weight, double scale_next, double scale, double scale1, double scale0, std::string mode, double threshold, int64_t max_skip,
    bool keep_noise, bool keep_denoised) {
  STD_TORCH_CHECK(denoised || newest, "fastdiff::solver_step: needs denoised or newest");
  const Criterion criterion = criterion_of(mode);
  STD_TORCH_CHECK(state || criterion == Criterion::none, "fastdiff::solver_step: needs a state to decide");
  for (auto* given : {&denoised, &uncond, &newest, &older, &previous, &point, &before1, &before0, &state}) {
    if (*given) *given = dense(**given);
  }
  const Tensor latents = dense(x);
  const int64_t batch = x.size(0), decisions = state ? state->size(0) : 0;
  STD_TORCH_CHECK(!state || (state->scalar_type() == ScalarType::Double && state->dim() == 2 && state->size(1) == kStateWidth &&
                             (decisions == batch || decisions == 1)),
                  "fastdiff::solver_step: state must be float64 [1, 9] or [B, 9]");
  STD_TORCH_CHECK(!rows || (rows->scalar_type() == ScalarType::Long && rows->numel() == batch),
                  "fastdiff::solver_step: rows must be int64 [B]");
  Tensor next = empty_as(x), noise = keep_noise ? empty_as(x) : absent(x), used = keep_denoised ? empty_as(x) : absent(x);
  const int64_t width = kStateWidth, none = 0;
  Tensor after = state ? torch::stable::new_empty(*state, {decisions, width}) : torch::stable::new_empty(x, {none}, ScalarType::Double);
  const double scales[] = {scale_next, scale, scale1, scale0};
  dispatch(x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    const auto of = [](const std::optional<Tensor>& tensor) { return tensor ? read<T>(*tensor) : nullptr; };
    const Samples samples(x);
    const SolverStep<T> step{step_scalars<A>(sigma, sigma_next, guidance, previous_weight, point.has_value(), scales),
                             samples.elements,
                             criterion,
                             rows ? read<int64_t>(*rows) : nullptr,
                             rows ? rows->stride(0) : 0,
                             read<T>(latents),
                             of(denoised),
                             of(uncond),
                             of(newest),
                             of(older),
                             of(previous),
                             of(point),
                             of(before1),
                             of(before0),
                             state ? read<double>(*state) : nullptr,
                             decisions == batch ? kStateWidth : 0,
                             reuse_at,
                             write<T>(next),
                             keep_noise ? write<T>(noise) : nullptr,
                             keep_denoised ? write<T>(used) : nullptr};
    std::vector<std::array<double, 2>> sums(batch, std::array<double, 2>{});
    reduce_samples<2>(samples, step, [&](int64_t b, const std::array<double, 2>& of_sample) { sums[b] = of_sample; });
    if (!state) return;
    const bool has_third = criterion == Criterion::tensor && before1 && before0;
    next_state(step, batch, decisions, sums, keep_noise, has_third, at, threshold, max_skip, write<double>(after));
  });
  return {next, noise, used, after};
}

}  // namespace
}  // namespace fastdiff::FASTDIFF_VARIANT

#include "fastdiff/variant_end.h"

FASTDIFF_CPU_KERNELS(m) {
  using namespace fastdiff::FASTDIFF_VARIANT;
  m.impl("third_order_skip", TORCH_BOX(&third_order_skip));
  m.impl("third_order_difference", TORCH_BOX(&third_order_difference));
  m.impl("solver_step", TORCH_BOX(&solver_step));
}
