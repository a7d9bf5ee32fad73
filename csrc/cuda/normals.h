#pragma once
// Normals for groups of elements.

#include "cuda/common.h"
#include "fastdiff/philox.h"

namespace fastdiff::FASTDIFF_VARIANT {

// A seed on the device is read there, without waiting for it; one on the CPU goes along as a kernel argument.
struct Noise {
  const int64_t* seed_on_device;
  int64_t seed;
  Stream stream;
  int64_t offset;

  Noise(const Tensor& seed_tensor, Stream which, int64_t first_sample)
      : seed_on_device(seed_tensor.is_cuda() ? read<int64_t>(seed_tensor) : nullptr),
        seed(seed_tensor.is_cuda() ? 0 : *read<int64_t>(seed_tensor)),
        stream(which),
        offset(first_sample) {}

  // The normals of elements i to i + N - 1 of sample b; i and N multiples of 4.
  template <class A, int N>
  __device__ __forceinline__ void draw(int64_t b, int64_t i, A (&z)[N]) const {
    static_assert(N % 4 == 0);
    const uint64_t key = static_cast<uint64_t>(seed_on_device != nullptr ? *seed_on_device : seed);
#pragma unroll
    for (int j = 0; j < N; j += 4) {
      const Words words = philox(key, stream, static_cast<uint64_t>(offset + b), static_cast<uint32_t>((i + j) / 4));
      float z0, z1, z2, z3;
      box_muller(words.w0, words.w1, z0, z1);
      box_muller(words.w2, words.w3, z2, z3);
      z[j] = z0;
      z[j + 1] = z1;
      z[j + 2] = z2;
      z[j + 3] = z3;
    }
  }
};

}  // namespace fastdiff::FASTDIFF_VARIANT
