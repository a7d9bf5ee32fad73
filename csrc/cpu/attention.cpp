#include "cpu/torch.h"

#include "fastdiff/variant_begin.h"

#include "cpu/small_matmul.h"
#include "fastdiff/attention.h"

namespace fastdiff::FASTDIFF_VARIANT {
namespace {

using OptionalTensor = std::optional<Tensor>;

// One head of one sample is a unit of work: its keys and values are copied once into the order that the products want, in the type that is
// computed in; then its queries are taken in blocks of rows, with all their logits at hand.

template <class T>
struct Heads {
  const T* data;
  int64_t batch, rows, heads, width;
  int64_t batch_stride, row_stride, head_stride, stride;

  explicit Heads(const Tensor& x)
      : data(read<T>(x)),
        batch(x.size(0)),
        rows(x.size(1)),
        heads(x.size(2)),
        width(x.size(3)),
        batch_stride(x.stride(0)),
        row_stride(x.stride(1)),
        head_stride(x.stride(2)),
        stride(x.stride(3)) {}

  const T* head(int64_t b, int64_t h) const { return data + b * batch_stride + h * head_stride; }

  // Rows [first, first + count) of a head as [count, to_row], times factor, the columns beyond width zero.
  void copy(int64_t b, int64_t h, int64_t first, int64_t count, Acc<T> factor, Acc<T>* to, int64_t to_row) const {
    for (int64_t r = 0; r < count; ++r) {
      const T* from = head(b, h) + (first + r) * row_stride;
      Acc<T>* row = to + r * to_row;
      // The next head's rows lie far apart, where the processor's own prefetching does not look for them.
      for (int64_t d = 0; d < width; d += 64 / int64_t{sizeof(T)}) __builtin_prefetch(from + head_stride + d);
      if (stride == 1) {
        for (int64_t d = 0; d < width; ++d) row[d] = factor * load(from[d]);
      } else {
        for (int64_t d = 0; d < width; ++d) row[d] = factor * load(from[d * stride]);
      }
      for (int64_t d = width; d < to_row; ++d) row[d] = 0;
    }
  }
};

// The transpose of from [rows, from_row] as [columns, to_row], the columns beyond rows zero.
template <class A>
void transpose(const A* from, int64_t rows, int64_t columns, int64_t from_row, A* to, int64_t to_row) {
  constexpr int64_t tile = 16;
  for (int64_t r = 0; r < rows; r += tile) {
    const int64_t stop = std::min(r + tile, rows);
    for (int64_t c = 0; c < columns; ++c) {
      for (int64_t i = r; i < stop; ++i) to[c * to_row + i] = from[i * from_row + c];
    }
  }
  for (int64_t c = 0; c < columns; ++c) std::fill(to + c * to_row + rows, to + (c + 1) * to_row, A(0));
}

// How many keys of each sample exist.
class KeyLengths {
 public:
  KeyLengths(const OptionalTensor& lengths, int64_t keys) : keys_(keys) {
    if (!lengths) return;
    tensor_ = torch::stable::to(*lengths, ScalarType::Long);
    data_ = read<int64_t>(*tensor_);
    stride_ = tensor_->stride(0);
  }
  int64_t operator[](int64_t b) const { return data_ ? std::clamp<int64_t>(data_[b * stride_], 0, keys_) : keys_; }

 private:
  OptionalTensor tensor_;
  const int64_t* data_ = nullptr;
  int64_t stride_ = 0, keys_;
};

template <class A>
struct Sizes {
  int64_t keys, width;  // padded
  int64_t block;        // rows of queries at a time
  int64_t blocks;

  Sizes(int64_t rows, int64_t keys_, int64_t width_) : keys(padded(std::max<int64_t>(keys_, 1), kColumns<A>)), width(padded(width_, kColumns<A>)) {
    constexpr int64_t logits = 1 << 16;  // what fits the second cache
    block = std::clamp<int64_t>(logits / keys / kTileRows * kTileRows, kTileRows, 64);
    block = std::min(block, padded(std::max<int64_t>(rows, 1), kTileRows));
    blocks = (rows + block - 1) / block;
  }
};

// Memory for one thread, handed out in parts.
template <class A>
class Arena {
 public:
  Arena(const Tensor& like, int64_t size)
      : tensor_(torch::stable::new_empty(like, {size}, std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float)),
        next_(write<A>(tensor_)) {}
  A* take(int64_t size) {
    A* part = next_;
    next_ += size;
    return part;
  }

 private:
  Tensor tensor_;
  A* next_;
};

// Turns a row's logits, of which there are `count`, into probabilities not yet divided by their sum, which it returns; the columns beyond
// become zero.
template <class A>
FD_INLINE A softmax_row(A* row, int64_t count, int64_t columns) {
  constexpr int64_t width = kLanes<A>;
  for (int64_t j = count; j < columns; ++j) row[j] = -A(INFINITY);
  Lanes<A> most, v;
  load_lanes(row, most);
  for (int64_t j = width; j < columns; j += width) {
    load_lanes(row + j, v);
    most = v > most ? v : most;
  }
  A largest = most[0];
  for (int64_t i = 1; i < width; ++i) largest = most[i] > largest ? most[i] : largest;
  Lanes<A> sum{};
  for (int64_t j = 0; j < columns; j += width) {
    load_lanes(row + j, v);
    exp_of_nonpositive(v - largest, v);
    sum += v;
    store_lanes<A>(v, row + j);
  }
  return sum_of_lanes<A>(sum);
}

template <class T>
void forward(const Tensor& q_, const Tensor& k_, const Tensor& v_, Tensor& out_, Acc<T> scale, const KeyLengths& lengths) {
  using A = Acc<T>;
  const Heads<T> q(q_), k(k_), v(v_);
  const Sizes<A> sizes(q.rows, k.rows, q.width);
  T* out = write<T>(out_);
  const int64_t work = sizes.block * sizes.keys * sizes.width;
  torch::stable::parallel_for(0, q.batch * q.heads * sizes.blocks, std::max<int64_t>(1, (1 << 20) / work), [&](int64_t first, int64_t last) {
    Arena<A> arena(q_, sizes.keys * (q.width + 2 * sizes.width) + sizes.block * (2 * sizes.width + sizes.keys));
    A *key_rows = arena.take(sizes.keys * sizes.width), *keys = arena.take(q.width * sizes.keys), *values = arena.take(sizes.keys * sizes.width), *queries = arena.take(sizes.block * sizes.width);
    A *logits = arena.take(sizes.block * sizes.keys), *result = arena.take(sizes.block * sizes.width);
    int64_t packed = -1;
    for (int64_t i = first; i < last; ++i) {
      const int64_t unit = i / sizes.blocks, b = unit / q.heads, h = unit % q.heads, count = lengths[b];
      const int64_t begin = i % sizes.blocks * sizes.block, rows = std::min(sizes.block, q.rows - begin), tiled = padded(rows, kTileRows);
      if (unit != packed) {
        k.copy(b, h, 0, count, 1, key_rows, sizes.width);
        transpose(key_rows, count, q.width, sizes.width, keys, sizes.keys);
        v.copy(b, h, 0, count, 1, values, sizes.width);
        packed = unit;
      }
      q.copy(b, h, begin, rows, scale, queries, sizes.width);
      multiply<A>({queries, sizes.width, 1}, keys, sizes.keys, logits, sizes.keys, tiled, q.width, sizes.keys, false);
      A inverse[64];
      for (int64_t r = 0; r < rows; ++r) inverse[r] = count ? A(1) / softmax_row(logits + r * sizes.keys, count, sizes.keys) : A(0);
      multiply<A>({logits, sizes.keys, 1}, values, sizes.width, result, sizes.width, tiled, count, sizes.width, false);
      for (int64_t r = 0; r < rows; ++r) {
        T* to = out + ((b * q.rows + begin + r) * q.heads + h) * q.width;
        for (int64_t d = 0; d < q.width; ++d) to[d] = store<T>(result[r * sizes.width + d] * inverse[r]);
      }
    }
  });
}

// Rows [first, first + count) of a head of a gradient, times factor.
template <class T>
void write_head(T* to, const Heads<T>& like, int64_t b, int64_t h, int64_t first, int64_t count, const Acc<T>* from, int64_t from_row, Acc<T> factor) {
  for (int64_t r = 0; r < count; ++r) {
    T* row = to + ((b * like.rows + first + r) * like.heads + h) * like.width;
    for (int64_t d = 0; d < like.width; ++d) row[d] = store<T>(factor * from[r * from_row + d]);
  }
}

template <class T>
void clear_head(T* to, const Heads<T>& like, int64_t b, int64_t h, int64_t first) {
  for (int64_t r = first; r < like.rows; ++r) {
    T* row = to + ((b * like.rows + r) * like.heads + h) * like.width;
    for (int64_t d = 0; d < like.width; ++d) row[d] = store<T>(0);
  }
}

// A thread's memory for the gradients of one head.
template <class A>
struct BackwardRoom {
  Arena<A> arena;
  A *keys, *values, *key_rows;                           // transposed, transposed, as they are
  A *queries, *grads, *probabilities, *logits, *grad_q;  // one block
  A *grad_k, *grad_v;

  BackwardRoom(const Tensor& like, const Sizes<A>& s, int64_t width)
      : arena(like, s.keys * (2 * width + 3 * s.width) + s.block * (3 * s.width + 2 * s.keys)),
        keys(arena.take(width * s.keys)),
        values(arena.take(width * s.keys)),
        key_rows(arena.take(s.keys * s.width)),
        queries(arena.take(s.block * s.width)),
        grads(arena.take(s.block * s.width)),
        probabilities(arena.take(s.block * s.keys)),
        logits(arena.take(s.block * s.keys)),
        grad_q(arena.take(s.block * s.width)),
        grad_k(arena.take(s.keys * s.width)),
        grad_v(arena.take(s.keys * s.width)) {}
};

// From logits in `probabilities` and the probabilities' gradients in `logits`: the probabilities, and the logits' gradients.
template <class A>
FD_INLINE void probability_rows(BackwardRoom<A>& room, int64_t rows, int64_t count, int64_t columns) {
  for (int64_t r = 0; r < rows; ++r) {
    A *p = room.probabilities + r * columns, *g = room.logits + r * columns;
    const A inverse = A(1) / softmax_row(p, count, columns);
    Lanes<A> sum{}, u, v;
    for (int64_t j = 0; j < columns; j += kLanes<A>) {
      load_lanes(p + j, u);
      load_lanes(g + j, v);
      u *= inverse;
      sum += u * v;
      store_lanes<A>(u, p + j);
    }
    const A expected = sum_of_lanes<A>(sum);
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j) g[j] = logit_gradient(p[j], g[j], expected);
  }
}

template <class T>
void backward(
    const Tensor& grad_, const Tensor& q_, const Tensor& k_, const Tensor& v_, T* grad_q, T* grad_k, T* grad_v, Acc<T> scale,
    const KeyLengths& lengths) {
  using A = Acc<T>;
  const Heads<T> grad(grad_), q(q_), k(k_), v(v_);
  const Sizes<A> s(q.rows, k.rows, q.width);
  const int64_t work = s.blocks * s.block * s.keys * s.width;
  torch::stable::parallel_for(0, q.batch * q.heads, std::max<int64_t>(1, (1 << 19) / std::max<int64_t>(work, 1)), [&](int64_t first, int64_t last) {
    BackwardRoom<A> room(q_, s, q.width);
    for (int64_t i = first; i < last; ++i) {
      const int64_t b = i / q.heads, h = i % q.heads, count = lengths[b];
      // Without queries no gradient reaches a key.
      const int64_t reached = q.rows ? count : 0;
      if (grad_k) clear_head(grad_k, k, b, h, reached);
      if (grad_v) clear_head(grad_v, v, b, h, reached);
      if (reached == 0) {
        if (grad_q) clear_head(grad_q, q, b, h, 0);
        continue;
      }
      v.copy(b, h, 0, count, 1, room.key_rows, s.width);
      transpose(room.key_rows, count, q.width, s.width, room.values, s.keys);
      k.copy(b, h, 0, count, 1, room.key_rows, s.width);
      transpose(room.key_rows, count, q.width, s.width, room.keys, s.keys);
      for (int64_t begin = 0; begin < q.rows; begin += s.block) {
        const int64_t rows = std::min(s.block, q.rows - begin), tiled = padded(rows, kTileRows);
        q.copy(b, h, begin, rows, scale, room.queries, s.width);
        grad.copy(b, h, begin, rows, 1, room.grads, s.width);
        multiply<A>({room.queries, s.width, 1}, room.keys, s.keys, room.probabilities, s.keys, tiled, q.width, s.keys, false);
        multiply<A>({room.grads, s.width, 1}, room.values, s.keys, room.logits, s.keys, tiled, q.width, s.keys, false);
        probability_rows(room, rows, count, s.keys);
        if (grad_v) multiply<A>({room.probabilities, 1, s.keys}, room.grads, s.width, room.grad_v, s.width, s.keys, rows, s.width, begin > 0);
        if (grad_k) multiply<A>({room.logits, 1, s.keys}, room.queries, s.width, room.grad_k, s.width, s.keys, rows, s.width, begin > 0);
        if (grad_q) {
          multiply<A>({room.logits, s.keys, 1}, room.key_rows, s.width, room.grad_q, s.width, tiled, count, s.width, false);
          write_head(grad_q, q, b, h, begin, rows, room.grad_q, s.width, scale);
        }
      }
      if (grad_k) write_head(grad_k, k, b, h, 0, count, room.grad_k, s.width, A(1));
      if (grad_v) write_head(grad_v, v, b, h, 0, count, room.grad_v, s.width, A(1));
    }
  });
}

Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, double scale, OptionalTensor key_lengths) {
  Tensor out = empty_as(q);
  const KeyLengths lengths(key_lengths, k.size(1));
  dispatch(q.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    forward<T>(q, k, v, out, static_cast<Acc<T>>(scale), lengths);
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v, double scale, OptionalTensor key_lengths, std::vector<bool> needs) {
  Tensor grad_q = needs[0] ? empty_as(q) : absent(q), grad_k = needs[1] ? empty_as(k) : absent(k), grad_v = needs[2] ? empty_as(v) : absent(v);
  const KeyLengths lengths(key_lengths, k.size(1));
  dispatch(q.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto wanted = [](bool need, const Tensor& x) { return need ? write<T>(x) : nullptr; };
    backward<T>(
        grad, q, k, v, wanted(needs[0], grad_q), wanted(needs[1], grad_k), wanted(needs[2], grad_v), static_cast<Acc<T>>(scale), lengths);
  });
  return {grad_q, grad_k, grad_v};
}

}  // namespace
}  // namespace fastdiff::FASTDIFF_VARIANT

#include "fastdiff/variant_end.h"

FASTDIFF_CPU_KERNELS(m) {
  using namespace fastdiff::FASTDIFF_VARIANT;
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
}
