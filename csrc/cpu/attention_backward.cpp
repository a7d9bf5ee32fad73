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
  A *queries, *grads, *turned_queries, *turned_grads;      // a block of queries
  A *probabilities, *logit_grads;                          // [keys, queries]
  A *grad_q, *lse, *delta;                                 // all queries

  BackwardRoom(const Tensor& q, int64_t keys_, bool sums_queries)
      : rows(padded(q.size(1), kQueryBlock)),
        key_block(std::min(kKeyBlock, padded(std::max<int64_t>(keys_, 1), kTileRows))),
        block(std::min(kQueryBlock, padded(std::max<int64_t>(q.size(1), 1), kColumns<A>))),
        width(padded(q.size(3), kColumns<A>)),
        row(odd_lines<A>(width)),
        column(odd_lines<A>(block)),
        arena(q, 4 * key_block * row + 2 * block * row + 2 * width * column + 2 * key_block * column + rows * (2 + (sums_queries ? row : 0))),
        keys(arena.take(key_block * row)),
        values(arena.take(key_block * row)),
        grad_k(arena.take(key_block * row)),
        grad_v(arena.take(key_block * row)),
        queries(arena.take(block * row)),
        grads(arena.take(block * row)),
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
  Heads<T> grad, q, k, v, out;
  PerQuery<const A> lse;
  const A* grad_lse;  // or null
  A scale;
};

// log-sum-exps of a head, and by how much its probabilities' gradients are moved to become the logits': <grad, output> - grad_lse.
template <class T>
void about_queries(const Operands<T>& x, int64_t b, int64_t h, BackwardRoom<Acc<T>>& room) {
  using A = Acc<T>;
  for (int64_t begin = 0; begin < x.q.rows; begin += room.block) {
    const int64_t rows = std::min(room.block, x.q.rows - begin);
    x.grad.copy(b, h, begin, rows, rows, 1, room.grads, room.row);
    x.out.copy(b, h, begin, rows, rows, 1, room.queries, room.row);
    for (int64_t r = 0; r < rows; ++r) {
      const A *g = room.grads + r * room.row, *o = room.queries + r * room.row;
      Lanes<A> sums{}, u, v;
      for (int64_t d = 0; d < room.width; d += kLanes<A>) {
        load_lanes(g + d, u);
        load_lanes(o + d, v);
        sums += u * v;
      }
      room.delta[begin + r] = sum_of_lanes<A>(sums);
    }
  }
  const int64_t offset = (b * x.q.heads + h) * x.q.rows;
  for (int64_t r = 0; r < x.q.rows; ++r) {
    room.lse[r] = x.lse.data[offset + r];
    if (x.grad_lse) room.delta[r] -= x.grad_lse[offset + r];
  }
  std::fill(room.lse + x.q.rows, room.lse + room.rows, A(0));
  std::fill(room.delta + x.q.rows, room.delta + room.rows, A(0));
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

// Gradients of a block of keys, and its share of those of all queries.
template <class T>
void one_key_block(
    const Operands<T>& x, int64_t b, int64_t h, int64_t count, bool first, BackwardRoom<Acc<T>>& room, bool want_q, bool want_k, bool want_v) {
  using A = Acc<T>;
  const int64_t w = room.row, n = room.column, tiled_keys = padded(count, kTileRows);
  for (int64_t begin = 0; begin < x.q.rows; begin += room.block) {
    const int64_t rows = std::min(room.block, x.q.rows - begin), tiled = padded(rows, kTileRows);
    const bool more = begin > 0;
    x.q.copy(b, h, begin, rows, room.block, x.scale, room.queries, w);
    x.grad.copy(b, h, begin, rows, room.block, 1, room.grads, w);
    transpose(room.queries, room.block, room.width, w, room.turned_queries, n);
    transpose(room.grads, room.block, room.width, w, room.turned_grads, n);
    multiply<A>({room.keys, w, 1}, room.turned_queries, n, room.probabilities, n, tiled_keys, x.q.width, room.block, false);
    multiply<A>({room.values, w, 1}, room.turned_grads, n, room.logit_grads, n, tiled_keys, x.q.width, room.block, false);
    probabilities_and_gradients(room, count, room.lse + begin, room.delta + begin);
    if (want_v) multiply<A>({room.probabilities, n, 1}, room.grads, w, room.grad_v, w, tiled_keys, rows, room.width, more);
    if (want_k) multiply<A>({room.logit_grads, n, 1}, room.queries, w, room.grad_k, w, tiled_keys, rows, room.width, more);
    if (want_q) multiply<A>({room.logit_grads, 1, n}, room.keys, w, room.grad_q + begin * w, w, tiled, count, room.width, !first);
  }
}

template <class T>
void clear_rows(T* to, const Heads<T>& like, int64_t b, int64_t h, int64_t first, int64_t last) {
  for (int64_t r = first; r < last; ++r) {
    T* row = to + ((b * like.rows + r) * like.heads + h) * like.width;
    std::fill(row, row + like.width, store<T>(0));
  }
}

template <class T>
void backward(const Operands<T>& x, const Tensor& q_, T* grad_q, T* grad_k, T* grad_v, const KeyLengths& lengths) {
  using A = Acc<T>;
  const Runs runs(x.q.heads, x.k.rows);
  const int64_t size = x.q.rows * x.q.width, work = std::max<int64_t>(x.q.rows, 1) * std::min(runs.keys, x.k.rows + 1) * x.q.width;
  // Shares of the queries' gradient, [B H, runs, N, D].
  const bool shared = grad_q && runs.count > 1;
  Tensor shares = torch::stable::new_empty(
      q_, {shared ? x.q.batch * x.q.heads * runs.count * size : 0}, std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float);
  A* share = write<A>(shares);
  torch::stable::parallel_for(
      0, x.q.batch * x.q.heads * runs.count, std::max<int64_t>(1, (1 << 19) / work), [&](int64_t first_unit, int64_t last_unit) {
        BackwardRoom<A> room(q_, x.k.rows, grad_q != nullptr);
        int64_t known = -1;
        for (int64_t i = first_unit; i < last_unit; ++i) {
          const int64_t unit = i / runs.count, b = unit / x.q.heads, h = unit % x.q.heads;
          const int64_t begin = i % runs.count * runs.keys, end = std::min(begin + runs.keys, x.k.rows);
          // Without queries no gradient reaches a key.
          const int64_t reached = std::clamp(x.q.rows ? lengths[b] : 0, begin, std::max(begin, end));
          if (grad_k) clear_rows(grad_k, x.k, b, h, reached, end);
          if (grad_v) clear_rows(grad_v, x.v, b, h, reached, end);
          if (reached > begin && unit != known) {
            about_queries(x, b, h, room);
            known = unit;
          }
          for (int64_t k = begin; k < reached; k += kKeyBlock) {
            const int64_t count = std::min(kKeyBlock, reached - k), tiled = padded(count, kTileRows);
            x.k.copy(b, h, k, count, tiled, 1, room.keys, room.row);
            x.v.copy(b, h, k, count, tiled, 1, room.values, room.row);
            one_key_block(x, b, h, count, k == begin, room, grad_q != nullptr, grad_k != nullptr, grad_v != nullptr);
            const auto one = [](int64_t) { return A(1); };
            if (grad_k) write_head(grad_k, x.k, b, h, k, count, room.grad_k, room.row, one);
            if (grad_v) write_head(grad_v, x.v, b, h, k, count, room.grad_v, room.row, one);
          }
          if (!grad_q) continue;
          if (reached == begin) std::fill(room.grad_q, room.grad_q + room.rows * room.row, A(0));
          if (shared) {
            for (int64_t r = 0; r < x.q.rows; ++r) memcpy(share + i * size + r * x.q.width, room.grad_q + r * room.row, x.q.width * sizeof(A));
          } else {
            write_head(grad_q, x.q, b, h, 0, x.q.rows, room.grad_q, room.row, [&](int64_t) { return x.scale; });
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
      write_head(grad_q, x.q, b, h, r, 1, sum, x.q.width, [&](int64_t) { return x.scale; });
    }
  });
}

Tensor zeros_like(const Tensor& x) {
  Tensor zeros = empty_as(x);
  return torch::stable::zero_(zeros);
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(
    OptionalTensor grad, OptionalTensor grad_lse, const Tensor& q, const Tensor& k, const Tensor& v, double scale, OptionalTensor key_lengths,
    const Tensor& output, const Tensor& lse, std::vector<bool> needs) {
  Tensor grad_q = needs[0] ? empty_as(q) : absent(q), grad_k = needs[1] ? empty_as(k) : absent(k), grad_v = needs[2] ? empty_as(v) : absent(v);
  const KeyLengths lengths(key_lengths, k.size(1));
  const Tensor upstream = grad ? *grad : zeros_like(q), log_sums = dense(lse);
  const OptionalTensor upstream_lse = grad_lse ? OptionalTensor(dense(*grad_lse)) : std::nullopt;
  dispatch(q.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    const auto wanted = [](bool need, const Tensor& x) { return need ? write<T>(x) : nullptr; };
    const Operands<T> x{
        Heads<T>(upstream), Heads<T>(q), Heads<T>(k), Heads<T>(v), Heads<T>(output), {read<A>(log_sums), q.size(2), q.size(1)},
        upstream_lse ? read<A>(*upstream_lse) : nullptr, static_cast<A>(scale)};
    backward<T>(x, q, wanted(needs[0], grad_q), wanted(needs[1], grad_k), wanted(needs[2], grad_v), lengths);
  });
  return {grad_q, grad_k, grad_v};
}

}  // namespace
}  // namespace fastdiff::FASTDIFF_VARIANT

#include "fastdiff/variant_end.h"

FASTDIFF_CPU_KERNELS(m) {
  using namespace fastdiff::FASTDIFF_VARIANT;
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
}
