#include "cpu/torch.h"

#include "fastdiff/variant_begin.h"

#include "cpu/lanes.h"
#include "fastdiff/rotary.h"

namespace fastdiff::FASTDIFF_VARIANT {
namespace {

using OptionalTensor = std::optional<Tensor>;

// Tokens that one partial sum of the weight's gradient covers.
constexpr int64_t kTokens = 64;
// Tokens taken at once where they are innermost: a line of float32.
constexpr int64_t kTransposed = 16;

struct Norm {
  bool any, centred, pixel, over_heads, half;
  double eps;

  Norm(const std::optional<std::string>& norm, const std::string& rope, double epsilon)
      : any(norm.has_value()),
        centred(any && norm->rfind("layer", 0) == 0),
        pixel(any && *norm == "pixel"),
        over_heads(any && norm->size() > 6 && norm->compare(norm->size() - 6, 6, "_heads") == 0),
        half(rope == "half"),
        eps(epsilon) {}
};

template <class A>
constexpr ScalarType kDtype = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;

// An optional operand in A, contiguous.
template <class A>
class Table {
 public:
  explicit Table(const OptionalTensor& x) {
    if (!x) return;
    tensor_ = dense(x->scalar_type() == kDtype<A> ? *x : torch::stable::to(*x, kDtype<A>));
    data_ = read<A>(*tensor_);
    batch_stride_ = tensor_->dim() == 3 ? tensor_->stride(0) : 0;
    row_stride_ = tensor_->dim() >= 2 ? tensor_->size(tensor_->dim() - 1) : 0;
  }
  const A* data() const { return data_; }
  const A* row(int64_t b, int64_t n) const { return data_ ? data_ + b * batch_stride_ + n * row_stride_ : nullptr; }

 private:
  OptionalTensor tensor_;
  const A* data_ = nullptr;
  int64_t batch_stride_ = 0, row_stride_ = 0;
};

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

// Element j of the two results is that of a for which j has no bit kStep, and that of b for which it has; the others change places.
template <class A, int64_t kStep, int64_t... kIndex>
FD_INLINE void exchange(Lanes<A>& a, Lanes<A>& b, std::integer_sequence<int64_t, kIndex...>) {
  constexpr int64_t width = kLanes<A>;
#if defined(__clang__)
  const Lanes<A> low = __builtin_shufflevector(a, b, (kIndex & kStep ? width + kIndex - kStep : kIndex)...);
  b = __builtin_shufflevector(a, b, (kIndex & kStep ? width + kIndex : kIndex + kStep)...);
#else
  typedef typename Vector<std::conditional_t<sizeof(A) == 8, int64_t, int32_t>, width>::type Index;
  const Lanes<A> low = __builtin_shuffle(a, b, Index{(kIndex & kStep ? width + kIndex - kStep : kIndex)...});
  b = __builtin_shuffle(a, b, Index{(kIndex & kStep ? width + kIndex : kIndex + kStep)...});
#endif
  a = low;
}

template <class A, int64_t kStep = kLanes<A> / 2>
FD_INLINE void transpose(Lanes<A> (&rows)[kLanes<A>]) {
  for (int64_t i = 0; i < kLanes<A>; ++i) {
    if (!(i & kStep)) exchange<A, kStep>(rows[i], rows[i + kStep], std::make_integer_sequence<int64_t, kLanes<A>>());
  }
  if constexpr (kStep > 1) transpose<A, kStep / 2>(rows);
}

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
    for (int64_t t = 0; t < tokens; t += square) {
      for (int64_t d = 0; d < width; d += square) {
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

// Turns every pair of a head by its angle; from and to may be the same.
template <class A>
void rotate_head(const A* from, A* to, int64_t width, const A* cosines, const A* sines, A sign, bool half) {
  const int64_t pairs = width / 2;
  if (half) {
#pragma omp simd
    for (int64_t i = 0; i < pairs; ++i) {
      A a = from[i], b = from[pairs + i];
      rotate(cosines[i], sign * sines[i], a, b);
      to[i] = a;
      to[pairs + i] = b;
    }
  } else {
#pragma omp simd
    for (int64_t i = 0; i < pairs; ++i) {
      A a = from[2 * i], b = from[2 * i + 1];
      rotate(cosines[i], sign * sines[i], a, b);
      to[2 * i] = a;
      to[2 * i + 1] = b;
    }
  }
}

// The sum of term(i) over size numbers, in runs short enough for a lane's sum to be exact to a few roundings.
template <class A, class F>
FD_INLINE A sum_of(int64_t size, F&& term) {
  constexpr int64_t run = 512;
  A total = 0;
  for (int64_t first = 0; first < size; first += run) {
    const int64_t last = std::min(first + run, size);
    A part = 0;
#pragma omp simd reduction(+ : part)
    for (int64_t i = first; i < last; ++i) part += term(i);
    total += part;
  }
  return total;
}

// What one norm is over: a head, or all heads of a token.
template <class A>
struct Run {
  A mean, mean_square, factor;
};

template <class A>
FD_INLINE Run<A> measure(const A* x, int64_t size, const Norm& norm) {
  const A mean = norm.centred ? sum_of<A>(size, [=](int64_t i) { return x[i]; }) / A(size) : A(0);
  const A mean_square = sum_of<A>(size, [=](int64_t i) { return (x[i] - mean) * (x[i] - mean); }) / A(size);
  return {mean, mean_square, norm_factor(mean_square, static_cast<A>(norm.eps), norm.pixel)};
}

// x and to may be the same.
template <class A>
FD_INLINE void normalise(const A* x, A* to, int64_t size, const A* weight, const Norm& norm) {
  const Run<A> run = measure(x, size, norm);
  const A mean = run.mean, factor = run.factor;
  if (weight) {
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) to[i] = (x[i] - mean) * (factor * weight[i]);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) to[i] = (x[i] - mean) * factor;
  }
}

// Turns grad, that of a run's normalised and weighted values, into that of x, in `to`; adds to the weight's gradient.
template <class A>
FD_INLINE void normalise_backward(A* grad, const A* x, A* to, int64_t size, const A* weight, const Norm& norm, double* grad_weight) {
  const Run<A> run = measure(x, size, norm);
  const A mean = run.mean, factor = run.factor;
  if (grad_weight) {
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) grad_weight[i] += grad[i] * ((x[i] - mean) * factor);
  }
  if (weight) {
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) grad[i] *= weight[i];
  }
  const A constant = norm.centred ? sum_of<A>(size, [=](int64_t i) { return grad[i]; }) / A(size) : A(0);
  const A product = sum_of<A>(size, [=](int64_t i) { return grad[i] * (x[i] - mean); });
  const A correction = norm_correction(run.mean_square, factor, product / A(size), norm.pixel);
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) to[i] = factor * (grad[i] - constant) - (x[i] - mean) * correction;
}

// Calls body(chunk, piece, room) for every piece in parallel, chunk of tokens by chunk; room holds so many pieces of numbers. A piece is a
// token or, where tokens are innermost, some of them with as many heads as the norm is over.
template <class T, class F>
void for_each_piece(const Tensor& like, const TokensOf<T>& x, const Norm& norm, int64_t pieces, F&& body) {
  using A = Acc<T>;
  const int64_t heads = x.tokens_inside() && !norm.over_heads ? 1 : x.heads, tokens = x.tokens_inside() ? kTransposed : 1;
  const int64_t elements = tokens * heads * x.width, chunks = (x.count() + kTokens - 1) / kTokens;
  const int64_t grain = std::max<int64_t>(1, 2 * kChunk / std::max<int64_t>(1, kTokens * x.elements()));
  torch::stable::parallel_for(0, chunks, grain, [&](int64_t first, int64_t last) {
    Tensor room = torch::stable::new_empty(like, {pieces * elements}, kDtype<A>);
    for (int64_t chunk = first; chunk < last; ++chunk) {
      const int64_t end = std::min((chunk + 1) * kTokens, x.count());
      for (int64_t token = chunk * kTokens, next; token < end; token = next) {
        const int64_t b = token / x.rows, n = token % x.rows;
        next = std::min(std::min(token + tokens, end), (b + 1) * x.rows);
        for (int64_t head = 0; head < x.heads; head += heads) body(chunk, Piece{b, n, next - token, head, heads, x.width}, write<A>(room));
      }
    }
  });
}

template <class T>
void forward(const Tensor& x_, T* out_, const Table<Acc<T>>& weight, const Table<Acc<T>>& cosines, const Table<Acc<T>>& sines, const Norm& norm) {
  using A = Acc<T>;
  const TokensOf<T> x(x_);
  for_each_piece(x_, x, norm, 1, [&](int64_t, const Piece& piece, A* room) {
    Heads<T> from(x, norm.over_heads);
    HeadsOut<T> to(out_, x);
    from.take(piece, room);
    to.begin(piece, room);
    for (int64_t t = 0; t < piece.tokens; ++t) {
      const A *cosine = cosines.row(piece.b, piece.n + t), *sine = sines.row(piece.b, piece.n + t);
      if (norm.over_heads) normalise(from.at(t, 0), to.at(t, 0), piece.run(), weight.data(), norm);
      for (int64_t h = 0; h < piece.heads; ++h) {
        A* head = to.at(t, h);
        const A* normal = norm.any ? head : from.at(t, h);
        if (norm.any && !norm.over_heads) normalise(from.at(t, h), head, x.width, weight.data(), norm);
        if (cosine) {
          rotate_head(normal, head, x.width, cosine, sine, A(1), norm.half);
        } else if (normal != head) {
          memcpy(head, normal, x.width * sizeof(A));
        }
      }
    }
    to.end();
  });
}

template <class T>
void backward(
    const Tensor& grad_, const Tensor& x_, T* grad_x, const OptionalTensor& weight_, Tensor* grad_weight, const Table<Acc<T>>& cosines,
    const Table<Acc<T>>& sines, const Norm& norm) {
  using A = Acc<T>;
  const TokensOf<T> grad(grad_), x(x_);
  const Table<A> weight(weight_);
  const int64_t size = norm.over_heads ? x.elements() : x.width, chunks = (x.count() + kTokens - 1) / kTokens;
  Tensor partial = torch::stable::new_empty(x_, {grad_weight ? chunks * size : 0}, ScalarType::Double);
  double* sums = grad_weight ? write<double>(partial) : nullptr;
  if (sums) std::fill(sums, sums + chunks * size, 0.0);
  for_each_piece(x_, x, norm, 3, [&](int64_t chunk, const Piece& piece, A* room) {
    A *grads = room + piece.elements(), *values = grads + piece.elements();
    double* of_chunk = sums ? sums + chunk * size : nullptr;
    Heads<T> from(x, norm.over_heads), upstream(grad, false);
    HeadsOut<T> to(grad_x, x);
    upstream.take(piece, grads);
    if (norm.any) from.take(piece, values);
    to.begin(piece, room);
    for (int64_t t = 0; t < piece.tokens; ++t) {
      const A *cosine = cosines.row(piece.b, piece.n + t), *sine = sines.row(piece.b, piece.n + t);
      A* token = grads + t * piece.run();
      for (int64_t h = 0; h < piece.heads; ++h) {
        A* head = norm.any ? token + h * x.width : to.at(t, h);
        const A* given = upstream.at(t, h);
        if (cosine) {
          rotate_head(given, head, x.width, cosine, sine, A(-1), norm.half);
        } else if (given != head) {
          memcpy(head, given, x.width * sizeof(A));
        }
        if (norm.any && !norm.over_heads) normalise_backward(head, from.at(t, h), to.at(t, h), size, weight.data(), norm, of_chunk);
      }
      if (norm.over_heads) normalise_backward(token, from.at(t, 0), to.at(t, 0), size, weight.data(), norm, of_chunk);
    }
    to.end();
  });
  if (!grad_weight) return;
  *grad_weight = empty_as(*weight_);
  dispatch(grad_weight->scalar_type(), [&](auto tag) {
    using W = typename decltype(tag)::type;
    W* to = write<W>(*grad_weight);
    for (int64_t i = 0; i < size; ++i) {
      double total = 0;
      for (int64_t c = 0; c < chunks; ++c) total += sums[c * size + i];
      to[i] = store<W>(static_cast<Acc<W>>(total));
    }
  });
}

std::tuple<Tensor, Tensor> qk_norm_rope(
    const Tensor& q, const Tensor& k, OptionalTensor q_weight, OptionalTensor k_weight, OptionalTensor cos, OptionalTensor sin,
    std::optional<std::string> norm_name, std::string rope, double eps) {
  Tensor out_q = empty_as(q), out_k = empty_as(k);
  const Norm norm(norm_name, rope, eps);
  dispatch(q.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    const Table<A> cosines(cos), sines(sin);
    forward<T>(q, write<T>(out_q), Table<A>(q_weight), cosines, sines, norm);
    forward<T>(k, write<T>(out_k), Table<A>(k_weight), cosines, sines, norm);
  });
  return {out_q, out_k};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> qk_norm_rope_backward(
    const Tensor& grad_out_q, const Tensor& grad_out_k, const Tensor& q, const Tensor& k, OptionalTensor q_weight, OptionalTensor k_weight,
    OptionalTensor cos, OptionalTensor sin, std::optional<std::string> norm_name, std::string rope, double eps, std::vector<bool> needs) {
  STD_TORCH_CHECK(!needs[4] && !needs[5], "qk_norm_rope: the gradients of cos and sin come from the definition");
  Tensor grad_q = needs[0] ? empty_as(q) : absent(q), grad_k = needs[1] ? empty_as(k) : absent(k);
  Tensor grad_q_weight = absent(q), grad_k_weight = absent(k);
  const Norm norm(norm_name, rope, eps);
  dispatch(q.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    const Table<A> cosines(cos), sines(sin);
    if (needs[0] || needs[2]) {
      T* to = needs[0] ? write<T>(grad_q) : nullptr;
      backward<T>(grad_out_q, q, to, q_weight, needs[2] ? &grad_q_weight : nullptr, cosines, sines, norm);
    }
    if (needs[1] || needs[3]) {
      T* to = needs[1] ? write<T>(grad_k) : nullptr;
      backward<T>(grad_out_k, k, to, k_weight, needs[3] ? &grad_k_weight : nullptr, cosines, sines, norm);
    }
  });
  return {grad_q, grad_k, grad_q_weight, grad_k_weight, absent(q), absent(q)};
}

std::tuple<Tensor, Tensor, Tensor> qkv_pixel_norm(const Tensor& q, const Tensor& k, const Tensor& v, double eps) {
  const Norm norm("pixel", "half", eps);
  const auto normalised = [&](const Tensor& x) {
    Tensor out = empty_as(x);
    dispatch(x.scalar_type(), [&](auto tag) {
      using T = typename decltype(tag)::type;
      const Table<Acc<T>> none(std::nullopt);
      forward<T>(x, write<T>(out), none, none, none, norm);
    });
    return out;
  };
  return {normalised(q), normalised(k), normalised(v)};
}

std::tuple<Tensor, Tensor, Tensor> qkv_pixel_norm_backward(
    const Tensor& grad_q, const Tensor& grad_k, const Tensor& grad_v, const Tensor& q, const Tensor& k, const Tensor& v, double eps,
    std::vector<bool> needs) {
  const Norm norm("pixel", "half", eps);
  const auto gradient = [&](const Tensor& grad, const Tensor& x, bool needed) {
    if (!needed) return absent(x);
    Tensor grad_x = empty_as(x);
    dispatch(x.scalar_type(), [&](auto tag) {
      using T = typename decltype(tag)::type;
      const Table<Acc<T>> none(std::nullopt);
      backward<T>(grad, x, write<T>(grad_x), std::nullopt, nullptr, none, none, norm);
    });
    return grad_x;
  };
  return {gradient(grad_q, q, needs[0]), gradient(grad_k, k, needs[1]), gradient(grad_v, v, needs[2])};
}

}  // namespace
}  // namespace fastdiff::FASTDIFF_VARIANT

#include "fastdiff/variant_end.h"

FASTDIFF_CPU_KERNELS(m) {
  using namespace fastdiff::FASTDIFF_VARIANT;
  m.impl("qk_norm_rope", TORCH_BOX(&qk_norm_rope));
  m.impl("qk_norm_rope_backward", TORCH_BOX(&qk_norm_rope_backward));
  m.impl("qkv_pixel_norm", TORCH_BOX(&qkv_pixel_norm));
  m.impl("qkv_pixel_norm_backward", TORCH_BOX(&qkv_pixel_norm_backward));
}
