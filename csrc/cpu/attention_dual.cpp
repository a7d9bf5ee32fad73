#include "cpu/torch.h"

#include "fastdiff/variant_begin.h"

#include "cpu/attention.h"

namespace fastdiff::FASTDIFF_VARIANT {
namespace {

// Forward mode: as forward, with the tangents of logits beside the logits. A tangent that is absent is zero, and its products are not taken.

template <class T>
struct Tangents {
  std::optional<TokensOf<T>> q, k, v;
  bool of_logits() const { return q || k; }
};

template <class A>
struct DualRoom {
  int64_t rows, block, width, row;  // of keys, of queries at a time, of a row; padded
  Arena<A> arena;
  A *keys, *values, *t_keys, *t_values;
  A *queries, *turned, *t_turned, *result, *t_result;
  Columns<A> columns;
  A *t_logits, *t_sum;

  DualRoom(const Tensor& q, int64_t keys_)
      : rows(padded(std::max<int64_t>(keys_, 1), kTileRows)),
        block(std::min(kQueryBlock, padded(std::max<int64_t>(q.size(1), 1), kColumns<A>))),
        width(padded(q.size(3), kColumns<A>)),
        row(odd_lines<A>(width)),
        arena(q, 4 * rows * row + 3 * block * row + (2 * width + kForwardKeys) * odd_lines<A>(block) + block + Columns<A>::size(block)),
        keys(arena.take(rows * row)),
        values(arena.take(rows * row)),
        t_keys(arena.take(rows * row)),
        t_values(arena.take(rows * row)),
        queries(arena.take(block * row)),
        turned(arena.take(width * odd_lines<A>(block))),
        t_turned(arena.take(width * odd_lines<A>(block))),
        result(arena.take(block * row)),
        t_result(arena.take(block * row)),
        columns(arena, block),
        t_logits(arena.take(kForwardKeys * columns.row)),
        t_sum(arena.take(block)) {}
};

// Turns tangents of logits [count, block] into tangents times exponentials, and adds them to each query's sum.
template <class A>
void weigh(const DualRoom<A>& room, int64_t count, bool first) {
  for (int64_t c = 0; c < room.block; c += kLanes<A>) {
    Lanes<A> sum{}, factor, weight, tangent;
    if (!first) {
      load_lanes(room.t_sum + c, sum);
      load_lanes(room.columns.factor + c, factor);
      sum *= factor;
    }
    for (int64_t k = 0; k < count;) {
      Lanes<A> run{};
      for (const int64_t stop = std::min(k + kRun, count); k < stop; ++k) {
        load_lanes(room.columns.logits + k * room.columns.row + c, weight);
        load_lanes(room.t_logits + k * room.columns.row + c, tangent);
        tangent *= weight;
        run += tangent;
        store_lanes<A>(tangent, room.t_logits + k * room.columns.row + c);
      }
      sum += run;
    }
    store_lanes<A>(sum, room.t_sum + c);
  }
}

// The sums of a block of queries over all keys.
template <class T>
void attend(const Tangents<T>& tangents, const DualRoom<Acc<T>>& room, int64_t queries, int64_t keys, int64_t width, Ahead& ahead) {
  using A = Acc<T>;
  const int64_t tiled = padded(queries, kTileRows), w = room.row, n = room.columns.row;
  for (int64_t k = 0; k < keys; k += kForwardKeys) {
    const int64_t count = std::min(kForwardKeys, keys - k), tiled_keys = padded(count, kTileRows);
    const bool more = k > 0;
    multiply<A>({room.keys + k * w, w, 1}, room.turned, n, room.columns.logits, n, tiled_keys, width, room.block, false, ahead);
    exponentials(room.columns, count, !more);
    if (more) {
      scale_rows(room.result, tiled, room.width, w, room.columns.factor);
      scale_rows(room.t_result, tiled, room.width, w, room.columns.factor);
    }
    multiply<A>({room.columns.logits, 1, n}, room.values + k * w, w, room.result, w, tiled, count, room.width, more, ahead);
    if (tangents.v) multiply<A>({room.columns.logits, 1, n}, room.t_values + k * w, w, room.t_result, w, tiled, count, room.width, more, ahead);
    if (!tangents.of_logits()) continue;
    if (tangents.q) multiply<A>({room.keys + k * w, w, 1}, room.t_turned, n, room.t_logits, n, tiled_keys, width, room.block, false, ahead);
    if (tangents.k) {
      multiply<A>({room.t_keys + k * w, w, 1}, room.turned, n, room.t_logits, n, tiled_keys, width, room.block, bool(tangents.q), ahead);
    }
    weigh(room, count, !more);
    multiply<A>({room.t_logits, 1, n}, room.values + k * w, w, room.t_result, w, tiled, count, room.width, more || tangents.v, ahead);
  }
}

template <class T>
struct DualOutputs {
  ResultOf<T> out, t_out;
  PerQuery<Acc<T>> lse, t_lse;
};

template <class T>
void write_block(const DualOutputs<T>& to, const TokensOf<T>& q, int64_t b, int64_t h, int64_t begin, int64_t rows, const DualRoom<Acc<T>>& room) {
  using A = Acc<T>;
  for (int64_t r = 0; r < rows; ++r) {
    const A inverse = A(1) / room.columns.sum[r], mean = room.t_sum[r] * inverse;
    A *result = room.result + r * room.row, *t_result = room.t_result + r * room.row;
#pragma omp simd
    for (int64_t d = 0; d < q.width; ++d) {
      result[d] *= inverse;
      t_result[d] = t_result[d] * inverse - mean * result[d];
    }
    to.lse.head(b, h)[begin + r] = room.columns.log_sum(r);
    to.t_lse.head(b, h)[begin + r] = mean;
  }
  const auto one = [](int64_t) { return A(1); };
  write_head(to.out, q.width, b, h, begin, rows, room.result, room.row, one);
  write_head(to.t_out, q.width, b, h, begin, rows, room.t_result, room.row, one);
}

template <class T>
void dual(
    const Tensor& q_, const TokensOf<T>& k, const TokensOf<T>& v, const Tangents<T>& tangents, const DualOutputs<T>& to, Acc<T> scale,
    const KeyLengths& lengths) {
  using A = Acc<T>;
  const TokensOf<T> q(q_);
  const Blocks blocks(q);
  const int64_t work = kQueryBlock * std::max<int64_t>(k.rows, 1) * q.width;
  torch::stable::parallel_for(0, q.batch * q.heads * blocks.count, std::max<int64_t>(1, (1 << 19) / work), [&](int64_t first, int64_t last) {
    const DualRoom<A> room(q_, k.rows);
    int64_t known = -1;
    for (int64_t i = first; i < last; ++i) {
      const auto [unit, b, h, index, begin, rows] = blocks[i];
      const int64_t count = lengths[b];
      if (unit != known) {
        copy_rows(k, b, h, 0, count, padded(count, kTileRows), room.keys, room.row);
        copy_rows(v, b, h, 0, count, count, room.values, room.row);
        if (tangents.k) copy_rows(*tangents.k, b, h, 0, count, padded(count, kTileRows), room.t_keys, room.row);
        if (tangents.v) copy_rows(*tangents.v, b, h, 0, count, count, room.t_values, room.row);
        known = unit;
      }
      copy_rows(q, b, h, begin, rows, room.block, room.queries, room.row);
      transpose(room.queries, room.block, room.width, room.row, scale, room.turned, room.columns.row);
      if (tangents.q) {
        copy_rows(*tangents.q, b, h, begin, rows, room.block, room.queries, room.row);
        transpose(room.queries, room.block, room.width, room.row, scale, room.t_turned, room.columns.row);
      }
      if (count == 0) {
        std::fill(room.result, room.result + rows * room.row, A(0));
        room.columns.forget(rows);
      }
      if (count == 0 || !(tangents.v || tangents.of_logits())) std::fill(room.t_result, room.t_result + room.block * room.row, A(0));
      if (count == 0 || !tangents.of_logits()) std::fill(room.t_sum, room.t_sum + rows, A(0));
      Ahead ahead;
      look_ahead(ahead, q, k, v, blocks, i, last);
      attend(tangents, room, rows, count, q.width, ahead);
      write_block(to, q, b, h, begin, rows, room);
    }
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_dual(
    const Tensor& q, const Tensor& k, const Tensor& v, double scale, OptionalTensor key_lengths, OptionalTensor t_q, OptionalTensor t_k,
    OptionalTensor t_v) {
  Tensor out = empty_as(q), lse = empty_per_query(q), t_out = empty_as(q), t_lse = empty_per_query(q);
  const KeyLengths lengths(key_lengths, k.size(1));
  dispatch(q.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    const auto heads = [](const OptionalTensor& x) { return x ? std::optional<TokensOf<T>>(TokensOf<T>(*x)) : std::nullopt; };
    const DualOutputs<T> to{ResultOf<T>(out), ResultOf<T>(t_out), {write<A>(lse), q.size(2), q.size(1)}, {write<A>(t_lse), q.size(2), q.size(1)}};
    dual<T>(q, TokensOf<T>(k), TokensOf<T>(v), {heads(t_q), heads(t_k), heads(t_v)}, to, static_cast<A>(scale), lengths);
  });
  return {out, lse, t_out, t_lse};
}

}  // namespace
}  // namespace fastdiff::FASTDIFF_VARIANT

#include "fastdiff/variant_end.h"

FASTDIFF_CPU_KERNELS(m) {
  using namespace fastdiff::FASTDIFF_VARIANT;
  m.impl("attention_dual", TORCH_BOX(&attention_dual));
}
