#include "cpu/torch.h"

#include "fastdiff/variant_begin.h"

#include "cpu/heads.h"
#include "fastdiff/rotary.h"

namespace fastdiff::FASTDIFF_VARIANT {
namespace {

using OptionalTensor = std::optional<Tensor>;

// Tokens that one partial sum of the weight's gradient covers.
constexpr int64_t kTokens = 64;
// Tokens taken at once where they are innermost: some lines of memory of each channel.
constexpr int64_t kTransposed = 64;

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

// The same for many numbers x: four sums side by side hide the latency of an addition.
template <class A, class F>
FD_INLINE A sum_of_many(const A* x, int64_t size, F&& term) {
  constexpr int64_t run = 2048;
  A total = 0;
  for (int64_t first = 0; first < size; first += run) total += sum_in_lanes(x + first, std::min(run, size - first), term);
  return total;
}

template <class A>
FD_INLINE Run<A> measure(const A* x, int64_t size, const Norm& norm) {
  const A mean = norm.centred ? sum_of<A>(size, [=](int64_t i) { return x[i]; }) / A(size) : A(0);
  const A mean_square = sum_of<A>(size, [=](int64_t i) { return (x[i] - mean) * (x[i] - mean); }) / A(size);
  return {mean, mean_square, norm_factor(mean_square, static_cast<A>(norm.eps), norm.pixel)};
}

template <class A>
FD_INLINE Run<A> measure_many(const A* x, int64_t size, const Norm& norm) {
  const A mean = norm.centred ? sum_of_many(x, size, [](const auto& v) { return v; }) / A(size) : A(0);
  const A mean_square = sum_of_many(x, size, [=](const auto& v) { return (v - mean) * (v - mean); }) / A(size);
  return {mean, mean_square, norm_factor(mean_square, static_cast<A>(norm.eps), norm.pixel)};
}

// All heads of a token, while what lies `ahead` of x, its next token, is fetched; x and to may be the same.
template <class A>
FD_INLINE void normalise_many(const A* x, A* to, int64_t size, const A* weight, const Norm& norm, int64_t ahead) {
  const Run<A> run = measure_many(x, size, norm);
  const A mean = run.mean, factor = run.factor;
  for_each_lanes<A>(size, [=](int64_t i, int64_t n) {
    __builtin_prefetch(x + i + ahead);
    Lanes<A> value, scale = Lanes<A>{} + A(1);
    load_some(x + i, n, value);
    if (weight) load_some(weight + i, n, scale);
    store_some((value - mean) * (factor * scale), n, to + i);
  });
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

// The gradient of x from grad, that of the run's normalised and weighted values; adds to the weight's gradient.
template <bool kWeighted, class A>
FD_INLINE void normalise_backward(const A* grad, const A* x, A* to, int64_t size, const A* weight, const Norm& norm, double* grad_weight) {
  const Run<A> run = measure(x, size, norm);
  const A mean = run.mean, factor = run.factor;
  if (grad_weight) {
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) grad_weight[i] += grad[i] * ((x[i] - mean) * factor);
  }
  const auto weighted = [=](int64_t i) {
    if constexpr (kWeighted) {
      return grad[i] * weight[i];
    } else {
      return grad[i];
    }
  };
  const A constant = norm.centred ? sum_of<A>(size, weighted) / A(size) : A(0);
  const A product = sum_of<A>(size, [=](int64_t i) { return weighted(i) * (x[i] - mean); });
  const A correction = norm_correction(run.mean_square, factor, product / A(size), norm.pixel);
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) to[i] = factor * (weighted(i) - constant) - (x[i] - mean) * correction;
}

// One of the tensors that an op normalises, with what becomes of it. Backward: grad is the gradient of its output, grad_x and sums are
// written where they are wanted, sums chunk by chunk.
template <class T>
struct Job {
  TokensOf<T> x;
  T* out;
  const Acc<T>* weight = nullptr;
  std::optional<TokensOf<T>> grad = std::nullopt;
  double* sums = nullptr;
};

template <class T>
struct Rotation {
  Table<Acc<T>> cosines, sines;
};

int64_t chunks_of(const Tensor& x) { return (x.size(0) * x.size(1) + kTokens - 1) / kTokens; }

// Calls body(job, chunk, piece, room) in parallel for every piece of every job, chunk of tokens by chunk; room holds so many pieces of
// numbers. Jobs have equally many tokens. A piece is a token or, where tokens are innermost, some of them with as many heads as the norm is
// over; the jobs take turns at each, since parts of one projection lie side by side.
template <class T, class F>
void for_each_piece(const Tensor& like, const Job<T>* jobs, int64_t count, const Norm& norm, int64_t pieces, F&& body) {
  using A = Acc<T>;
  const TokensOf<T>& x = jobs[0].x;
  const int64_t heads = x.tokens_inside() && !norm.over_heads ? 1 : x.heads, tokens = x.tokens_inside() ? kTransposed : 1;
  const int64_t elements = tokens * heads * x.width, chunks = (x.count() + kTokens - 1) / kTokens;
  const int64_t grain = std::max<int64_t>(1, 2 * kChunk / std::max<int64_t>(1, count * kTokens * x.elements()));
  torch::stable::parallel_for(0, chunks, grain, [&](int64_t first, int64_t last) {
    Tensor room = torch::stable::new_empty(like, {pieces * elements}, kDtype<A>);
    for (int64_t chunk = first; chunk < last; ++chunk) {
      const int64_t end = std::min((chunk + 1) * kTokens, x.count());
      for (int64_t token = chunk * kTokens, next; token < end; token = next) {
        const int64_t b = token / x.rows, n = token % x.rows;
        next = std::min(std::min(token + tokens, end), (b + 1) * x.rows);
        for (int64_t head = 0; head < x.heads; head += heads) {
          const Piece piece{b, n, next - token, head, heads, x.width};
          for (int64_t i = 0; i < count; ++i) body(jobs[i], chunk, piece, write<A>(room));
        }
      }
    }
  });
}

template <class T>
void forward_piece(const Job<T>& job, const Piece& piece, Acc<T>* room, const Rotation<T>& rotation, const Norm& norm) {
  using A = Acc<T>;
  Heads<T> from(job.x, norm.over_heads);
  HeadsOut<T> to(job.out, job.x);
  from.take(piece, room);
  to.begin(piece, room);
  for (int64_t t = 0; t < piece.tokens; ++t) {
    const A *cosine = rotation.cosines.row(piece.b, piece.n + t), *sine = rotation.sines.row(piece.b, piece.n + t);
    if (norm.over_heads) normalise_many(from.at(t, 0), to.at(t, 0), piece.run(), job.weight, norm, job.x.row_stride);
    for (int64_t h = 0; h < piece.heads; ++h) {
      A* head = to.at(t, h);
      const A* normal = norm.any ? head : from.at(t, h);
      if (norm.any && !norm.over_heads) normalise(from.at(t, h), head, piece.width, job.weight, norm);
      if (cosine) {
        rotate_head(normal, head, piece.width, cosine, sine, A(1), norm.half);
      } else if (normal != head) {
        memcpy(head, normal, piece.width * sizeof(A));
      }
    }
  }
  to.end();
}

template <class T>
void backward_piece(const Job<T>& job, int64_t chunk, const Piece& piece, Acc<T>* room, const Rotation<T>& rotation, const Norm& norm) {
  using A = Acc<T>;
  A *grads = room + piece.elements(), *values = grads + piece.elements();
  double* sums = job.sums ? job.sums + chunk * (norm.over_heads ? piece.run() : piece.width) : nullptr;
  Heads<T> from(job.x, norm.over_heads), upstream(*job.grad, norm.over_heads);
  HeadsOut<T> to(job.out, job.x);
  upstream.take(piece, grads);
  if (norm.any) from.take(piece, values);
  to.begin(piece, room);
  const auto through_norm = [&](const A* grad, int64_t t, int64_t h, int64_t size) {
    if (job.weight) {
      normalise_backward<true>(grad, from.at(t, h), to.at(t, h), size, job.weight, norm, sums);
    } else {
      normalise_backward<false>(grad, from.at(t, h), to.at(t, h), size, job.weight, norm, sums);
    }
  };
  for (int64_t t = 0; t < piece.tokens; ++t) {
    const A *cosine = rotation.cosines.row(piece.b, piece.n + t), *sine = rotation.sines.row(piece.b, piece.n + t);
    A* token = grads + t * piece.run();
    for (int64_t h = 0; h < piece.heads; ++h) {
      const A *given = upstream.at(t, h), *turned = given;
      if (cosine) {
        A* head = norm.any ? token + h * piece.width : to.at(t, h);
        rotate_head(given, head, piece.width, cosine, sine, A(-1), norm.half);
        turned = head;
      } else if (!norm.any && to.at(t, h) != given) {
        memcpy(to.at(t, h), given, piece.width * sizeof(A));
      }
      if (norm.any && !norm.over_heads) through_norm(turned, t, h, piece.width);
    }
    if (norm.over_heads) through_norm(cosine ? token : upstream.at(t, 0), t, 0, piece.run());
  }
  to.end();
}

// body(first, count) for all jobs at once where they have equally many tokens, else for one after the other.
template <class T, class F>
void together(const Job<T>* jobs, int64_t count, F&& body) {
  bool alike = true;
  for (int64_t i = 1; i < count; ++i) alike = alike && jobs[i].x.rows == jobs[0].x.rows;
  for (int64_t i = 0; i < count; i += alike ? count : 1) body(jobs + i, alike ? count : 1);
}

template <class T>
void run_forward(const Tensor& like, const Job<T>* jobs, int64_t count, const Rotation<T>& rotation, const Norm& norm) {
  together(jobs, count, [&](const Job<T>* some, int64_t n) {
    for_each_piece(like, some, n, norm, 1, [&](const Job<T>& job, int64_t, const Piece& piece, Acc<T>* room) {
      forward_piece(job, piece, room, rotation, norm);
    });
  });
}

template <class T>
void run_backward(const Tensor& like, const Job<T>* jobs, int64_t count, const Rotation<T>& rotation, const Norm& norm) {
  together(jobs, count, [&](const Job<T>* some, int64_t n) {
    for_each_piece(like, some, n, norm, 3, [&](const Job<T>& job, int64_t chunk, const Piece& piece, Acc<T>* room) {
      backward_piece(job, chunk, piece, room, rotation, norm);
    });
  });
}

// Zeroed sums of a weight's gradient, one row a chunk; empty where nobody asked.
class WeightSums {
 public:
  WeightSums(const Tensor& x, const OptionalTensor& weight, bool needed)
      : needed_(needed),
        size_(needed ? weight->numel() : 0),
        chunks_(chunks_of(x)),
        sums_(torch::stable::new_empty(x, {size_ * chunks_}, ScalarType::Double)) {
    if (needed) std::fill(data(), data() + size_ * chunks_, 0.0);
  }

  double* data() const { return needed_ ? write<double>(sums_) : nullptr; }

  Tensor total(const Tensor& x, const OptionalTensor& weight) const {
    if (!needed_) return absent(x);
    Tensor out = empty_as(*weight);
    dispatch(out.scalar_type(), [&](auto tag) {
      using W = typename decltype(tag)::type;
      W* to = write<W>(out);
      for (int64_t i = 0; i < size_; ++i) {
        double total = 0;
        for (int64_t c = 0; c < chunks_; ++c) total += data()[c * size_ + i];
        to[i] = store<W>(static_cast<Acc<W>>(total));
      }
    });
    return out;
  }

 private:
  bool needed_;
  int64_t size_, chunks_;
  Tensor sums_;
};

std::tuple<Tensor, Tensor> qk_norm_rope(
    const Tensor& q, const Tensor& k, OptionalTensor q_weight, OptionalTensor k_weight, OptionalTensor cos, OptionalTensor sin,
    std::optional<std::string> norm_name, std::string rope, double eps) {
  Tensor out_q = empty_as(q), out_k = empty_as(k);
  const Norm norm(norm_name, rope, eps);
  dispatch(q.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Rotation<T> rotation{Table<Acc<T>>(cos), Table<Acc<T>>(sin)};
    const Table<Acc<T>> of_q(q_weight), of_k(k_weight);
    const Job<T> jobs[] = {{TokensOf<T>(q), write<T>(out_q), of_q.data()}, {TokensOf<T>(k), write<T>(out_k), of_k.data()}};
    run_forward(q, jobs, 2, rotation, norm);
  });
  return {out_q, out_k};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> qk_norm_rope_backward(
    const Tensor& grad_out_q, const Tensor& grad_out_k, const Tensor& q, const Tensor& k, OptionalTensor q_weight, OptionalTensor k_weight,
    OptionalTensor cos, OptionalTensor sin, std::optional<std::string> norm_name, std::string rope, double eps, std::vector<bool> needs) {
  STD_TORCH_CHECK(!needs[4] && !needs[5], "qk_norm_rope: the gradients of cos and sin come from the definition");
  Tensor grad_q = needs[0] ? empty_as(q) : absent(q), grad_k = needs[1] ? empty_as(k) : absent(k);
  const WeightSums q_sums(q, q_weight, needs[2]), k_sums(k, k_weight, needs[3]);
  const Norm norm(norm_name, rope, eps);
  dispatch(q.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Rotation<T> rotation{Table<Acc<T>>(cos), Table<Acc<T>>(sin)};
    const Table<Acc<T>> of_q(q_weight), of_k(k_weight);
    const Job<T> jobs[] = {
        {TokensOf<T>(q), needs[0] ? write<T>(grad_q) : nullptr, of_q.data(), TokensOf<T>(grad_out_q), q_sums.data()},
        {TokensOf<T>(k), needs[1] ? write<T>(grad_k) : nullptr, of_k.data(), TokensOf<T>(grad_out_k), k_sums.data()},
    };
    const int64_t first = needs[0] || needs[2] ? 0 : 1, last = needs[1] || needs[3] ? 2 : 1;
    run_backward(q, jobs + first, last - first, rotation, norm);
  });
  return {grad_q, grad_k, q_sums.total(q, q_weight), k_sums.total(k, k_weight), absent(q), absent(q)};
}

Tensor pixel_norm(const Tensor& x, double eps) {
  const Tensor out = empty_as(x);
  dispatch(x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Rotation<T> none{Table<Acc<T>>(std::nullopt), Table<Acc<T>>(std::nullopt)};
    const Job<T> job{TokensOf<T>(x), write<T>(out)};
    run_forward(x, &job, 1, none, Norm("pixel", "half", eps));
  });
  return out;
}

Tensor pixel_norm_backward(const Tensor& grad, const Tensor& x, double eps, std::vector<bool>) {
  const Tensor found = empty_as(x);
  dispatch(x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Rotation<T> none{Table<Acc<T>>(std::nullopt), Table<Acc<T>>(std::nullopt)};
    const Job<T> job{TokensOf<T>(x), write<T>(found), nullptr, TokensOf<T>(grad)};
    run_backward(x, &job, 1, none, Norm("pixel", "half", eps));
  });
  return found;
}

std::tuple<Tensor, Tensor, Tensor> qkv_pixel_norm(const Tensor& q, const Tensor& k, const Tensor& v, double eps) {
  const Tensor out[] = {empty_as(q), empty_as(k), empty_as(v)};
  dispatch(q.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Rotation<T> none{Table<Acc<T>>(std::nullopt), Table<Acc<T>>(std::nullopt)};
    const Job<T> jobs[] = {{TokensOf<T>(q), write<T>(out[0])}, {TokensOf<T>(k), write<T>(out[1])}, {TokensOf<T>(v), write<T>(out[2])}};
    run_forward(q, jobs, 3, none, Norm("pixel", "half", eps));
  });
  return {out[0], out[1], out[2]};
}

std::tuple<Tensor, Tensor, Tensor> qkv_pixel_norm_backward(
    const Tensor& grad_q, const Tensor& grad_k, const Tensor& grad_v, const Tensor& q, const Tensor& k, const Tensor& v, double eps,
    std::vector<bool> needs) {
  const Tensor *inputs[] = {&q, &k, &v}, *grads[] = {&grad_q, &grad_k, &grad_v};
  const Tensor found[] = {
      needs[0] ? empty_as(q) : absent(q), needs[1] ? empty_as(k) : absent(k), needs[2] ? empty_as(v) : absent(v)};
  dispatch(q.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Rotation<T> none{Table<Acc<T>>(std::nullopt), Table<Acc<T>>(std::nullopt)};
    std::vector<Job<T>> jobs;
    for (int i = 0; i < 3; ++i) {
      if (needs[i]) jobs.push_back({TokensOf<T>(*inputs[i]), write<T>(found[i]), nullptr, TokensOf<T>(*grads[i])});
    }
    run_backward(q, jobs.data(), static_cast<int64_t>(jobs.size()), none, Norm("pixel", "half", eps));
  });
  return {found[0], found[1], found[2]};
}

}  // namespace
}  // namespace fastdiff::FASTDIFF_VARIANT

#include "fastdiff/variant_end.h"

FASTDIFF_CPU_KERNELS(m) {
  using namespace fastdiff::FASTDIFF_VARIANT;
  m.impl("qk_norm_rope", TORCH_BOX(&qk_norm_rope));
  m.impl("qk_norm_rope_backward", TORCH_BOX(&qk_norm_rope_backward));
  m.impl("pixel_norm", TORCH_BOX(&pixel_norm));
  m.impl("pixel_norm_backward", TORCH_BOX(&pixel_norm_backward));
  m.impl("qkv_pixel_norm", TORCH_BOX(&qkv_pixel_norm));
  m.impl("qkv_pixel_norm_backward", TORCH_BOX(&qkv_pixel_norm_backward));
}
