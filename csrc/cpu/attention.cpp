#include "cpu/torch.h"

#include "fastdiff/variant_begin.h"

#include "cpu/attention.h"

namespace fastdiff::FASTDIFF_VARIANT {
namespace {

// A block of queries of one head is a unit of work. It goes through the keys block by block, with what it has summed so far scaled down
// whenever a greater logit comes. A head's values, and its keys where they cannot be read in place, are copied once into rows of the type
// that is computed in.

template <class A>
struct ForwardRoom {
  int64_t rows, block, width, row;  // of keys, of queries at a time, of a row; padded
  Arena<A> arena;
  A *keys, *values, *queries, *turned, *result;
  Columns<A> columns;

  ForwardRoom(const Tensor& q, int64_t keys_)
      : rows(padded(std::max<int64_t>(keys_, 1), kTileRows)),
        block(std::min(kQueryBlock, padded(std::max<int64_t>(q.size(1), 1), kColumns<A>))),
        width(padded(q.size(3), kColumns<A>)),
        row(odd_lines<A>(width)),
        arena(q, 2 * rows * row + 2 * block * row + width * odd_lines<A>(block) + Columns<A>::size(block)),
        keys(arena.take(rows * row)),
        values(arena.take(rows * row)),
        queries(arena.take(block * row)),
        turned(arena.take(width * odd_lines<A>(block))),
        result(arena.take(block * row)),
        columns(arena, block) {}
};

// The sums of a block of queries over all keys: of exponentials in `sum`, of values times them in `result`.
template <class A>
void attend(ForwardRoom<A>& room, Factor<A> keys, int64_t queries, int64_t keys_, int64_t width, Ahead& ahead) {
  const int64_t tiled = padded(queries, kTileRows), w = room.row, n = room.columns.row;
  for (int64_t k = 0; k < keys_; k += kForwardKeys) {
    const int64_t count = std::min(kForwardKeys, keys_ - k), tiled_keys = padded(count, kTileRows);
    multiply<A>({keys.data + k * keys.row, keys.row, 1}, room.turned, n, room.columns.logits, n, tiled_keys, width, room.block, false, ahead);
    exponentials(room.columns, count, k == 0);
    if (k) scale_rows(room.result, tiled, room.width, w, room.columns.factor);
    multiply<A>({room.columns.logits, 1, n}, room.values + k * w, w, room.result, w, tiled, count, room.width, k > 0, ahead);
  }
}

template <class T>
void forward(
    const Tensor& q_, const TokensOf<T>& k, const TokensOf<T>& v, const ResultOf<T>& out, PerQuery<Acc<T>> lse, Acc<T> scale,
    const KeyLengths& lengths) {
  using A = Acc<T>;
  const TokensOf<T> q(q_);
  const Blocks blocks(q);
  const int64_t work = kQueryBlock * std::max<int64_t>(k.rows, 1) * q.width;
  torch::stable::parallel_for(0, q.batch * q.heads * blocks.count, std::max<int64_t>(1, (1 << 20) / work), [&](int64_t first, int64_t last) {
    ForwardRoom<A> room(q_, k.rows);
    Factor<A> keys{};
    int64_t known = -1;
    for (int64_t i = first; i < last; ++i) {
      const auto [unit, b, h, index, begin, rows] = blocks[i];
      const int64_t count = lengths[b];
      if (unit != known) {
        keys = rows_of(k, b, h, 0, count, padded(count, kTileRows), k.width, room.keys, room.row);
        copy_rows(v, b, h, 0, count, count, room.values, room.row);
        known = unit;
      }
      const Factor<A> queries = rows_of(q, b, h, begin, rows, room.block, room.width, room.queries, room.row);
      transpose(queries.data, room.block, room.width, queries.row, scale, room.turned, room.columns.row);
      Ahead ahead;
      look_ahead(ahead, q, k, v, blocks, i, last);
      ahead.add(out.at(b, begin, h), out.row_stride, q.width, rows);
      attend(room, keys, rows, count, q.width, ahead);
      if (count == 0) {
        std::fill(room.result, room.result + rows * room.row, A(0));
        room.columns.forget(rows);
      }
      write_head(out, q.width, b, h, begin, rows, room.result, room.row, [&](int64_t r) { return A(1) / room.columns.sum[r]; });
      for (int64_t r = 0; r < rows; ++r) lse.head(b, h)[begin + r] = room.columns.log_sum(r);
    }
  });
}

std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v, double scale, OptionalTensor key_lengths) {
  Tensor out = empty_as(q), lse = empty_per_query(q);
  const KeyLengths lengths(key_lengths, k.size(1));
  dispatch(q.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    const PerQuery<A> log_sums{write<A>(lse), q.size(2), q.size(1)};
    forward(q, TokensOf<T>(k), TokensOf<T>(v), ResultOf<T>(out), log_sums, static_cast<A>(scale), lengths);
  });
  return {out, lse};
}

std::tuple<Tensor, Tensor> attention_packed(const Tensor& qkv, double scale, OptionalTensor key_lengths) {
  return attention(part_of(qkv, 0), part_of(qkv, 1), part_of(qkv, 2), scale, key_lengths);
}

}  // namespace
}  // namespace fastdiff::FASTDIFF_VARIANT

#include "fastdiff/variant_end.h"

FASTDIFF_CPU_KERNELS(m) {
  using namespace fastdiff::FASTDIFF_VARIANT;
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("attention_packed", TORCH_BOX(&attention_packed));
}
