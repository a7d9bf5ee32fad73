#include "cuda/common.h"
#include "fastdiff/schedule.h"

namespace fastdiff::FASTDIFF_VARIANT {
namespace {

template <class T>
struct CostTerms {
  using A = Acc<T>;
  static constexpr int sums = 1, group = kGroup<T>;
  const T *x, *raw_low, *raw_high;
  PerSample<double> sigma_low, sigma_high;
  double sigma_data;
  int64_t elements;
  A raw_factor = 0, high_factor = 0, input_factor = 0;

  // One thread's work, since most GPUs are slow at float64.
  __device__ __forceinline__ void begin(int64_t b) {
    __shared__ A shared[3];
    if (threadIdx.x == 0) {
      const CostFactors factors = cost_factors(sigma_low[b], sigma_high[b], sigma_data);
      shared[0] = static_cast<A>(factors.raw);
      shared[1] = static_cast<A>(factors.raw_high);
      shared[2] = static_cast<A>(factors.input);
    }
    __syncthreads();
    raw_factor = shared[0];
    high_factor = shared[1];
    input_factor = shared[2];
  }

  __device__ __forceinline__ void operator()(int64_t b, int64_t i, int count, A (&part)[1]) const {
    const int64_t at = b * elements + i;
    A noisy[group], of_low[group], of_high[group];
    load_group(x + at, count, noisy);
    load_group(raw_low + at, count, of_low);
    load_group(raw_high + at, count, of_high);
#pragma unroll
    for (int j = 0; j < group; ++j) {
      part[0] += cost_term<A>(noisy[j], of_low[j], of_high[j], raw_factor, high_factor, input_factor);
    }
  }
};

template <class A>
struct StoreCost {
  A* costs;
  __device__ __forceinline__ void operator()(int64_t b, const double (&sums)[1]) const { costs[b] = static_cast<A>(sums[0]); }
};

Tensor incremental_cost(
    const Tensor& x, const Tensor& raw_low, const Tensor& raw_high, const Tensor& sigma_low, const Tensor& sigma_high, double sigma_data) {
  STD_TORCH_CHECK(sigma_low.scalar_type() == ScalarType::Double && sigma_high.scalar_type() == ScalarType::Double,
                  "fastdiff::incremental_cost: sigma_low and sigma_high must be float64");
  const OnDevice device(x);
  const Tensor inputs = dense(x), lows = dense(raw_low), highs = dense(raw_high);
  Tensor out = empty_batch(x);
  dispatch(x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    const CostTerms<T> terms{read<T>(inputs),
                             read<T>(lows),
                             read<T>(highs),
                             PerSample<double>(sigma_low),
                             PerSample<double>(sigma_high),
                             sigma_data,
                             Samples(x).elements};
    reduce_samples("incremental_cost", device, x, terms, StoreCost<A>{write<A>(out)});
  });
  return out;
}

// More would leave too few registers for a thread.
constexpr int kScanThreads = 512;
// Intervals that a thread sums before the threads' sums are put together.
constexpr int kRun = 4;

__device__ __forceinline__ double warp_maximum(double value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    const double other = __shfl_xor_sync(~0u, value, offset);
    value = other > value ? other : value;
  }
  return value;
}

__device__ __forceinline__ double warp_running_sum(double value) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const double other = __shfl_up_sync(~0u, value, offset);
    if (lane >= offset) value += other;
  }
  return value;
}

// The largest of the threads' values, in every thread. `shared` has room for one value a warp.
__device__ __forceinline__ double block_maximum(double value, double* shared) {
  value = warp_maximum(value);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  double result = shared[0];
  for (int w = 1; w < blockDim.x / 32; ++w) result = shared[w] > result ? shared[w] : result;
  __syncthreads();
  return result;
}

// What the threads before this one sum to; `total` becomes the sum of all.
__device__ __forceinline__ double block_sum_before(double value, double* shared, double& total) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const double inclusive = warp_running_sum(value);
  if (lane == 31) shared[warp] = inclusive;
  __syncthreads();
  if (warp == 0) {
    const double of_warps = warp_running_sum(lane < warps ? shared[lane] : 0);
    __syncwarp();
    if (lane < warps) shared[lane] = of_warps;
  }
  __syncthreads();
  total = shared[warps - 1];
  const double in_warp = __shfl_up_sync(~0u, inclusive, 1);
  const double before = (warp > 0 ? shared[warp - 1] : 0) + (lane > 0 ? in_warp : 0);
  __syncthreads();
  return before;
}

// Whether knots and costs can be integrated, and the largest cost.
template <class S, class C>
__device__ __forceinline__ bool inspect(const Knots<S, C>& knots, double* shared, double& highest) {
  bool rising = true, falling = true, usable = true;
  highest = 0;
  for (int64_t j = threadIdx.x; j < knots.intervals; j += blockDim.x) {
    const double cost = static_cast<double>(knots.costs[j]);
    rising &= knots.sigmas[j + 1] > knots.sigmas[j];
    falling &= knots.sigmas[j + 1] < knots.sigmas[j];
    usable &= cost >= 0 && isfinite(cost);
    highest = cost > highest ? cost : highest;
  }
  highest = block_maximum(highest, shared);
  const bool monotone = __syncthreads_and(rising) || __syncthreads_and(falling);
  return __syncthreads_and(usable) && monotone && highest > 0 && isfinite(knots.sigmas[0]) && isfinite(knots.sigmas[knots.intervals]);
}

// Running sums of the widths: lengths[0 ... intervals].
template <class S, class C>
__device__ __forceinline__ double accumulate(const Knots<S, C>& knots, double* shared, double* lengths) {
  double carry = 0;
  if (threadIdx.x == 0) lengths[0] = 0;
  for (int64_t base = 0; base < knots.intervals; base += int64_t{blockDim.x} * kRun) {
    const int64_t first = base + int64_t{threadIdx.x} * kRun;
    double running[kRun], sum = 0, total;
#pragma unroll
    for (int r = 0; r < kRun; ++r) {
      sum += first + r < knots.intervals ? knots.width(first + r) : 0;
      running[r] = sum;
    }
    const double before = carry + block_sum_before(sum, shared, total);
#pragma unroll
    for (int r = 0; r < kRun; ++r) {
      if (first + r < knots.intervals) lengths[first + r + 1] = before + running[r];
    }
    carry += total;
  }
  // Makes what the threads have written visible to the others.
  __syncthreads();
  return lengths[knots.intervals];
}

// The last interval that begins at or before `length`.
__device__ __forceinline__ int64_t find_interval(const double* lengths, int64_t intervals, double length) {
  int64_t low = 0, high = intervals;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    if (lengths[middle] <= length) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

template <class S, class C>
__global__ void __launch_bounds__(kScanThreads, 1)
    integrate_kernel(const S* sigmas, const C* costs, S* levels, double* lengths, int64_t intervals, int64_t steps, bool cubic) {
  __shared__ double shared[kScanThreads / 32];
  const int64_t b = blockIdx.x;
  Knots<S, C> knots{sigmas + b * (intervals + 1), costs + b * intervals, intervals, 0, cubic};
  S* out = levels + b * (steps + 1);
  double highest;
  if (!inspect(knots, shared, highest)) {
    for (int64_t i = threadIdx.x; i <= steps; i += blockDim.x) out[i] = static_cast<S>(nan(""));
    return;
  }
  knots.floor = cost_floor(highest);
  double* own_lengths = lengths + b * (intervals + 1);
  const double total = accumulate(knots, shared, own_lengths);
  for (int64_t i = threadIdx.x; i <= steps; i += blockDim.x) {
    if (i == 0 || i == steps) {
      out[i] = knots.sigmas[i == 0 ? 0 : intervals];
      continue;
    }
    const double target = target_length(i, steps, total);
    const int64_t j = find_interval(own_lengths, intervals, target);
    out[i] = static_cast<S>(level_in(knots, j, target - own_lengths[j]));
  }
}

template <class S, class C>
void integrate(const OnDevice& device, const Tensor& sigmas, const Tensor& costs, const Tensor& levels, int64_t num_steps, bool cubic) {
  const int64_t intervals = costs.size(-1), batch = costs.numel() / intervals;
  if (batch == 0) return;
  const int64_t scratch = batch * (intervals + 1);
  const Tensor lengths = torch::stable::new_empty(sigmas, {scratch}, ScalarType::Double);
  // A function of the number of knots alone, as the rounding of the sums is.
  const int64_t runs = (intervals + kRun - 1) / kRun;
  const auto threads = static_cast<unsigned>(std::clamp<int64_t>((runs + 31) / 32 * 32, 32, kScanThreads));
  integrate_kernel<S, C><<<grid_size(batch), threads, 0, device.stream()>>>(
      read<S>(sigmas), read<C>(costs), write<S>(levels), write<double>(lengths), intervals, num_steps, cubic);
  check_launch("integrate_schedule");
}

Tensor integrate_schedule(const Tensor& sigmas, const Tensor& costs, int64_t num_steps, std::string interpolation) {
  STD_TORCH_CHECK(costs.size(-1) >= 1 && sigmas.size(-1) == costs.size(-1) + 1 && num_steps >= 1,
                  "fastdiff::integrate_schedule: needs K + 1 sigmas, K >= 1 costs and num_steps >= 1");
  const OnDevice device(sigmas);
  const Tensor knots = dense(sigmas), increments = dense(costs);
  std::vector<int64_t> shape(sigmas.sizes().begin(), sigmas.sizes().end());
  shape.back() = num_steps + 1;
  Tensor levels = torch::stable::new_empty(sigmas, shape);
  const bool cubic = interpolation == "pchip";
  const auto of = [&](auto sigma_tag, auto cost_tag) {
    using S = typename decltype(sigma_tag)::type;
    using C = typename decltype(cost_tag)::type;
    integrate<S, C>(device, knots, increments, levels, num_steps, cubic);
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

STABLE_TORCH_LIBRARY_IMPL(fastdiff_cuda, CUDA, m) {
  using namespace fastdiff::FASTDIFF_VARIANT;
  m.impl("incremental_cost", TORCH_BOX(&incremental_cost));
  m.impl("integrate_schedule", TORCH_BOX(&integrate_schedule));
}
