#pragma once
// Products of matrices that fit the caches, in registers. To be included between variant_begin.h and variant_end.h.

#include "cpu/lanes.h"

namespace fastdiff::FASTDIFF_VARIANT {

// A tile of the product: so many rows, so many registers wide, that the sums fill the register file.
#if defined(FASTDIFF_AVX512)
constexpr int kTileRows = 8, kTileRegisters = 3;
#else
constexpr int kTileRows = 4, kTileRegisters = 2;
#endif

// Rows of operands and results come in multiples of kTileRows, columns in multiples of this.
template <class A>
constexpr int64_t kColumns = kLanes<A> > kTileRows ? kLanes<A> : kTileRows;

FD_INLINE int64_t padded(int64_t size, int64_t multiple) { return (size + multiple - 1) / multiple * multiple; }

// A matrix whose element (i, k) lies at data[i * row + k * column].
template <class A>
struct Factor {
  const A* data;
  int64_t row, column;
};

template <int R, int C, class A>
FD_INLINE void multiply_tile(Factor<A> a, const A* b, int64_t b_row, A* out, int64_t out_row, int64_t depth, bool accumulate) {
  constexpr int64_t width = kLanes<A>;
  Lanes<A> sums[R][C];
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < C; ++j) {
      if (accumulate) {
        load_lanes(out + i * out_row + j * width, sums[i][j]);
      } else {
        sums[i][j] = Lanes<A>{};
      }
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    Lanes<A> right[C];
#pragma GCC unroll 16
    for (int j = 0; j < C; ++j) load_lanes(b + k * b_row + j * width, right[j]);
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      const A left = a.data[i * a.row + k * a.column];
#pragma GCC unroll 16
      for (int j = 0; j < C; ++j) sums[i][j] += left * right[j];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < C; ++j) store_lanes<A>(sums[i][j], out + i * out_row + j * width);
  }
}

template <int C, class A, class F>
void multiply_columns(Factor<A> a, const A* b, int64_t b_row, A* out, int64_t out_row, int64_t rows, int64_t depth, bool accumulate, F& each_tile) {
  for (int64_t i = 0; i < rows; i += kTileRows) {
    each_tile();
    multiply_tile<kTileRows, C>({a.data + i * a.row, a.row, a.column}, b, b_row, out + i * out_row, out_row, depth, accumulate);
  }
}

// out = a b, or out += a b: [rows, depth] times [depth, columns]; every sum in the order of depth. each_tile() is called for every tile.
template <class A, class F>
void multiply(
    Factor<A> a, const A* b, int64_t b_row, A* out, int64_t out_row, int64_t rows, int64_t depth, int64_t columns, bool accumulate,
    F& each_tile) {
  constexpr int64_t width = kLanes<A>;
  int64_t registers = columns / width, pieces = (registers + kTileRegisters - 1) / kTileRegisters;
  for (int64_t j = 0; pieces > 0; --pieces) {
    const int64_t taken = (registers + pieces - 1) / pieces;
    const A* right = b + j * width;
    A* to = out + j * width;
    if (taken == 3) {
      if constexpr (kTileRegisters >= 3) multiply_columns<3>(a, right, b_row, to, out_row, rows, depth, accumulate, each_tile);
    } else if (taken == 2) {
      multiply_columns<2>(a, right, b_row, to, out_row, rows, depth, accumulate, each_tile);
    } else {
      multiply_columns<1>(a, right, b_row, to, out_row, rows, depth, accumulate, each_tile);
    }
    j += taken;
    registers -= taken;
  }
}

// The transpose of from [rows, from_row], times factor, as [columns, to_row]; rows and columns are multiples of the lanes.
template <class A>
void transpose(const A* from, int64_t rows, int64_t columns, int64_t from_row, A factor, A* to, int64_t to_row) {
  constexpr int64_t width = kLanes<A>;
  for (int64_t c = 0; c < columns; c += width) {
    for (int64_t r = 0; r < rows; r += width) {
      Lanes<A> tile[width];
#pragma GCC unroll 16
      for (int64_t i = 0; i < width; ++i) {
        load_lanes(from + (r + i) * from_row + c, tile[i]);
        tile[i] *= factor;
      }
      transpose<A>(tile);
#pragma GCC unroll 16
      for (int64_t i = 0; i < width; ++i) store_lanes<A>(tile[i], to + (c + i) * to_row + r);
    }
  }
}

}  // namespace fastdiff::FASTDIFF_VARIANT
