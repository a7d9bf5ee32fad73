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

  void load_piece(const Piece& piece, Acc<T>* to) const {
    const T* from = data + piece.b * batch_stride + piece.n * row_stride + piece.head * head_stride;
    if (tokens_inside()) {
      for (int64_t h = 0; h < piece.heads; ++h) load_transposed(from + h * head_stride, piece, to + h * width);
      return;
    }
    for (int64_t t = 0; t < piece.tokens; ++t) {
      for (int64_t h = 0; h < piece.heads; ++h) load_head(from + t * row_stride + h * head_stride, to + t * piece.run() + h * width);
    }
  }

 private:
  void load_head(const T* head, Acc<T>* to) const {
    if (stride == 1) {
#pragma omp simd
      for (int64_t d = 0; d < width; ++d) to[d] = load(head[d]);
    } else {
      for (int64_t d = 0; d < width; ++d) to[d] = load(head[d * stride]);
    }
  }

  // A head of all tokens of a piece, channel by channel.
  void load_transposed(const T* head, const Piece& piece, Acc<T>* to) const {
    for (int64_t d = 0; d < width; ++d) {
      for (int64_t t = 0; t < piece.tokens; ++t) to[t * piece.run() + d] = load(head[d * stride + t * row_stride]);
    }
  }
};

// Turns every pair of every head by its angle, or back.
template <class A>
void rotate_token(A* x, int64_t heads, int64_t width, const A* cosines, const A* sines, bool half, bool back) {
  const int64_t pairs = width / 2;
  const A sign = back ? A(-1) : A(1);
  for (int64_t h = 0; h < heads; ++h) {
    A* head = x + h * width;
    if (half) {
#pragma omp simd
      for (int64_t i = 0; i < pairs; ++i) rotate(cosines[i], sign * sines[i], head[i], head[pairs + i]);
    } else {
#pragma omp simd
      for (int64_t i = 0; i < pairs; ++i) rotate(cosines[i], sign * sines[i], head[2 * i], head[2 * i + 1]);
    }
  }
}

// A run is what one norm is over: a head, or all heads of a token. x becomes centred where the norm centres it.
template <class A>
struct Run {
  A mean_square, factor;
};

template <class A>
FD_INLINE Run<A> measure(A* x, int64_t size, const Norm& norm) {
  if (norm.centred) {
    const A mean = sum_in_lanes(x, size, [](const auto& v) { return v; }) / A(size);
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) x[i] -= mean;
  }
  const A mean_square = sum_in_lanes(x, size, [](const auto& v) { return v * v; }) / A(size);
  return {mean_square, norm_factor(mean_square, static_cast<A>(norm.eps), norm.pixel)};
}

template <class A>
void normalise(A* x, int64_t size, const A* weight, const Norm& norm) {
  const A factor = measure(x, size, norm).factor;
  if (weight) {
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) x[i] *= factor * weight[i];
  } else {
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) x[i] *= factor;
  }
}

// Turns grad, that of a run's normalised and weighted values, into that of x; adds to the weight's gradient.
template <class A>
void normalise_backward(A* grad, A* x, int64_t size, const A* weight, const Norm& norm, double* grad_weight) {
  const Run<A> run = measure(x, size, norm);
  const A factor = run.factor;
  if (grad_weight) {
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) grad_weight[i] += grad[i] * (x[i] * factor);
  }
  if (weight) {
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) grad[i] *= weight[i];
  }
  A sum, product;
  sums_and_products(grad, x, size, sum, product);
  const A mean = norm.centred ? sum / A(size) : A(0);
  const A correction = norm_correction(run.mean_square, factor, product / A(size), norm.pixel);
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) grad[i] = factor * (grad[i] - mean) - x[i] * correction;
}

// Calls body(chunk, piece, room) for every piece in parallel, chunk of tokens by chunk; room holds so many pieces of numbers. A piece is a
// token, or where tokens are innermost some of them with as many heads as the norm is over.
template <class T, class F>
void for_each_piece(const Tensor& like, const TokensOf<T>& x, const Norm& norm, int64_t pieces, F&& body) {
  using A = Acc<T>;
  const int64_t elements = x.elements(), heads = x.tokens_inside() && !norm.over_heads ? 1 : x.heads, run = heads * x.width;
  const int64_t tokens = x.tokens_inside() ? kTransposed : 1, chunks = (x.count() + kTokens - 1) / kTokens;
  const int64_t grain = std::max<int64_t>(1, 2 * kChunk / std::max<int64_t>(1, kTokens * elements));
  torch::stable::parallel_for(0, chunks, grain, [&](int64_t first, int64_t last) {
    Tensor room = torch::stable::new_empty(like, {pieces * tokens * run}, kDtype<A>);
    for (int64_t chunk = first; chunk < last; ++chunk) {
      const int64_t end = std::min((chunk + 1) * kTokens, x.count());
      for (int64_t token = chunk * kTokens, next; token < end; token = next) {
        const int64_t b = token / x.rows, n = token % x.rows;
        next = std::min({token + tokens, end, (b + 1) * x.rows});
        for (int64_t head = 0; head < x.heads; head += heads) body(chunk, Piece{b, n, next - token, head, heads, x.width}, write<A>(room));
      }
    }
  });
}

template <class T>
void store_piece(const Acc<T>* values, const Piece& piece, const TokensOf<T>& x, T* out) {
  for (int64_t t = 0; t < piece.tokens; ++t) {
    T* to = out + ((piece.b * x.rows + piece.n + t) * x.heads + piece.head) * x.width;
#pragma omp simd
    for (int64_t i = 0; i < piece.run(); ++i) to[i] = store<T>(values[t * piece.run() + i]);
  }
}

template <class A>
void rotate_piece(A* values, const Piece& piece, const Table<A>& cosines, const Table<A>& sines, bool half, bool back) {
  if (!cosines.data()) return;
  for (int64_t t = 0; t < piece.tokens; ++t) {
    const int64_t n = piece.n + t;
    rotate_token(values + t * piece.run(), piece.heads, piece.width, cosines.row(piece.b, n), sines.row(piece.b, n), half, back);
  }
}

template <class T>
void forward(const Tensor& x_, T* out, const Table<Acc<T>>& weight, const Table<Acc<T>>& cosines, const Table<Acc<T>>& sines, const Norm& norm) {
  using A = Acc<T>;
  const TokensOf<T> x(x_);
  const int64_t size = norm.over_heads ? x.elements() : x.width;
  for_each_piece(x_, x, norm, 1, [&](int64_t, const Piece& piece, A* values) {
    x.load_piece(piece, values);
    for (int64_t i = 0; norm.any && i < piece.tokens * piece.run(); i += size) normalise(values + i, size, weight.data(), norm);
    rotate_piece(values, piece, cosines, sines, norm.half, false);
    store_piece(values, piece, x, out);
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
  for_each_piece(x_, x, norm, 2, [&](int64_t chunk, const Piece& piece, A* grads) {
    const int64_t elements = piece.tokens * piece.run();
    A* values = grads + elements;
    grad.load_piece(piece, grads);
    rotate_piece(grads, piece, cosines, sines, norm.half, true);
    if (norm.any) {
      x.load_piece(piece, values);
      double* of_chunk = sums ? sums + chunk * size : nullptr;
      for (int64_t i = 0; i < elements; i += size) normalise_backward(grads + i, values + i, size, weight.data(), norm, of_chunk);
    }
    if (grad_x) store_piece(grads, piece, x, grad_x);
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
