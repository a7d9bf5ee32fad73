#pragma once
// What forward, backward and forward mode of attention share: a head's rows in the type that is computed in, and tiles of logits.
// To be included between variant_begin.h and variant_end.h, after cpu/torch.h.
//
// Logits are kept transposed, [keys, queries]: keys then serve as they lie as the left factor of the product, a query's sums and maxima run
// down a column, of which the registers take one for each lane, and only the few queries at hand need transposing.

#include "cpu/heads.h"
#include "cpu/small_matmul.h"

namespace fastdiff::FASTDIFF_VARIANT {

using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kQueryBlock = 64;

// A row of at least `width` numbers that takes an odd number of cache lines: a power of two would send the same columns of all rows to the
// same few places of the cache.
template <class A>
constexpr int64_t odd_lines(int64_t width) {
  constexpr int64_t line = 64 / int64_t{sizeof(A)};
  return ((width + line - 1) / line | 1) * line;
}

// Rows [first, first + count) of a head as [padded_rows, to_row]; the columns beyond its width and the rows beyond count zero.
template <class T>
void copy_rows(const TokensOf<T>& x, int64_t b, int64_t h, int64_t first, int64_t count, int64_t padded_rows, Acc<T>* to, int64_t to_row) {
  for (int64_t r = 0; r < count; ++r) {
    const T* from = x.at(b, first + r, h);
    Acc<T>* row = to + r * to_row;
    if (x.stride == 1) {
      for (int64_t d = 0; d < x.width; ++d) row[d] = load(from[d]);
    } else {
      for (int64_t d = 0; d < x.width; ++d) row[d] = load(from[d * x.stride]);
    }
    for (int64_t d = x.width; d < to_row; ++d) row[d] = 0;
  }
  std::fill(to + count * to_row, to + padded_rows * to_row, Acc<T>(0));
}

// The same of which the first `columns` are read: where they lie if nothing has to be converted or padded, else copied to room.
template <class T>
Factor<Acc<T>> rows_of(
    const TokensOf<T>& x, int64_t b, int64_t h, int64_t first, int64_t count, int64_t padded_rows, int64_t columns, Acc<T>* room,
    int64_t room_row) {
  if constexpr (std::is_same_v<T, Acc<T>>) {
    if (x.stride == 1 && count == padded_rows && columns <= x.width) return {x.at(b, first, h), x.row_stride, 1};
  }
  copy_rows(x, b, h, first, count, padded_rows, room, room_row);
  return {room, room_row, 1};
}

// Blocks of queries, head by head.
struct Blocks {
  int64_t rows, heads, count;  // of queries, of heads, of blocks of a head

  struct Block {
    int64_t unit, b, h, index, begin, rows;
  };

  template <class T>
  explicit Blocks(const TokensOf<T>& q) : rows(q.rows), heads(q.heads), count((q.rows + kQueryBlock - 1) / kQueryBlock) {}

  Block operator[](int64_t i) const {
    const int64_t unit = i / count, begin = i % count * kQueryBlock;
    return {unit, unit / heads, unit % heads, i % count, begin, std::min(kQueryBlock, rows - begin)};
  }
};

// Rows that will be read or written soon, asked for a few at a time while products are taken: those of the next head lie far apart, where
// the processor's own prefetching does not look for them.
class Ahead {
 public:
  template <class T>
  void add(const TokensOf<T>& x, int64_t b, int64_t h, int64_t first, int64_t last) {
    if (x.stride == 1) add(x.at(b, first, h), x.row_stride, x.width, last - first);
  }

  template <class T>
  void add(const T* row, int64_t stride, int64_t width, int64_t rows) {
    streams_[count_++] = {reinterpret_cast<const char*>(row), stride * int64_t{sizeof(T)}, width * int64_t{sizeof(T)}, rows};
  }

  void operator()() {
    for (int64_t i = 0; i < count_; ++i) {
      Rows& x = streams_[i];
      if (x.left <= 0) continue;
      --x.left;
      for (int64_t byte = 0; byte < x.bytes; byte += 64) __builtin_prefetch(x.next + byte, 0, 2);
      x.next += x.stride;
    }
  }

 private:
  struct Rows {
    const char* next;
    int64_t stride, bytes, left;
  };
  Rows streams_[8];
  int64_t count_ = 0;
};

// The queries of the block after i, and a share of the keys and values of the next head, if there are such before `last`.
template <class T>
void look_ahead(Ahead& ahead, const TokensOf<T>& q, const TokensOf<T>& k, const TokensOf<T>& v, const Blocks& blocks, int64_t i, int64_t last) {
  if (i + 1 == last) return;
  const auto next = blocks[i + 1];
  ahead.add(q, next.b, next.h, next.begin, next.begin + next.rows);
  const int64_t index = blocks[i].index, unit = blocks[i].unit + 1, share = (k.rows + blocks.count - 1) / blocks.count;
  if (unit * blocks.count >= last) return;
  for (const auto* x : {&k, &v}) ahead.add(*x, unit / q.heads, unit % q.heads, index * share, std::min((index + 1) * share, k.rows));
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

// Queries, keys or values of one projection [B, N, 3, H, D].
inline Tensor part_of(const Tensor& packed, int64_t index) { return torch::stable::select(packed, 2, index); }

// Numbers [B, H, N], one for each query.
template <class A>
struct PerQuery {
  A* data;
  int64_t heads, rows;
  A* head(int64_t b, int64_t h) const { return data + (b * heads + h) * rows; }
};

inline Tensor empty_per_query(const Tensor& q) {
  const auto dtype = q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  return torch::stable::new_empty(q, {q.size(0), q.size(2), q.size(1)}, dtype);
}

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

// A result [B, N, H, D] with adjacent columns.
template <class T>
struct ResultOf {
  T* data;
  int64_t batch_stride, row_stride, head_stride;

  explicit ResultOf(const Tensor& x) : data(write<T>(x)), batch_stride(x.stride(0)), row_stride(x.stride(1)), head_stride(x.stride(2)) {}
  T* at(int64_t b, int64_t n, int64_t h) const { return data + b * batch_stride + n * row_stride + h * head_stride; }
};

// Rows [first, first + count) of a head of a result, each times its factor.
template <class T, class F>
FD_INLINE void write_head(
    const ResultOf<T>& to, int64_t width, int64_t b, int64_t h, int64_t first, int64_t count, const Acc<T>* from, int64_t from_row, F&& factor) {
  for (int64_t r = 0; r < count; ++r) {
    T* row = to.at(b, first + r, h);
    const Acc<T> f = factor(r);
    for (int64_t d = 0; d < width; ++d) row[d] = store<T>(f * from[r * from_row + d]);
  }
}

// exp(x - base) for x at most base, but 0 rather than NaN where both are minus infinity.
template <class A>
FD_INLINE void exp_below(const Lanes<A>& x, const Lanes<A>& base, Lanes<A>& y) {
  const Lanes<A> from = base == -A(INFINITY) ? Lanes<A>{} : base;
  exp_of_nonpositive(x - from, y);
}

// A block of keys at a time, and of these a few to a sum.
constexpr int64_t kForwardKeys = 128, kRun = 16;

// Logits of a block of keys and queries, and of each query the greatest logit so far, the sum of exponentials below it, and what earlier
// sums shrink by as it grows.
template <class A>
struct Columns {
  int64_t block, row;
  A *logits, *largest, *sum, *factor;

  Columns(Arena<A>& arena, int64_t block_)
      : block(block_),
        row(odd_lines<A>(block)),
        logits(arena.take(kForwardKeys * row)),
        largest(arena.take(block)),
        sum(arena.take(block)),
        factor(arena.take(block)) {}

  static int64_t size(int64_t block) { return kForwardKeys * odd_lines<A>(block) + 3 * block; }

  // As for queries that have no key.
  void forget(int64_t queries) const {
    std::fill(largest, largest + queries, -A(INFINITY));
    std::fill(sum, sum + queries, A(1));
  }

  A log_sum(int64_t query) const { return largest[query] + std::log(sum[query]); }
};

// Turns logits [count, block] into exponentials below the largest of their column so far; `factor` is what earlier sums shrink by.
template <class A>
void exponentials(const Columns<A>& x, int64_t count, bool first) {
  for (int64_t c = 0; c < x.block; c += kLanes<A>) {
    Lanes<A> most, before, v, sum{}, factor{};
    if (first) {
      most = Lanes<A>{} - A(INFINITY);
    } else {
      load_lanes(x.largest + c, most);
    }
    before = most;
    for (int64_t k = 0; k < count; ++k) {
      load_lanes(x.logits + k * x.row + c, v);
      most = v > most ? v : most;
    }
    if (!first) {
      exp_below<A>(before, most, factor);
      load_lanes(x.sum + c, sum);
      sum *= factor;
      store_lanes<A>(factor, x.factor + c);
    }
    // In runs, so that no sum takes many additions.
    for (int64_t k = 0; k < count;) {
      Lanes<A> run{};
      for (const int64_t stop = std::min(k + kRun, count); k < stop; ++k) {
        load_lanes(x.logits + k * x.row + c, v);
        exp_below<A>(v, most, v);
        run += v;
        store_lanes<A>(v, x.logits + k * x.row + c);
      }
      sum += run;
    }
    store_lanes<A>(sum, x.sum + c);
    store_lanes<A>(most, x.largest + c);
  }
}

template <class A>
void scale_rows(A* x, int64_t rows, int64_t width, int64_t row, const A* factor) {
  for (int64_t r = 0; r < rows; ++r) {
    const A f = factor[r];
#pragma omp simd
    for (int64_t d = 0; d < width; ++d) x[r * row + d] *= f;
  }
}

}  // namespace fastdiff::FASTDIFF_VARIANT
