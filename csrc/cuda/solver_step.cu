#include "cuda/common.h"
#include "fastdiff/skipping.h"

namespace fastdiff::FASTDIFF_VARIANT {
namespace {

// One call of solver_step, for tensors of T. Null pointers are arguments not given: the branches on them are the same for all threads.
template <class T>
struct StepTerms {
  using A = Acc<T>;
  static constexpr int sums = 2, group = kGroup<T>;
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
  // Of the block's sample: the row of `denoised`, below 0 where it reuses; whether it has two predictions, and how far beyond the older.
  int64_t row = 0;
  A ahead = 0;
  bool line = false;

  __device__ __forceinline__ int64_t row_of(int64_t b) const {
    return rows != nullptr ? rows[b * row_stride] : (denoised != nullptr ? b : -1);
  }

  __device__ __forceinline__ void begin(int64_t b) {
    row = row_of(b);
    if (row >= 0 || older == nullptr || state == nullptr) return;
    // One thread's work, since most GPUs are slow at float64.
    __shared__ A shared_ahead;
    const double* own = state + b * state_stride;
    if (threadIdx.x == 0) shared_ahead = static_cast<A>(continuation(own, reuse_at));
    __syncthreads();
    ahead = shared_ahead;
    line = own[kStored] >= 2;
  }

  __device__ __forceinline__ void operator()(int64_t b, int64_t i, int count, A (&part)[2]) const {
    const int64_t at = b * elements + i;
    A here[group], guided[group], error[group], move[group], next_value[group];
    load_group(x + at, count, here);
    const bool computed = row >= 0;
    if (computed) {
      compute(at, row * elements + i, count, here, guided, error);
    } else {
      reuse(at, count, here, guided, error);
    }
    if (noise != nullptr) write_noise(at, count, computed, error);
    if (used != nullptr) store_group(used + at, count, guided);
    advance(at, count, computed && point != nullptr, here, guided, error, move, next_value);
    store_group(next + at, count, next_value);
    if (criterion != Criterion::none) measure(at, count, here, move, part);
  }

 private:
  __device__ __forceinline__ void compute(
      int64_t at, int64_t from, int count, const A (&here)[group], A (&guided)[group], A (&error)[group]) const {
    load_group(denoised + from, count, guided);
    if (uncond != nullptr) {
      A without[group];
      load_group(uncond + from, count, without);
#pragma unroll
      for (int j = 0; j < group; ++j) guided[j] = without[j] + scalars.guidance * (guided[j] - without[j]);
    }
    if (point == nullptr) {
#pragma unroll
      for (int j = 0; j < group; ++j) error[j] = here[j] - guided[j];
    } else {
      load_group(point + at, count, error);
#pragma unroll
      for (int j = 0; j < group; ++j) error[j] -= guided[j];
    }
  }

  __device__ __forceinline__ void reuse(
      int64_t at, int count, const A (&here)[group], A (&guided)[group], A (&error)[group]) const {
    load_group(newest + at, count, error);
    if (line) {
      A past[group];
      load_group(older + at, count, past);
#pragma unroll
      for (int j = 0; j < group; ++j) error[j] = past[j] + ahead * (error[j] - past[j]);
    }
#pragma unroll
    for (int j = 0; j < group; ++j) {
      error[j] *= scalars.sigma;
      guided[j] = here[j] - error[j];
    }
  }

  __device__ __forceinline__ void write_noise(int64_t at, int count, bool computed, const A (&error)[group]) const {
    A fresh[group];
    if (computed) {
#pragma unroll
      for (int j = 0; j < group; ++j) fresh[j] = error[j] * scalars.noise_factor;
    } else {
      load_group(newest + at, count, fresh);
    }
    store_group(noise + at, count, fresh);
  }

  __device__ __forceinline__ void advance(int64_t at, int count, bool second, const A (&here)[group], A (&guided)[group], A (&error)[group],
                                          A (&move)[group], A (&next_value)[group]) const {
    const StepScalars<A>& c = scalars;
    if (second) {
      A middle[group];
      load_group(point + at, count, middle);
#pragma unroll
      for (int j = 0; j < group; ++j) {
        move[j] = A(0.5) * (middle[j] - here[j]) + c.second * error[j];
        next_value[j] = here[j] + move[j];
      }
      return;
    }
    if (previous != nullptr) {
      A last[group];
      load_group(previous + at, count, last);
#pragma unroll
      for (int j = 0; j < group; ++j) {
        const A extra = c.weight * (guided[j] - last[j]);
        guided[j] += extra;
        error[j] -= extra;
      }
    }
#pragma unroll
    for (int j = 0; j < group; ++j) {
      move[j] = -c.replaced * error[j];
      next_value[j] = c.from_x ? here[j] + move[j] : guided[j] + c.kept * error[j];
    }
  }

  __device__ __forceinline__ void measure(int64_t at, int count, const A (&here)[group], const A (&move)[group], A (&part)[2]) const {
    const StepScalars<A>& c = scalars;
    const bool third = before1 != nullptr && before0 != nullptr;
    A one[group] = {}, zero[group] = {};
    if (third) {
      load_group(before1 + at, count, one);
      load_group(before0 + at, count, zero);
    }
#pragma unroll
    for (int j = 0; j < group; ++j) {
      if (j >= count) continue;
      const A change = c.scale_next * move[j] + c.scale_change * here[j];
      part[1] += magnitude(change);
      if (third) {
        const A older_value = c.scale1 * one[j];
        part[0] += magnitude(change - A(2) * (c.scale * here[j] - older_value) + (older_value - c.scale0 * zero[j]));
      }
    }
  }
};

// What the state becomes of a step's sums.
struct Decision {
  const double* state;
  double* after;
  const int64_t* rows;
  int64_t row_stride;
  bool computes, stores, has_third;
  Criterion criterion;
  double at, threshold, max_skip, count;

  __device__ __forceinline__ void operator()(int64_t r, const double (&sums)[2]) const {
    double own[kStateWidth];
    for (int k = 0; k < kStateWidth; ++k) own[k] = state[r * kStateWidth + k];
    if (stores && (rows != nullptr ? rows[r * row_stride] >= 0 : computes)) note_prediction(own, at);
    decide(own, criterion, has_third ? sums[0] / count : nan(""), sums[1] / count, threshold, max_skip);
    for (int k = 0; k < kStateWidth; ++k) after[r * kStateWidth + k] = own[k];
  }
};

// Keeps a sample's sums, where the decision is the whole batch's.
struct StoreSums {
  double* sums;
  __device__ __forceinline__ void operator()(int64_t b, const double (&of_sample)[2]) const {
    sums[2 * b] = of_sample[0];
    sums[2 * b + 1] = of_sample[1];
  }
};

// One warp for the one decision of a batch, in an order that depends on the batch's size alone.
__global__ void __launch_bounds__(32) decide_kernel(int64_t batch, const double* sums, Decision decision) {
  double total[2] = {};
  for (int64_t b = threadIdx.x; b < batch; b += 32) {
    total[0] += sums[2 * b];
    total[1] += sums[2 * b + 1];
  }
  for (double& part : total) part = warp_sum(part);
  if (threadIdx.x == 0) decision(0, total);
}

// What was stored, where nothing is decided.
__global__ void __launch_bounds__(32) note_kernel(int64_t decisions, Decision decision) {
  const int64_t r = int64_t{blockIdx.x} * 32 + threadIdx.x;
  const double sums[2] = {};
  if (r < decisions) decision(r, sums);
}

// A step without a decision.
template <class T>
__global__ void __launch_bounds__(kThreads) step_kernel(Samples samples, int64_t chunks, StepTerms<T> terms) {
  const int64_t b = blockIdx.x / chunks, begin = blockIdx.x % chunks * kChunk;
  const int64_t end = begin + kChunk < samples.elements ? begin + kChunk : samples.elements;
  terms.begin(b);
  Acc<T> unused[2] = {};
  for (int64_t i = begin + int64_t{threadIdx.x} * terms.group; i < end; i += int64_t{blockDim.x} * terms.group) {
    terms(b, i, static_cast<int>(end - i < terms.group ? end - i : terms.group), unused);
  }
}

template <class T>
void run(const OnDevice& device, const Tensor& x, const StepTerms<T>& terms, const Decision& decision, int64_t decisions) {
  constexpr const char* where = "solver_step";
  const Samples samples(x);
  if (terms.criterion == Criterion::none) {
    const int64_t chunks = (samples.elements + kChunk - 1) / kChunk;
    if (samples.batch * chunks > 0) {
      const unsigned threads = block_size(samples.elements, StepTerms<T>::group);
      step_kernel<T><<<grid_size(samples.batch * chunks), threads, 0, device.stream()>>>(samples, chunks, terms);
      check_launch(where);
    }
    if (decisions == 0) return;
    note_kernel<<<grid_size((decisions + 31) / 32), 32, 0, device.stream()>>>(decisions, decision);
    check_launch(where);
    return;
  }
  if (decisions == samples.batch) {
    reduce_samples(where, device, x, terms, decision);
    return;
  }
  const Tensor sums = torch::stable::new_empty(x, {2 * samples.batch}, ScalarType::Double);
  reduce_samples(where, device, x, terms, StoreSums{write<double>(sums)});
  decide_kernel<<<1, 32, 0, device.stream()>>>(samples.batch, read<double>(sums), decision);
  check_launch(where);
}

inline Criterion criterion_of(const std::string& mode) {
  if (mode == "official") return Criterion::official;
  if (mode == "tensor") return Criterion::tensor;
  STD_TORCH_CHECK(mode == "none", "fastdiff::solver_step: mode must be 'official', 'tensor' or 'none'");
  return Criterion::none;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> solver_step(
    const Tensor& x, std::optional<Tensor> denoised, std::optional<Tensor> uncond, std::optional<Tensor> rows, std::optional<Tensor> newest,
    std::optional<Tensor> older, std::optional<Tensor> previous, std::optional<Tensor> point, std::optional<Tensor> before1,
    std::optional<Tensor> before0, std::optional<Tensor> state, double sigma, double sigma_next, double guidance, double at, double reuse_at,
    double previous_weight, double scale_next, double scale, double scale1, double scale0, std::string mode, double threshold,
    int64_t max_skip, bool keep_noise, bool keep_denoised) {
  STD_TORCH_CHECK(denoised || newest, "fastdiff::solver_step: needs denoised or newest");
  const Criterion criterion = criterion_of(mode);
  STD_TORCH_CHECK(state || criterion == Criterion::none, "fastdiff::solver_step: needs a state to decide");
  const OnDevice device(x);
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
    const auto of = [](const std::optional<Tensor>& tensor) -> const T* { return tensor ? read<T>(*tensor) : nullptr; };
    const int64_t elements = Samples(x).elements, pooled = decisions == batch ? 1 : batch;
    const int64_t* row = rows ? read<int64_t>(*rows) : nullptr;
    const int64_t row_stride = rows ? rows->stride(0) : 0;
    const StepTerms<T> terms{step_scalars<A>(sigma, sigma_next, guidance, previous_weight, point.has_value(), scales),
                             elements,
                             criterion,
                             row,
                             row_stride,
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
    const Decision decision{terms.state,
                            state ? write<double>(after) : nullptr,
                            row,
                            row_stride,
                            denoised.has_value(),
                            keep_noise,
                            criterion == Criterion::tensor && before1 && before0,
                            criterion,
                            at,
                            threshold,
                            static_cast<double>(max_skip),
                            static_cast<double>(pooled) * static_cast<double>(elements)};
    run(device, x, terms, decision, decisions);
  });
  return {next, noise, used, after};
}

}  // namespace
}  // namespace fastdiff::FASTDIFF_VARIANT

STABLE_TORCH_LIBRARY_IMPL(fastdiff_cuda, CUDA, m) {
  using namespace fastdiff::FASTDIFF_VARIANT;
  m.impl("solver_step", TORCH_BOX(&solver_step));
}
