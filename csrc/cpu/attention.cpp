#include "cpu/torch.h"

#include "fastdiff/variant_begin.h"

#include "cpu/attention.h"

namespace fastdiff::FASTDIFF_VARIANT {
namespace {

// A block of queries of one head is a unit of work. It goes through the keys block by block, with what it has summed so far scaled down
// whenever a greater logit comes; a head's keys and values are copied once into rows of the type that is computed in.

template <class A>
struct ForwardRoom {
  int64_t rows, block, width;  // of keys, of queries at a time, of a row; padded
  Arena<A> arena;
  A *keys, *values, *queries, *turned, *result;
  Columns<A> columns;

  ForwardRoom(const Tensor& q, int64_t keys_)
      : rows(padded(std::max<int64_t>(keys_, 1), kTileRows)),
        block(std::min(kQueryBlock, padded(std::max<int64_t>(q.size(1), 1), kColumns<A>))),
        width(padded(q.size(3), kColumns<A>)),
        arena(q, 2 * rows * width + 3 * block * width + Columns<A>::size(block)),
        keys(arena.take(rows * width)),
        values(arena.take(rows * width)),
        queries(arena.take(block * width)),
        turned(arena.take(block * width)),
        result(arena.take(block * width)),
        columns(arena, block) {}
};

// The sums of a block of queries over all keys: of exponentials in `sum`, of values times them in `result`.
template <class A>
void attend(ForwardRoom<A>& room, int64_t queries, int64_t keys, int64_t width) {
  const int64_t tiled = padded(queries, kTileRows);
  for (int64_t k = 0; k < keys; k += kForwardKeys) {
    const int64_t count = std::min(kForwardKeys, keys - k);
    multiply<A>({room.keys + k * room.width, room.width, 1}, room.turned, room.block, room.columns.logits, room.block, padded(count, kTileRows), width, room.block, false);
    exponentials(room.columns, count, k == 0);
    if (k) scale_rows(room.result, tiled, room.width, room.columns.factor);
    multiply<A>({room.columns.logits, 1, room.block}, room.values + k * room.width, room.width, room.result, room.width, tiled, count, room.width, k > 0);
  }
}

template <class T>
void forward(const Tensor& q_, const Tensor& k_, const Tensor& v_, T* out, PerQuery<Acc<T>> lse, Acc<T> scale, const KeyLengths& lengths) {
  using A = Acc<T>;
  const Heads<T> q(q_), k(k_), v(v_);
  const int64_t blocks = (q.rows + kQueryBlock - 1) / kQueryBlock;
  const int64_t work = kQueryBlock * std::max<int64_t>(k.rows, 1) * q.width;
  torch::stable::parallel_for(0, q.batch * q.heads * blocks, std::max<int64_t>(1, (1 << 20) / work), [&](int64_t first, int64_t last) {
    ForwardRoom<A> room(q_, k.rows);
    int64_t packed = -1;
    for (int64_t i = first; i < last; ++i) {
      const int64_t unit = i / blocks, b = unit / q.heads, h = unit % q.heads, count = lengths[b];
      const int64_t begin = i % blocks * kQueryBlock, rows = std::min(kQueryBlock, q.rows - begin);
      if (unit != packed) {
        k.copy(b, h, 0, count, padded(count, kTileRows), 1, room.keys, room.width);
        v.copy(b, h, 0, count, count, 1, room.values, room.width);
        packed = unit;
      }
      q.copy(b, h, begin, rows, room.block, scale, room.queries, room.width);
      transpose(room.queries, room.block, room.width, room.width, room.turned, room.block);
      attend(room, rows, count, q.width);
      if (count == 0) {
        std::fill(room.result, room.result + rows * room.width, A(0));
        room.columns.forget(rows);
      }
      write_head(out, q, b, h, begin, rows, room.result, room.width, [&](int64_t r) { return A(1) / room.columns.sum[r]; });
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
    forward<T>(q, k, v, write<T>(out), {write<A>(lse), q.size(2), q.size(1)}, static_cast<A>(scale), lengths);
  });
  return {out, lse};
}

}  // namespace
}  // namespace fastdiff::FASTDIFF_VARIANT

#include "fastdiff/variant_end.h"

FASTDIFF_CPU_KERNELS(m) {
  using namespace fastdiff::FASTDIFF_VARIANT;
  m.impl("attention", TORCH_BOX(&attention));
}
