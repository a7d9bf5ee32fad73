#pragma once
// Heads of tensors [B, N, H, D] of any strides as contiguous numbers, and back.
// To be included between variant_begin.h and variant_end.h, after cpu/torch.h.

#include "cpu/lanes.h"

namespace fastdiff::FASTDIFF_VARIANT {

// Some heads of some tokens of one sample, as a task takes them at once: [tokens, heads, width].
struct Piece {
  int64_t b, n, tokens, head, heads, width;
  int64_t run() const { return heads * width; }
  int64_t elements() const { return tokens * run(); }
};

// x [B, N, H, D] of any strides.
template <class T>
struct TokensOf {
  const T* data;
  int64_t batch, rows, heads, width, batch_stride, row_stride, head_stride, stride;

  explicit TokensOf(const Tensor& x)
      : data(read<T>(x)),
        batch(x.size(0)),
        rows(x.size(1)),
        heads(x.size(2)),
        width(x.size(3)),
        batch_stride(x.stride(0)),
        row_stride(x.stride(1)),
        head_stride(x.stride(2)),
        stride(x.stride(3)) {}

  int64_t count() const { return batch * rows; }
  int64_t elements() const { return heads * width; }
  bool tokens_inside() const { return row_stride < stride; }
  const T* at(int64_t b, int64_t n, int64_t head) const { return data + b * batch_stride + n * row_stride + head * head_stride; }
};

// A piece's heads as contiguous numbers, which stay where they are if they are such.
template <class T>
class Heads {
 public:
  using A = Acc<T>;
  Heads(const TokensOf<T>& x, bool over_heads)
      : x_(x), in_place_(std::is_same_v<T, A> && x.stride == 1 && (!over_heads || x.head_stride == x.width)) {}

  void take(const Piece& piece, A* room) {
    piece_ = piece;
    room_ = room;
    if (in_place_) return;
    for (int64_t h = 0; h < piece.heads; ++h) {
      const T* head = x_.at(piece.b, piece.n, piece.head + h);
      if (x_.row_stride == 1) {
        load_transposed(head, room + h * x_.width);
      } else {
        for (int64_t t = 0; t < piece.tokens; ++t) load_head(head + t * x_.row_stride, room + t * piece.run() + h * x_.width);
      }
    }
  }

  const A* at(int64_t t, int64_t h) const {
    if constexpr (std::is_same_v<T, A>) {
      if (in_place_) return x_.at(piece_.b, piece_.n + t, piece_.head + h);
    }
    return room_ + t * piece_.run() + h * x_.width;
  }

 private:
  void load_head(const T* head, A* to) const {
    if (x_.stride == 1) {
#pragma omp simd
      for (int64_t d = 0; d < x_.width; ++d) to[d] = load(head[d]);
    } else {
      for (int64_t d = 0; d < x_.width; ++d) to[d] = load(head[d * x_.stride]);
    }
  }

  void load_transposed(const T* head, A* to) const {
    constexpr int64_t square = kLanes<A>;
    const int64_t run = piece_.run(), tokens = piece_.tokens / square * square, width = x_.width / square * square;
    for (int64_t d = 0; d < width; d += square) {
      for (int64_t t = 0; t < tokens; t += square) {
        Lanes<A> rows[square];
        for (int64_t i = 0; i < square; ++i) {
          A line[square];
#pragma omp simd
          for (int64_t j = 0; j < square; ++j) line[j] = load(head[(d + i) * x_.stride + t + j]);
          load_lanes(line, rows[i]);
        }
        transpose<A>(rows);
        for (int64_t i = 0; i < square; ++i) store_lanes(rows[i], to + (t + i) * run + d);
      }
    }
    for (int64_t t = 0; t < piece_.tokens; ++t) {
      for (int64_t d = t < tokens ? width : 0; d < x_.width; ++d) to[t * run + d] = load(head[d * x_.stride + t]);
    }
  }

  const TokensOf<T>& x_;
  bool in_place_;
  Piece piece_{};
  const A* room_ = nullptr;
};

// A piece of a contiguous [B, N, H, D]: written there, or in the room and then narrowed.
template <class T>
class HeadsOut {
 public:
  using A = Acc<T>;
  HeadsOut(T* data, const TokensOf<T>& like) : data_(data), rows_(like.rows), heads_(like.heads) {}

  void begin(const Piece& piece, A* room) {
    piece_ = piece;
    room_ = room;
  }

  A* at(int64_t t, int64_t h) const {
    if constexpr (std::is_same_v<T, A>) {
      if (data_) return address(t) + h * piece_.width;
    }
    return room_ + t * piece_.run() + h * piece_.width;
  }

  void end() const {
    if (std::is_same_v<T, A> || !data_) return;
    for (int64_t t = 0; t < piece_.tokens; ++t) {
      T* to = address(t);
      const A* from = room_ + t * piece_.run();
#pragma omp simd
      for (int64_t i = 0; i < piece_.run(); ++i) to[i] = store<T>(from[i]);
    }
  }

 private:
  T* address(int64_t t) const { return data_ + ((piece_.b * rows_ + piece_.n + t) * heads_ + piece_.head) * piece_.width; }

  T* data_;
  int64_t rows_, heads_;
  Piece piece_{};
  A* room_ = nullptr;
};

}  // namespace fastdiff::FASTDIFF_VARIANT
