#pragma once
// Normals in tiles, for loops that use them beside other operands. To be included between variant_begin.h and variant_end.h.

#include "cpu/common.h"
#include "fastdiff/philox.h"

namespace fastdiff::FASTDIFF_VARIANT {

constexpr int64_t kTile = 1024;

struct Noise {
  uint64_t seed;
  Stream stream;
  int64_t offset;

  Noise(const Tensor& seed_tensor, Stream which, int64_t first_sample)
      : seed(static_cast<uint64_t>(*read<int64_t>(seed_tensor))), stream(which), offset(first_sample) {}

  // The normals of elements begin to begin + kTile - 1 of sample b; begin a multiple of 4.
  FD_INLINE void tile(int64_t b, int64_t begin, float* out) const {
    const uint64_t sample = static_cast<uint64_t>(offset + b);
    const uint32_t first = static_cast<uint32_t>(begin / 4);
#pragma omp simd
    for (uint32_t i = 0; i < kTile / 4; ++i) {
      const Words words = philox(seed, stream, sample, first + i);
      float z0, z1, z2, z3;
      box_muller(words.w0, words.w1, z0, z1);
      box_muller(words.w2, words.w3, z2, z3);
      out[4 * i] = z0;
      out[4 * i + 1] = z1;
      out[4 * i + 2] = z2;
      out[4 * i + 3] = z3;
    }
  }
};

// Calls body(begin, end, noise) over tiles of [begin, end), noise[i - begin] being element i's normal.
template <class F>
FD_INLINE void with_noise(const Noise& noise, int64_t b, int64_t begin, int64_t end, F&& body) {
  alignas(64) float normals[kTile];
  for (int64_t i = begin; i < end; i += kTile) {
    noise.tile(b, i, normals);
    body(i, i + kTile < end ? i + kTile : end, normals);
  }
}

}  // namespace fastdiff::FASTDIFF_VARIANT
