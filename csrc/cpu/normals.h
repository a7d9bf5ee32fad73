#pragma once
// Normals in tiles, for loops that use them beside other operands. To be included between variant_begin.h and variant_end.h.

#include "cpu/common.h"
#include "fastdiff/philox.h"

#if defined(FASTDIFF_AVX512)
#include <immintrin.h>
#endif

namespace fastdiff::FASTDIFF_VARIANT {

constexpr int64_t kTile = kRunLength;
constexpr int64_t kTileBlocks = kTile / 4;
// Blocks that are made together, whether all are wanted or not.
constexpr int64_t kLaneBlocks = 16;

// Words of a tile's blocks, each kind in its own array so that the next loop reads them in order.
struct TileWords {
  alignas(64) uint32_t w0[kTileBlocks], w1[kTileBlocks], w2[kTileBlocks], w3[kTileBlocks];
};

#if defined(FASTDIFF_AVX512)

using Words16 = uint32_t __attribute__((vector_size(64)));
using Products8 = uint64_t __attribute__((vector_size(64)));

// Written out because GCC takes the slow 64-bit multiplication for a 32-bit one when its vectors have 512 bits. The masked form of the
// instruction, with all of the mask set, is the one whose header gives GCC no reason to warn.
FD_INLINE Products8 even_products(Words16 x, Words16 multiplier) {
  return (Products8)_mm512_maskz_mul_epu32(0xFF, (__m512i)x, (__m512i)multiplier);
}

// What philox() computes, for 16 counters at a time.
FD_INLINE void philox_words(uint64_t seed, Stream stream, uint64_t sample, uint32_t first, int64_t blocks, TileWords& words) {
  constexpr Words16 none = {}, lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  constexpr uint64_t upper = 0xFFFFFFFF00000000u;
  for (int64_t i = 0; i < blocks; i += kLaneBlocks) {
    Words16 c0 = lanes + (first + static_cast<uint32_t>(i)), c1 = none + static_cast<uint32_t>(stream);
    Words16 c2 = none + static_cast<uint32_t>(sample), c3 = none + static_cast<uint32_t>(sample >> 32);
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < kPhiloxRounds; ++round) {
      const Products8 even0 = even_products(c0, none + kPhiloxMultiplier0), even1 = even_products(c2, none + kPhiloxMultiplier1);
      const Products8 odd0 = even_products((Words16)((Products8)c0 >> 32), none + kPhiloxMultiplier0);
      const Products8 odd1 = even_products((Words16)((Products8)c2 >> 32), none + kPhiloxMultiplier1);
      const Words16 high0 = (Words16)((even0 >> 32) | (odd0 & upper)), high1 = (Words16)((even1 >> 32) | (odd1 & upper));
      c0 = high1 ^ c1 ^ k0;
      c2 = high0 ^ c3 ^ k1;
      c1 = (Words16)((even1 & ~upper) | (odd1 << 32));
      c3 = (Words16)((even0 & ~upper) | (odd0 << 32));
      k0 += kPhiloxStep0;
      k1 += kPhiloxStep1;
    }
    memcpy(words.w0 + i, &c0, sizeof c0);
    memcpy(words.w1 + i, &c1, sizeof c1);
    memcpy(words.w2 + i, &c2, sizeof c2);
    memcpy(words.w3 + i, &c3, sizeof c3);
  }
}

#else

FD_INLINE void philox_words(uint64_t seed, Stream stream, uint64_t sample, uint32_t first, int64_t blocks, TileWords& words) {
#pragma omp simd
  for (int64_t i = 0; i < blocks; ++i) {
    const Words found = philox(seed, stream, sample, first + static_cast<uint32_t>(i));
    words.w0[i] = found.w0;
    words.w1[i] = found.w1;
    words.w2[i] = found.w2;
    words.w3[i] = found.w3;
  }
}

#endif

struct Noise {
  uint64_t seed;
  Stream stream;
  int64_t offset;

  Noise(const Tensor& seed_tensor, Stream which, int64_t first_sample)
      : seed(static_cast<uint64_t>(*read<int64_t>(seed_tensor))), stream(which), offset(first_sample) {}

  // The normals of `count` elements of sample b from `begin` on, a multiple of 4, and of some after them; at most kTile.
  FD_INLINE void tile(int64_t b, int64_t begin, int64_t count, float* out) const {
    TileWords words;
    const int64_t lanes = 4 * kLaneBlocks, blocks = (count + lanes - 1) / lanes * kLaneBlocks;
    philox_words(seed, stream, static_cast<uint64_t>(offset + b), static_cast<uint32_t>(begin / 4), blocks, words);
#pragma omp simd
    for (int64_t i = 0; i < blocks; ++i) {
      float z0, z1, z2, z3;
      box_muller(words.w0[i], words.w1[i], z0, z1);
      box_muller(words.w2[i], words.w3[i], z2, z3);
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
    const int64_t stop = i + kTile < end ? i + kTile : end;
    noise.tile(b, i, stop - i, normals);
    body(i, stop, normals);
  }
}

}  // namespace fastdiff::FASTDIFF_VARIANT
