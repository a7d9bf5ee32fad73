#pragma once
// Counter-based normals: Philox 4x32-10 (Salmon et al., SC 2011) and Box-Muller in float32. The counter is (element / 4, stream,
// low and high half of the sample's index), the key the seed; fastdiff_kernels/reference/philox.py is the definition.

#include <cstdint>

#include "fastdiff/macros.h"
#include "fastdiff/math.h"

namespace fastdiff::FASTDIFF_VARIANT {

constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u, kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxStep0 = 0x9E3779B9u, kPhiloxStep1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

enum class Stream : uint32_t { lcss = 0, posterior = 1 };

struct Words {
  uint32_t w0, w1, w2, w3;
};

FD_INLINE Words philox(uint64_t seed, Stream stream, uint64_t sample, uint32_t block) {
  uint32_t c0 = block, c1 = static_cast<uint32_t>(stream), c2 = static_cast<uint32_t>(sample), c3 = static_cast<uint32_t>(sample >> 32);
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t p0 = uint64_t{kPhiloxMultiplier0} * c0, p1 = uint64_t{kPhiloxMultiplier1} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    k0 += kPhiloxStep0;
    k1 += kPhiloxStep1;
  }
  return {c0, c1, c2, c3};
}

FD_INLINE void box_muller(uint32_t radius_word, uint32_t angle_word, float& z0, float& z1) {
  // The added half step keeps the uniform away from 0, whose logarithm is infinite.
  const float u = static_cast<float>(radius_word) * 0x1p-32f + 0x1p-33f;
  const float radius = sqrtf(-2.0f * log_normal_range(u));
  float sine, cosine;
  sincospi(static_cast<float>(angle_word) * 0x1p-31f, sine, cosine);
  z0 = radius * cosine;
  z1 = radius * sine;
}

}  // namespace fastdiff::FASTDIFF_VARIANT
