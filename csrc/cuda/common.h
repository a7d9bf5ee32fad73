#pragma once
// What every CUDA family uses: torch's stream and device, dtypes, groups of elements, and sums whose result depends on the sample alone.

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "fastdiff/macros.h"
#include "fastdiff/math.h"
#include "fastdiff/tensors.h"

namespace fastdiff::FASTDIFF_VARIANT {

inline void check_cuda(cudaError_t error, const char* where) {
  STD_TORCH_CHECK(error == cudaSuccess, "fastdiff: ", where, ": ", cudaGetErrorString(error));
}

inline void check_launch(const char* where) { check_cuda(cudaGetLastError(), where); }

// torch's current stream of a device. The function is looked up in the running torch, so that this library also loads where torch has no
// CUDA; libtorch_cuda need not be in the global scope, hence the second look.
inline cudaStream_t current_stream(int32_t device) {
  using Lookup = AOTITorchError (*)(int32_t, void**);
  constexpr const char* name = "aoti_torch_get_current_cuda_stream";
  static const Lookup lookup = [] {
    void* symbol = dlsym(RTLD_DEFAULT, name);
    if (symbol == nullptr) {
      if (void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD)) symbol = dlsym(library, name);
    }
    return reinterpret_cast<Lookup>(symbol);
  }();
  STD_TORCH_CHECK(lookup != nullptr, "fastdiff: the running torch has no ", name, "; install torch >= 2.11 built with CUDA");
  void* stream = nullptr;
  STD_TORCH_CHECK(lookup(device, &stream) == AOTI_TORCH_SUCCESS, "fastdiff: torch did not give the current stream of CUDA device ", device);
  return static_cast<cudaStream_t>(stream);
}

// Makes a tensor's device current while it lives, and knows torch's stream there.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& x) : guard_(x.get_device_index()), stream_(current_stream(x.get_device_index())) {
    // torch's guard speaks to torch's CUDA runtime; this library has its own.
    check_cuda(cudaSetDevice(x.get_device_index()), "cudaSetDevice");
  }
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

inline unsigned grid_size(int64_t blocks) {
  STD_TORCH_CHECK(blocks <= INT32_MAX, "fastdiff: the tensors are too large for one launch (", blocks, " blocks)");
  return static_cast<unsigned>(blocks);
}

template <class T>
FD_INLINE Acc<T> load(T x) {
  return static_cast<Acc<T>>(x);
}

template <class T>
FD_INLINE T store(Acc<T> x) {
  return static_cast<T>(x);
}

// A constant of shape [1] or [B], readable in kernels.
template <class A>
class PerSample {
 public:
  explicit PerSample(const Tensor& x) : data_(read<A>(x)), stride_(x.numel() == 1 ? 0 : x.stride(0)) {}
  __device__ __forceinline__ A operator[](int64_t b) const { return data_[b * stride_]; }

 private:
  const A* data_;
  int64_t stride_;
};

// A batch of contiguous samples.
struct Samples {
  int64_t batch, elements;
  Samples(int64_t batch_size, int64_t sample_elements) : batch(batch_size), elements(sample_elements) {}
  explicit Samples(const Tensor& x) : batch(x.size(0)), elements(x.size(0) ? x.numel() / x.size(0) : 0) {}
};

constexpr int kThreads = 256;
// What a block takes of one sample; a multiple of every group.
constexpr int64_t kChunk = 8192;

// Elements that a thread takes at a time: 16 bytes or more, and whole blocks of four normals.
template <class T>
constexpr int kGroup = sizeof(T) >= 4 ? 4 : 8;

template <class T>
__device__ __forceinline__ bool fills_vectors(const T* address, int count) {
  return count == kGroup<T> && reinterpret_cast<uintptr_t>(address) % 16 == 0;
}

// A group's first `count` elements; zeros stand for the others.
template <class T>
__device__ __forceinline__ void load_group(const T* source, int count, Acc<T> (&out)[kGroup<T>]) {
  constexpr int vectors = kGroup<T> * sizeof(T) / 16;
  if (fills_vectors(source, count)) {
    uint4 raw[vectors];
#pragma unroll
    for (int i = 0; i < vectors; ++i) raw[i] = reinterpret_cast<const uint4*>(source)[i];
#pragma unroll
    for (int i = 0; i < kGroup<T>; ++i) out[i] = load(reinterpret_cast<const T*>(raw)[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kGroup<T>; ++i) out[i] = i < count ? load(source[i]) : Acc<T>(0);
  }
}

// Writes a group's first `count` elements.
template <class T>
__device__ __forceinline__ void store_group(T* target, int count, const Acc<T> (&values)[kGroup<T>]) {
  constexpr int vectors = kGroup<T> * sizeof(T) / 16;
  if (fills_vectors(target, count)) {
    uint4 raw[vectors];
#pragma unroll
    for (int i = 0; i < kGroup<T>; ++i) reinterpret_cast<T*>(raw)[i] = store<T>(values[i]);
#pragma unroll
    for (int i = 0; i < vectors; ++i) reinterpret_cast<uint4*>(target)[i] = raw[i];
  } else {
#pragma unroll
    for (int i = 0; i < kGroup<T>; ++i) {
      if (i < count) target[i] = store<T>(values[i]);
    }
  }
}

// The threads of a block: no more than a sample has groups, and a function of the sample's length alone.
inline unsigned block_size(int64_t elements, int group) {
  const int64_t groups = (std::min(elements, kChunk) + group - 1) / group;
  return static_cast<unsigned>(std::clamp<int64_t>((groups + 31) / 32 * 32, 32, kThreads));
}

template <class Body>
__global__ void __launch_bounds__(kThreads) group_kernel(Samples samples, int64_t chunks, Body body) {
  const int64_t b = blockIdx.x / chunks, begin = blockIdx.x % chunks * kChunk;
  const int64_t end = begin + kChunk < samples.elements ? begin + kChunk : samples.elements;
  for (int64_t i = begin + int64_t{threadIdx.x} * Body::group; i < end; i += int64_t{blockDim.x} * Body::group) {
    body(b, i, static_cast<int>(end - i < Body::group ? end - i : Body::group));
  }
}

// Calls body(b, i, count) on the device for every group of elements i ... i + count - 1 of every sample b. Body is a functor with a
// device operator() and `static constexpr int group`, the i being its multiples.
template <class Body>
void for_each_group(const char* where, const OnDevice& device, const Samples& samples, const Body& body) {
  const int64_t chunks = (samples.elements + kChunk - 1) / kChunk;
  if (samples.batch * chunks == 0) return;
  group_kernel<<<grid_size(samples.batch * chunks), block_size(samples.elements, Body::group), 0, device.stream()>>>(samples, chunks, body);
  check_launch(where);
}

// Sum over the threads of a warp, in an order that is always the same; thread 0 has it.
__device__ __forceinline__ double warp_sum(double value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_down_sync(~0u, value, offset);
  return value;
}

// Likewise over a block of whole warps.
template <int K>
__device__ __forceinline__ void block_sum(double (&sums)[K]) {
  __shared__ double of_warp[K][kThreads / 32];
  const int warps = blockDim.x / 32;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    sums[k] = warp_sum(sums[k]);
    if (threadIdx.x % 32 == 0) of_warp[k][threadIdx.x / 32] = sums[k];
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    for (int w = 1; w < warps; ++w) sums[k] += of_warp[k][w];
  }
}

template <class Terms, class Finish>
__global__ void __launch_bounds__(kThreads) reduce_kernel(Samples samples, int64_t chunks, double* partial, Terms terms, Finish finish) {
  constexpr int K = Terms::sums;
  const int64_t b = blockIdx.x / chunks, begin = blockIdx.x % chunks * kChunk;
  const int64_t end = begin + kChunk < samples.elements ? begin + kChunk : samples.elements;
  if constexpr (requires { terms.begin(b); }) terms.begin(b);
  typename Terms::A part[K] = {};
  for (int64_t i = begin + int64_t{threadIdx.x} * Terms::group; i < end; i += int64_t{blockDim.x} * Terms::group) {
    terms(b, i, static_cast<int>(end - i < Terms::group ? end - i : Terms::group), part);
  }
  double sums[K];
#pragma unroll
  for (int k = 0; k < K; ++k) sums[k] = part[k];
  block_sum<K>(sums);
  if (threadIdx.x != 0) return;
  if (partial == nullptr) {
    finish(b, sums);
  } else {
#pragma unroll
    for (int k = 0; k < K; ++k) partial[int64_t{blockIdx.x} * K + k] = sums[k];
  }
}

template <int K, class Finish>
__global__ void __launch_bounds__(kThreads) finish_kernel(int64_t batch, int64_t chunks, const double* partial, Finish finish) {
  const int64_t b = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / 32;
  if (b >= batch) return;
  double sums[K] = {};
  for (int64_t c = threadIdx.x % 32; c < chunks; c += 32) {
#pragma unroll
    for (int k = 0; k < K; ++k) sums[k] += partial[(b * chunks + c) * K + k];
  }
#pragma unroll
  for (int k = 0; k < K; ++k) sums[k] = warp_sum(sums[k]);
  if (threadIdx.x % 32 == 0) finish(b, sums);
}

// Sums over each sample. Terms is a functor: terms(b, i, count, part) adds the terms of a group of elements (see for_each_group) to
// A part[sums]; it declares `using A` and the constants `sums` and `group`. If it has begin(b), all threads of the block call that first.
// finish(b, const double (&sums)[..]) takes a sample's totals.
// One launch where a sample fits a block, two where it does not; the order of the additions depends on the sample's length alone.
template <class Terms, class Finish>
void reduce_samples(const char* where, const OnDevice& device, const Tensor& x, const Terms& terms, const Finish& finish) {
  constexpr int K = Terms::sums;
  const Samples samples(x);
  if (samples.batch == 0) return;
  const int64_t chunks = std::max<int64_t>(1, (samples.elements + kChunk - 1) / kChunk), blocks = samples.batch * chunks;
  std::optional<Tensor> partial;
  if (chunks > 1) partial = torch::stable::new_empty(x, {blocks * K}, ScalarType::Double);
  double* partial_sums = partial ? write<double>(*partial) : nullptr;
  reduce_kernel<<<grid_size(blocks), block_size(samples.elements, Terms::group), 0, device.stream()>>>(
      samples, chunks, partial_sums, terms, finish);
  check_launch(where);
  if (!partial) return;
  finish_kernel<K><<<grid_size((samples.batch + kThreads / 32 - 1) / (kThreads / 32)), kThreads, 0, device.stream()>>>(
      samples.batch, chunks, partial_sums, finish);
  check_launch(where);
}

}  // namespace fastdiff::FASTDIFF_VARIANT
