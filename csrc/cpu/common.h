#pragma once
// What every CPU family uses: reading dtypes, constants per sample, reductions whose result does not depend on the number of threads.
// To be included between variant_begin.h and variant_end.h, after cpu/torch.h.

#include "fastdiff/macros.h"
#include "fastdiff/math.h"
#include "fastdiff/tensors.h"

namespace fastdiff::FASTDIFF_VARIANT {

FD_INLINE float load(float x) { return x; }
FD_INLINE double load(double x) { return x; }
FD_INLINE float load(BFloat16 x) { return float_of(static_cast<uint32_t>(x.x) << 16); }
// By bits, since compilers do not vectorise the hardware's conversion. The exponents differ by 112; infinity and NaN keep all ones there.
FD_INLINE float load(Half x) {
  const uint32_t shifted = static_cast<uint32_t>(x.x & 0x7fffu) << 13;
  const uint32_t finite = bits_of(float_of(shifted) * 0x1p112f);
  const uint32_t magnitude = shifted >= 0x0f800000u ? shifted | 0x7f800000u : finite;
  return float_of(magnitude | static_cast<uint32_t>(x.x & 0x8000u) << 16);
}

template <class T>
FD_INLINE T store(Acc<T> x) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    const uint32_t bits = bits_of(x);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return BFloat16(static_cast<uint16_t>(x != x ? 0x7fc0u : rounded), BFloat16::from_bits());
  } else if constexpr (std::is_same_v<T, Half>) {
#if defined(__FLT16_MAX__)
    const _Float16 half = static_cast<_Float16>(x);
    Half result;
    memcpy(&result, &half, sizeof half);
    return result;
#else
    return Half(x);
#endif
  } else {
    return x;
  }
}

// A constant of shape [1] or [B].
template <class A>
class PerSample {
 public:
  explicit PerSample(const Tensor& x) : data_(read<A>(x)), stride_(x.numel() == 1 ? 0 : x.stride(0)) {}
  A operator[](int64_t b) const { return data_[b * stride_]; }

 private:
  const A* data_;
  int64_t stride_;
};

// A batch of contiguous samples.
struct Samples {
  int64_t batch, elements;
  explicit Samples(const Tensor& x) : batch(x.size(0)), elements(x.size(0) ? x.numel() / x.size(0) : 0) {}
};

// Long enough to amortise a task, short enough for a sample to be spread over threads. A multiple of 4: the normals come in fours.
constexpr int64_t kChunk = 16384;

// Short enough for a few operands to stay in the first cache between one loop over it and the next. The run length of sum().
constexpr int64_t kRunLength = 1024;

// Calls body(first, last) for every run of [begin, end), in order.
template <class F>
FD_INLINE void for_each_run(int64_t begin, int64_t end, F&& body) {
  for (int64_t i = begin; i < end; i += kRunLength) body(i, i + kRunLength < end ? i + kRunLength : end);
}

// Calls body(b, begin, end) for every chunk of every sample, in parallel.
template <class F>
void for_each_chunk(const Samples& samples, F&& body) {
  const int64_t chunks = (samples.elements + kChunk - 1) / kChunk;
  const int64_t grain = std::max<int64_t>(1, kChunk / std::max<int64_t>(samples.elements, 1));
  torch::stable::parallel_for(0, samples.batch * chunks, grain, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t b = i / chunks, begin = i % chunks * kChunk;
      body(b, begin, std::min(begin + kChunk, samples.elements));
    }
  });
}

// Sums K quantities over each sample: body(b, begin, end) gives a chunk's std::array<double, K>, finish(b, sums) takes a sample's.
// The chunks are summed in their order, whatever thread did which.
template <size_t K, class F, class G>
void reduce_samples(const Samples& samples, F&& body, G&& finish) {
  const int64_t chunks = std::max<int64_t>(1, (samples.elements + kChunk - 1) / kChunk);
  std::vector<std::array<double, K>> partial(samples.batch * chunks, std::array<double, K>{});
  for_each_chunk(samples, [&](int64_t b, int64_t begin, int64_t end) { partial[b * chunks + begin / kChunk] = body(b, begin, end); });
  for (int64_t b = 0; b < samples.batch; ++b) {
    std::array<double, K> sums{};
    for (int64_t c = 0; c < chunks; ++c) {
      for (size_t k = 0; k < K; ++k) sums[k] += partial[b * chunks + c][k];
    }
    finish(b, sums);
  }
}

// Sum of term(i) over [begin, end): in A over runs, in double over the runs. The lanes are the same for every instruction set, and many
// enough for each to add few terms, which keeps the error near that of a pairwise sum.
template <class A, class F>
FD_INLINE double sum(int64_t begin, int64_t end, F&& term) {
  constexpr int64_t run = kRunLength, lanes = 128 / sizeof(A);
  double total = 0;
  for (int64_t i = begin; i < end; i += run) {
    const int64_t stop = i + run < end ? i + run : end, whole = i + (stop - i) / lanes * lanes;
    A part[lanes] = {};
    for (int64_t j = i; j < whole; j += lanes) {
#pragma omp simd
      for (int64_t k = 0; k < lanes; ++k) part[k] += term(j + k);
    }
    for (int64_t j = whole; j < stop; ++j) part[j - whole] += term(j);
    for (int64_t width = lanes / 2; width > 0; width /= 2) {
#pragma omp simd
      for (int64_t k = 0; k < width; ++k) part[k] += part[k + width];
    }
    total += part[0];
  }
  return total;
}

}  // namespace fastdiff::FASTDIFF_VARIANT
