#include "cpu/torch.h"

#include <limits>

#include "fastdiff/variant_begin.h"

#include "cpu/common.h"
#include "fastdiff/schedule_solver.h"

namespace fastdiff::FASTDIFF_VARIANT {
namespace {

Tensor incremental_cost(
    const Tensor& x, const Tensor& raw_low, const Tensor& raw_high, const Tensor& sigma_low, const Tensor& sigma_high, double sigma_data) {
  STD_TORCH_CHECK(sigma_low.scalar_type() == ScalarType::Double && sigma_high.scalar_type() == ScalarType::Double,
                  "fastdiff::incremental_cost: sigma_low and sigma_high must be float64");
  const Tensor inputs = dense(x), lows = dense(raw_low), highs = dense(raw_high);
  Tensor out = empty_batch(x);
  dispatch(x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    const T *input = read<T>(inputs), *low = read<T>(lows), *high = read<T>(highs);
    A* costs = write<A>(out);
    const PerSample<double> low_sigmas(sigma_low), high_sigmas(sigma_high);
    const Samples samples(x);
    const auto chunk = [=](int64_t b, int64_t begin, int64_t end) {
      const CostFactors factors = cost_factors(low_sigmas[b], high_sigmas[b], sigma_data);
      const A raw_factor = static_cast<A>(factors.raw), high_factor = static_cast<A>(factors.raw_high);
      const A input_factor = static_cast<A>(factors.input);
      const T *x_row = input + b * samples.elements, *low_row = low + b * samples.elements, *high_row = high + b * samples.elements;
      return std::array<double, 1>{sum<A>(begin, end, [=](int64_t i) {
        return cost_term<A>(load(x_row[i]), load(low_row[i]), load(high_row[i]), raw_factor, high_factor, input_factor);
      })};
    };
    reduce_samples<1>(samples, chunk, [&](int64_t b, const std::array<double, 1>& sums) { costs[b] = static_cast<A>(sums[0]); });
  });
  return out;
}

template <class S, class C>
void integrate(const Tensor& sigmas, const Tensor& costs, const Tensor& levels, int64_t num_steps, bool cubic) {
  const int64_t intervals = costs.size(-1), batch = costs.numel() / intervals;
  const Schedules<S, C> schedules{read<S>(sigmas), read<C>(costs), write<S>(levels), batch, intervals, num_steps, cubic};
  solve(schedules, [](int64_t count, auto&& body) {
    torch::stable::parallel_for(0, count, 16, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) body(i);
    });
  });
}

Tensor integrate_schedule(const Tensor& sigmas, const Tensor& costs, int64_t num_steps, std::string interpolation) {
  STD_TORCH_CHECK(costs.size(-1) >= 1 && sigmas.size(-1) == costs.size(-1) + 1 && num_steps >= 1,
                  "fastdiff::integrate_schedule: needs K + 1 sigmas, K >= 1 costs and num_steps >= 1");
  const Tensor knots = dense(sigmas), increments = dense(costs);
  std::vector<int64_t> shape(sigmas.sizes().begin(), sigmas.sizes().end());
  shape.back() = num_steps + 1;
  Tensor levels = torch::stable::new_empty(sigmas, shape);
  const bool cubic = interpolation == "pchip";
  const auto of = [&](auto sigma_tag, auto cost_tag) {
    integrate<typename decltype(sigma_tag)::type, typename decltype(cost_tag)::type>(knots, increments, levels, num_steps, cubic);
  };
  const auto of_sigma = [&](auto sigma_tag) {
    if (costs.scalar_type() == ScalarType::Double) return of(sigma_tag, Tag<double>{});
    STD_TORCH_CHECK(costs.scalar_type() == ScalarType::Float, "fastdiff::integrate_schedule: costs must be float32 or float64");
    of(sigma_tag, Tag<float>{});
  };
  if (sigmas.scalar_type() == ScalarType::Double) {
    of_sigma(Tag<double>{});
  } else {
    STD_TORCH_CHECK(sigmas.scalar_type() == ScalarType::Float, "fastdiff::integrate_schedule: sigmas must be float32 or float64");
    of_sigma(Tag<float>{});
  }
  return levels;
}

}  // namespace
}  // namespace fastdiff::FASTDIFF_VARIANT

#include "fastdiff/variant_end.h"

FASTDIFF_CPU_KERNELS(m) {
  using namespace fastdiff::FASTDIFF_VARIANT;
  m.impl("incremental_cost", TORCH_BOX(&incremental_cost));
  m.impl("integrate_schedule", TORCH_BOX(&integrate_schedule));
}
