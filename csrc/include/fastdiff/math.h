#pragma once
// float32 functions without branches or tables, so that loops over them vectorise; the same on CPU and GPU up to fused multiply-adds.

#include <cmath>
#include <cstdint>
#include <cstring>

#include "fastdiff/macros.h"

namespace fastdiff::FASTDIFF_VARIANT {

FD_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

FD_INLINE float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// Natural logarithm of a normal positive number. x = 2^e m with m in [sqrt(1/2), sqrt(2)); log(1 + f) = f - (h - s (h + r)) with
// s = f / (2 + f), h = f^2 / 2 and r the odd terms of the series of log((1 + s) / (1 - s)) beyond the first.
FD_INLINE float log_normal_range(float x) {
  const uint32_t shifted = bits_of(x) - 0x3f3504f3u;  // bits of sqrt(1/2)
  const float e = static_cast<float>(static_cast<int32_t>(shifted) >> 23);
  const float f = float_of((shifted & 0x007fffffu) + 0x3f3504f3u) - 1.0f;
  const float s = f / (2.0f + f);
  const float z = s * s;
  const float r = z * (2.0f / 3 + z * (2.0f / 5 + z * (2.0f / 7 + z * (2.0f / 9))));
  const float h = 0.5f * f * f;
  // log(2) in two parts, the first of which has few enough bits for e times it to be exact.
  return e * 0.693145752f + (f - (h - (s * (h + r) + e * 1.42860677e-6f)));
}

// sin and cos of pi x for x in [0, 2]: an exact reduction to [-1/4, 1/4], then Taylor polynomials. The sine's leading term is
// 201/64 t + (pi - 201/64) t with the first product exact, in two halves of t, so that one rounding alone is of the result's size;
// the cosine gets back what 1 - (pi t)^2 / 2 lost to rounding.
FD_INLINE void sincospi(float x, float& sine, float& cosine) {
  const int32_t quadrant = static_cast<int32_t>(2.0f * x + 0.5f);
  const float t = x - 0.5f * static_cast<float>(quadrant);
  const float u = t * t;
  const float high = float_of(bits_of(t) & 0xfffff000u), low = t - high;
  const float rest = t * (9.67653590e-4f + u * (-5.16771278f + u * (2.55016404f + u * (-0.599264529f + u * 0.0821458866f))));
  const float s = high * 3.140625f + (low * 3.140625f + rest);
  const float half_square = u * 4.93480220f, near = 1.0f - half_square;
  const float c = near + (((1.0f - near) - half_square) + u * u * (4.05871213f + u * (-1.33526277f + u * (0.235330630f + u * -0.0258068913f))));
  const bool swap = quadrant & 1;
  const float sine_size = swap ? c : s, cosine_size = swap ? s : c;
  sine = quadrant & 2 ? -sine_size : sine_size;
  cosine = (quadrant + 1) & 2 ? -cosine_size : cosine_size;
}

}  // namespace fastdiff::FASTDIFF_VARIANT
