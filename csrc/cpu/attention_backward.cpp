#include "cpu/torch.h"

#include "fastdiff/variant_begin.h"

#include "cpu/attention.h"
#include "fastdiff/attention.h"

namespace fastdiff::FASTDIFF_VARIANT {
namespace {

// A run of keys of one head is a unit of work: it owns those keys' gradients. It goes through its keys in blocks and, for each, through all
// queries. The gradient of the queries is summed over runs at the end, in their order; how many runs there are depends on one sample's sizes alone.

constexpr int64_t kKeyBlock = 256;
// Runs that a head's keys are split into at most, all heads of a sample together.
constexpr int64_t kRuns = 16;

struct Runs {
  int64_t count, keys;  // keys of a run, a multiple of kKeyBlock

  Runs(int64_t heads, int64_t rows) {
    const int64_t blocks = std::max<int64_t>(1, (rows + kKeyBlock - 1) / kKeyBlock);
    const int64_t wanted = std::clamp<int64_t>(kRuns / std::max<int64_t>(heads, 1), 1, blocks);
    keys = (blocks + wanted - 1) / wanted * kKeyBlock;
    count = (blocks * kKeyBlock + keys - 1) / keys;
  }
};

template <class A>
struct BackwardRoom {
  int64_t rows, key_block, block, width;  // of queries, of keys and of queries at a time, of a row; padded
  int64_t row, column;                     // from one row of width to the next, and from one key's queries to the next key's
  Arena<A> arena;
  A *keys, *values, *grad_k, *grad_v;                      // a block of keys
  A *queries, *grads, *outputs, *turned_queries, *turned_grads;  // a block of queries
  A *probabilities, *logit_grads;                          // [keys, queries]
  A *grad_q, *lse, *delta;                                 // all queries

  BackwardRoom(const Tensor& q, int64_t keys_, bool sums_queries)
      : rows(padded(q.size(1), kQueryBlock)),
        key_block(std::min(kKeyBlock, padded(std::max<int64_t>(keys_, 1), kTileRows))),
        block(std::min(kQueryBlock, padded(std::max<int64_t>(q.size(1), 1), kColumns<A>))),
        width(padded(q.size(3), kColumns<A>)),
        row(odd_lines<A>(width)),
        column(odd_lines<A>(block)),
        arena(q, 4 * key_block * row + 3 * block * row + 2 * width * column + 2 * key_block * column + rows * (2 + (sums_queries ? row : 0))),
        keys(arena.take(key_block * row)),
        values(arena.take(key_block * row)),
        grad_k(arena.take(key_block * row)),
        grad_v(arena.take(key_block * row)),
        queries(arena.take(block * row)),
        grads(arena.take(block * row)),
        outputs(arena.take(block * row)),
        turned_queries(arena.take(width * column)),
        turned_grads(arena.take(width * column)),
        probabilities(arena.take(key_block * column)),
        logit_grads(arena.take(key_block * column)),
        grad_q(arena.take(sums_queries ? rows * row : 0)),
        lse(arena.take(rows)),
        delta(arena.take(rows)) {}
};

template <class T>
struct Operands {
  using A = Acc<T>;
  TokensOf<T> grad, q, k, v, out;
  PerQuery<const A> lse;
  const A* grad_lse;  // or null
  A scale;
};

// log-sum-exps of a block of queries, and by how much their probabilities' gradients are moved to become the logits': <grad, output> - grad_lse.
template <class T>
void about_queries(const Operands<T>& x, int64_t b, int64_t h, int64_t begin, int64_t rows, BackwardRoom<Acc<T>>& room) {
  using A = Acc<T>;
  const Factor<A> outputs = rows_of(x.out, b, h, begin, rows, rows, room.width, room.outputs, room.row);
  const int64_t offset = (b * x.q.heads + h) * x.q.rows + begin;
  for (int64_t r = 0; r < rows; ++r) {
    const A *g = room.grads + r * room.row, *o = outputs.data + r * outputs.row;
    Lanes<A> sums{}, u, v;
    for (int64_t d = 0; d < room.width; d += kLanes<A>) {
      load_lanes(g + d, u);
      load_lanes(o + d, v);
      sums += u * v;
    }
    room.lse[begin + r] = x.lse.data[offset + r];
    room.delta[begin + r] = sum_of_lanes<A>(sums) - (x.grad_lse ? x.grad_lse[offset + r] : A(0));
  }
  std::fill(room.lse + begin + rows, room.lse + begin + room.block, A(0));
  std::fill(room.delta + begin + rows, room.delta + begin + room.block, A(0));
}

// From logits in `probabilities` and the probabilities' gradients in `logit_grads`: the probabilities, and the logits' gradients.
template <class A>
void probabilities_and_gradients(BackwardRoom<A>& room, int64_t count, const A* lse, const A* delta) {
  for (int64_t c = 0; c < room.block; c += kLanes<A>) {
    Lanes<A> log_sum, moved, p, g;
    load_lanes(lse + c, log_sum);
    load_lanes(delta + c, moved);
    for (int64_t k = 0; k < count; ++k) {
      A *at = room.probabilities + k * room.column + c, *grad_at = room.logit_grads + k * room.column + c;
      load_lanes(at, p);
      load_lanes(grad_at, g);
      exp_of_nonpositive(p - log_sum, p);
      store_lanes<A>(p, at);
      store_lanes<A>(logit_gradient(p, g, moved), grad_at);
    }
  }
}

// A block of keys of one head.
struct Keys {
  int64_t b, h, begin, count;
};

template <class T>
struct Gradients {
  std::optional<ResultOf<T>> q, k, v;
};

// What the block of queries at `begin` writes, what the next one reads, and its share of the next keys.
template <class T>
Ahead look_ahead(const Operands<T>& x, const Gradients<T>& to, const Keys& keys, const Keys& next, int64_t begin, int64_t block) {
  Ahead ahead;
  const int64_t rows = x.q.rows, blocks = (rows + block - 1) / block, index = begin / block;
  const auto share = [&](int64_t count) { return (count + blocks - 1) / blocks; };
  const auto result = [&](const std::optional<ResultOf<T>>& y, const TokensOf<T>& like, int64_t first, int64_t last) {
    if (y) ahead.add(y->at(keys.b, first, keys.h), y->row_stride, like.width, last - first);
  };
  const int64_t own = share(keys.count), own_first = keys.begin + index * own, own_last = std::min(own_first + own, keys.begin + keys.count);
  result(to.k, x.k, own_first, own_last);
  result(to.v, x.v, own_first, own_last);
  result(to.q, x.q, begin, std::min(begin + block, rows));
  const bool here = begin + block < rows;
  if (here || next.count) {
    const int64_t b = here ? keys.b : next.b, h = here ? keys.h : next.h, first = here ? begin + block : 0;
    for (const auto* y : {&x.q, &x.grad, &x.out}) ahead.add(*y, b, h, first, std::min(first + block, rows));
  }
  const int64_t theirs = share(next.count), first = next.begin + index * theirs, last = std::min(first + theirs, next.begin + next.count);
  for (const auto* y : {&x.k, &x.v}) ahead.add(*y, next.b, next.h, first, last);
  return ahead;
}

// Gradients of a block of keys, and its share of those of all queries, which it is the first of its run to add to or not; `known`: whether
// what is about the queries has been gathered.
template <class T>
void one_key_block(
    const Operands<T>& x, const Gradients<T>& to, const Keys& keys, const Keys& next, bool first, bool known, BackwardRoom<Acc<T>>& room) {
  using A = Acc<T>;
  const int64_t w = room.row, n = room.column, count = keys.count, tiled_keys = padded(count, kTileRows);
  copy_rows(x.k, keys.b, keys.h, keys.begin, count, tiled_keys, room.keys, w);
  const Factor<A> values = rows_of(x.v, keys.b, keys.h, keys.begin, count, tiled_keys, x.v.width, room.values, w);
  for (int64_t begin = 0; begin < x.q.rows; begin += room.block) {
    const int64_t rows = std::min(room.block, x.q.rows - begin), tiled = padded(rows, kTileRows);
    const bool more = begin > 0;
    Ahead ahead = look_ahead(x, to, keys, next, begin, room.block);
    copy_rows(x.q, keys.b, keys.h, begin, rows, room.block, room.queries, w);
    copy_rows(x.grad, keys.b, keys.h, begin, rows, room.block, room.grads, w);
    if (!known) about_queries(x, keys.b, keys.h, begin, rows, room);
    transpose(room.queries, room.block, room.width, w, x.scale, room.turned_queries, n);
    transpose(room.grads, room.block, room.width, w, A(1), room.turned_grads, n);
    multiply<A>({room.keys, w, 1}, room.turned_queries, n, room.probabilities, n, tiled_keys, x.q.width, room.block, false, ahead);
    multiply<A>(values, room.turned_grads, n, room.logit_grads, n, tiled_keys, x.q.width, room.block, false, ahead);
    probabilities_and_gradients(room, count, room.lse + begin, room.delta + begin);
    if (to.v) multiply<A>({room.probabilities, n, 1}, room.grads, w, room.grad_v, w, tiled_keys, rows, room.width, more, ahead);
    if (to.k) multiply<A>({room.logit_grads, n, 1}, room.queries, w, room.grad_k, w, tiled_keys, rows, room.width, more, ahead);
    if (to.q) multiply<A>({room.logit_grads, 1, n}, room.keys, w, room.grad_q + begin * w, w, tiled, count, room.width, !first, ahead);
  }
  if (to.k) write_head(*to.k, x.k.width, keys.b, keys.h, keys.begin, count, room.grad_k, w, [&](int64_t) { return x.scale; });
  if (to.v) write_head(*to.v, x.v.width, keys.b, keys.h, keys.begin, count, room.grad_v, w, [](int64_t) { return A(1); });
}

template <class T>
void clear_rows(const ResultOf<T>& to, int64_t width, int64_t b, int64_t h, int64_t first, int64_t last) {
  for (int64_t r = first; r < last; ++r) {
    T* row = to.at(b, r, h);
    std::fill(row, row + width, store<T>(0));
  }
}

template <class T>
void backward(const Operands<T>& x, const Tensor& q_, const Gradients<T>& to, const KeyLengths& lengths) {
  using A = Acc<T>;
  const Runs runs(x.q.heads, x.k.rows);
  const int64_t size = x.q.rows * x.q.width, work = std::max<int64_t>(x.q.rows, 1) * std::min(runs.keys, x.k.rows + 1) * x.q.width;
  // Shares of the queries' gradient, [B H, runs, N, D].
  const bool shared = to.q && runs.count > 1;
  Tensor shares = torch::stable::new_empty(
      q_, {shared ? x.q.batch * x.q.heads * runs.count * size : 0}, std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float);
  A* share = write<A>(shares);
  // The keys from `begin` of run i on that some query reaches; without queries no gradient does.
  const auto block_of = [&](int64_t i, int64_t begin) {
    const int64_t unit = i / runs.count, b = unit / x.q.heads, end = std::min((i % runs.count + 1) * runs.keys, x.k.rows);
    const int64_t reached = x.q.rows ? std::min(lengths[b], end) : 0;
    return Keys{b, unit % x.q.heads, begin, std::clamp<int64_t>(reached - begin, 0, kKeyBlock)};
  };
  torch::stable::parallel_for(
      0, x.q.batch * x.q.heads * runs.count, std::max<int64_t>(1, (1 << 19) / work), [&](int64_t first_unit, int64_t last_unit) {
        BackwardRoom<A> room(q_, x.k.rows, to.q.has_value());
        int64_t known = -1;
        for (int64_t i = first_unit; i < last_unit; ++i) {
          const int64_t unit = i / runs.count, b = unit / x.q.heads, h = unit % x.q.heads;
          const int64_t begin = i % runs.count * runs.keys, end = std::min(begin + runs.keys, x.k.rows);
          int64_t k = begin;
          for (Keys keys = block_of(i, k); keys.count > 0; keys = block_of(i, k)) {
            const int64_t first = k;
            k += keys.count;
            Keys next = block_of(i, k);
            if (next.count == 0 && i + 1 < last_unit) next = block_of(i + 1, (i + 1) % runs.count * runs.keys);
            one_key_block(x, to, keys, next, first == begin, unit == known, room);
            known = unit;
          }
          if (to.k) clear_rows(*to.k, x.k.width, b, h, k, end);
          if (to.v) clear_rows(*to.v, x.v.width, b, h, k, end);
          if (!to.q) continue;
          if (k == begin) std::fill(room.grad_q, room.grad_q + room.rows * room.row, A(0));
          if (shared) {
            for (int64_t r = 0; r < x.q.rows; ++r) memcpy(share + i * size + r * x.q.width, room.grad_q + r * room.row, x.q.width * sizeof(A));
          } else {
            write_head(*to.q, x.q.width, b, h, 0, x.q.rows, room.grad_q, room.row, [&](int64_t) { return x.scale; });
          }
        }
      });
  if (!shared) return;
  torch::stable::parallel_for(0, x.q.batch * x.q.heads * x.q.rows, std::max<int64_t>(1, (1 << 16) / x.q.width), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t unit = i / x.q.rows, b = unit / x.q.heads, h = unit % x.q.heads, r = i % x.q.rows;
      A* sum = share + (unit * runs.count * x.q.rows + r) * x.q.width;
      for (int64_t run = 1; run < runs.count; ++run) {
#pragma omp simd
        for (int64_t d = 0; d < x.q.width; ++d) sum[d] += sum[run * size + d];
      }
      write_head(*to.q, x.q.width, b, h, r, 1, sum, x.q.width, [&](int64_t) { return x.scale; });
    }
  });
}

Tensor zeros_like(const Tensor& x) {
  Tensor zeros = empty_as(x);
  return torch::stable::zero_(zeros);
}

// Into those of grad_q, grad_k and grad_v that are there.
void write_gradients(
    const OptionalTensor& grad, const OptionalTensor& grad_lse, const Tensor& q, const Tensor& k, const Tensor& v, double scale,
    const OptionalTensor& key_lengths, const Tensor& output, const Tensor& lse, const OptionalTensor& grad_q, const OptionalTensor& grad_k,
    const OptionalTensor& grad_v) {
  const KeyLengths lengths(key_lengths, k.size(1));
  const Tensor upstream = grad ? *grad : zeros_like(output), log_sums = dense(lse);
  const OptionalTensor upstream_lse = grad_lse ? OptionalTensor(dense(*grad_lse)) : std::nullopt;
  dispatch(q.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    const auto result = [](const OptionalTensor& to) { return to ? std::optional(ResultOf<T>(*to)) : std::nullopt; };
    const Operands<T> x{
        TokensOf<T>(upstream), TokensOf<T>(q), TokensOf<T>(k), TokensOf<T>(v), TokensOf<T>(output), {read<A>(log_sums), q.size(2), q.size(1)},
        upstream_lse ? read<A>(*upstream_lse) : nullptr, static_cast<A>(scale)};
    backward<T>(x, q, {result(grad_q), result(grad_k), result(grad_v)}, lengths);
  });
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(
    OptionalTensor grad, OptionalTensor grad_lse, const Tensor& q, const Tensor& k, const Tensor& v, double scale, OptionalTensor key_lengths,
    const Tensor& output, const Tensor& lse, std::vector<bool> needs) {
  const auto wanted = [&](int i, const Tensor& x) { return needs[i] ? OptionalTensor(empty_as(x)) : std::nullopt; };
  const OptionalTensor grad_q = wanted(0, q), grad_k = wanted(1, k), grad_v = wanted(2, v);
  write_gradients(grad, grad_lse, q, k, v, scale, key_lengths, output, lse, grad_q, grad_k, grad_v);
  const auto given = [&](const OptionalTensor& x) { return x ? *x : absent(q); };
  return {given(grad_q), given(grad_k), given(grad_v)};
}

Tensor attention_packed_backward(
    OptionalTensor grad, OptionalTensor grad_lse, const Tensor& qkv, double scale, OptionalTensor key_lengths, const Tensor& output,
    const Tensor& lse, std::vector<bool>) {
  const Tensor result = empty_as(qkv);
  write_gradients(
      grad, grad_lse, part_of(qkv, 0), part_of(qkv, 1), part_of(qkv, 2), scale, key_lengths, output, lse, part_of(result, 0),
      part_of(result, 1), part_of(result, 2));
  return result;
}

}  // namespace
}  // namespace fastdiff::FASTDIFF_VARIANT

#include "fastdiff/variant_end.h"

FASTDIFF_CPU_KERNELS(m) {
  using namespace fastdiff::FASTDIFF_VARIANT;
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
  m.impl("attention_packed_backward", TORCH_BOX(&attention_packed_backward));
}
