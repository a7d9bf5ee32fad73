#include "cpu/torch.h"

#include "fastdiff/variant_begin.h"

#include "cpu/group_norm.h"
#include "cpu/lanes.h"
#include "fastdiff/group_norm.h"

namespace fastdiff::FASTDIFF_VARIANT {
namespace {

constexpr int64_t kRun = 2048;

template <class A>
Moments run_moments(const A* x, int64_t count) {
  const double mean = double(sum_in_lanes(x, count, [](const auto& v) { return v; })) / double(count);
  const A centre = static_cast<A>(mean);
  const double squares = sum_in_lanes(x, count, [=](const auto& v) { return (v - centre) * (v - centre); });
  return {double(count), mean, squares};
}

// x itself, or its values in room where they are narrower than what is computed in.
template <class T>
FD_INLINE const Acc<T>* widened(const T* x, int64_t count, Acc<T>* room) {
  if constexpr (std::is_same_v<T, Acc<T>>) {
    return x;
  } else {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) room[i] = load(x[i]);
    return room;
  }
}

template <class T>
Moments moments(const T* x, int64_t count) {
  alignas(64) Acc<T> room[kRun];
  Moments total{0, 0, 0};
  for (int64_t i = 0; i < count; i += kRun) {
    const int64_t run = std::min(kRun, count - i);
    total = merged(total, run_moments(widened(x + i, run, room), run));
  }
  return total;
}

// Calls range(first, last) for ranges of the batch's groups, in parallel.
template <class F>
void for_each_group(const Layout& layout, F&& range) {
  const int64_t grain = std::max<int64_t>(1, 2 * kChunk / std::max<int64_t>(layout.group_elements(), 1));
  torch::stable::parallel_for(0, layout.batch * layout.groups, grain, range);
}

// Calls body(c, first, last) for the part of [begin, end) that lies in channel c, the channels following one another.
template <class F>
FD_INLINE void for_each_channel(int64_t begin, int64_t end, int64_t positions, F&& body) {
  int64_t c = begin / positions;
  for (int64_t i = begin; i < end; ++c) {
    const int64_t last = std::min(end, (c + 1) * positions);
    body(c, i, last);
    i = last;
  }
}

// A group's elements in tiles: z is made channel by channel, the activation in one loop over all channels, since a channel may be short.
constexpr int64_t kTile = 1024;

template <bool kSilu, class T>
void forward_planes(const T* x, T* y, const Layout& layout, const Affine<Acc<T>>& affine, double eps, Statistics<Acc<T>> statistics) {
  using A = Acc<T>;
  for_each_group(layout, [&, x, y](int64_t first, int64_t last) {
    const int64_t count = layout.group_elements();
    alignas(64) A z[kTile];
    for (int64_t i = first; i < last; ++i) {
      const T* in = x + i * count;
      T* out = y + i * count;
      const Standard<A> s = standard<A>(moments(in, count), eps);
      statistics.put(i, s);
      const A mean = s.mean;
      const A *gains = affine.gain.data + i * layout.group_channels(), *offsets = affine.offset.data + i * layout.group_channels();
      for (int64_t begin = 0; begin < count; begin += kTile) {
        const int64_t end = std::min(begin + kTile, count);
        for_each_channel(begin, end, layout.positions, [&](int64_t c, int64_t from, int64_t to) {
          const A gain = s.inverse * gains[c], offset = offsets[c];
#pragma omp simd
          for (int64_t l = from; l < to; ++l) z[l - begin] = (load(in[l]) - mean) * gain + offset;
        });
#pragma omp simd
        for (int64_t l = begin; l < end; ++l) out[l] = store<T>(activation<kSilu>(z[l - begin]));
      }
    }
  });
}

// Sums over a sample's channel, [B, C]: of grad_z, and of grad_z times the normalised values.
struct ChannelSums {
  double *plain, *product;
};

// Writes a group's grad_z, and its channels' sums of grad_z and of grad_z (x - mean).
template <bool kSilu, class T>
FD_INLINE void group_sums(
    const T* grad, const T* x, Acc<T>* grad_z, int64_t count, int64_t positions, Standard<Acc<T>> s, const Acc<T>* gains,
    const Acc<T>* offsets, ChannelSums sums) {
  using A = Acc<T>;
  alignas(64) A centred[kTile], z[kTile];
  for (int64_t begin = 0; begin < count; begin += kTile) {
    const int64_t end = std::min(begin + kTile, count);
    for_each_channel(begin, end, positions, [&](int64_t c, int64_t from, int64_t to) {
      const A gain = s.inverse * gains[c], offset = offsets[c], mean = s.mean;
#pragma omp simd
      for (int64_t l = from; l < to; ++l) {
        centred[l - begin] = load(x[l]) - mean;
        z[l - begin] = centred[l - begin] * gain + offset;
      }
    });
#pragma omp simd
    for (int64_t l = begin; l < end; ++l) grad_z[l] = load(grad[l]) * activation_gradient<kSilu>(z[l - begin]);
    for_each_channel(begin, end, positions, [&](int64_t c, int64_t from, int64_t to) {
      A plain, product;
      sums_and_products(grad_z + from, centred + (from - begin), to - from, plain, product);
      sums.plain[c] += plain;
      sums.product[c] += product;
    });
  }
}

template <bool kSilu, class T>
void backward_planes(
    const T* grad, const T* x, T* grad_x, const Tensor& like, const Layout& layout, const Affine<Acc<T>>& affine,
    Statistics<const Acc<T>> statistics, ChannelSums sums) {
  using A = Acc<T>;
  for_each_group(layout, [&, grad, x, grad_x](int64_t first, int64_t last) {
    const int64_t positions = layout.positions, width = layout.group_channels(), count = layout.group_elements();
    Scratch<A> grad_z(like, count);
    for (int64_t i = first; i < last; ++i) {
      const T* in = x + i * count;
      const Standard<A> s = statistics.of(i);
      const A *gains = affine.gain.data + i * width, *offsets = affine.offset.data + i * width;
      double *plain = sums.plain + i * width, *product = sums.product + i * width;
      std::fill(plain, plain + width, 0.0);
      std::fill(product, product + width, 0.0);
      group_sums<kSilu>(grad + i * count, in, grad_z.data, count, positions, s, gains, offsets, {plain, product});
      double sum = 0, weighted = 0;
      for (int64_t c = 0; c < width; ++c) {
        product[c] *= s.inverse;
        sum += gains[c] * plain[c];
        weighted += gains[c] * product[c];
      }
      if (grad_x == nullptr) continue;
      const GroupGradient<A> g = group_gradient<A>(sum, weighted, double(count), s.inverse);
      for_each_channel(0, count, positions, [&](int64_t c, int64_t from, int64_t to) {
        const A gain = s.inverse * gains[c], mean = s.mean;
        const A* dz = grad_z.data;
        T* out = grad_x + i * count;
#pragma omp simd
        for (int64_t l = from; l < to; ++l) out[l] = store<T>(dz[l] * gain + ((load(in[l]) - mean) * g.slope + g.constant));
      });
    }
  });
}

// The positions of a sample in pieces of some rows each: few, since a channel's sum over them is a chain of additions.
struct Pieces {
  int64_t rows, count;

  explicit Pieces(const Layout& layout) : rows(std::clamp<int64_t>(kChunk / layout.channels, 8, 32)), count((layout.positions + rows - 1) / rows) {}

  // Calls body(b, piece, first row, number of rows, room) for every piece of every sample, in parallel; room is the thread's own.
  template <class A, class F>
  void for_each(const Tensor& like, const Layout& layout, int64_t room, F&& body) const {
    const int64_t grain = std::max<int64_t>(1, 2 * kChunk / (std::min(rows, std::max<int64_t>(layout.positions, 1)) * layout.channels));
    torch::stable::parallel_for(0, layout.batch * count, grain, [&](int64_t begin, int64_t end) {
      const Scratch<A> scratch(like, room);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t piece = i % count, first = piece * rows;
        body(i / count, piece, first, std::min(rows, layout.positions - first), scratch.data);
      }
    });
  }
};

// What turns x into z beside the affine's offset: z = (x - mean) * gain + offset. Arrays [B, C].
template <class A>
struct Coefficients {
  Scratch<A> mean, gain;

  Coefficients(const Tensor& like, const Layout& layout, const Affine<A>& affine, Statistics<const A> statistics)
      : mean(like, layout.batch * layout.channels), gain(like, layout.batch * layout.channels) {
    const int64_t width = layout.group_channels();
    for (int64_t i = 0; i < layout.batch * layout.groups; ++i) {
      const Standard<A> s = statistics.of(i);
#pragma omp simd
      for (int64_t c = i * width; c < (i + 1) * width; ++c) {
        mean.data[c] = s.mean;
        gain.data[c] = s.inverse * affine.gain.data[c];
      }
    }
  }
};

// A piece's moments for each group, with room for two values a channel.
template <class T>
void piece_moments(const T* x, int64_t rows, const Layout& layout, Acc<T>* room, Moments* out) {
  using A = Acc<T>;
  const int64_t channels = layout.channels, width = layout.group_channels();
  A *sums = room, *centres = room + channels;
  std::fill(sums, sums + channels, A(0));
  for (int64_t r = 0; r < rows; ++r) {
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) sums[c] += load(x[r * channels + c]);
  }
  for (int64_t g = 0; g < layout.groups; ++g) {
    double sum = 0;
    for (int64_t c = g * width; c < (g + 1) * width; ++c) sum += sums[c];
    out[g] = {double(rows * width), sum / double(rows * width), 0};
    std::fill(centres + g * width, centres + (g + 1) * width, static_cast<A>(out[g].mean));
  }
  std::fill(sums, sums + channels, A(0));
  for (int64_t r = 0; r < rows; ++r) {
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      const A d = load(x[r * channels + c]) - centres[c];
      sums[c] += d * d;
    }
  }
  for (int64_t g = 0; g < layout.groups; ++g) {
    for (int64_t c = g * width; c < (g + 1) * width; ++c) out[g].squares += sums[c];
  }
}

template <class T>
void row_statistics(const Tensor& input, const Layout& layout, const Pieces& pieces, double eps, Statistics<Acc<T>> statistics) {
  using A = Acc<T>;
  const T* x = read<T>(input);
  std::vector<Moments> partial(layout.batch * pieces.count * layout.groups);
  pieces.for_each<A>(input, layout, 2 * layout.channels, [&](int64_t b, int64_t piece, int64_t first, int64_t rows, A* room) {
    const T* begin = x + b * layout.sample_elements() + first * layout.channels;
    piece_moments(begin, rows, layout, room, &partial[(b * pieces.count + piece) * layout.groups]);
  });
  for (int64_t b = 0; b < layout.batch; ++b) {
    for (int64_t g = 0; g < layout.groups; ++g) {
      Moments total{0, 0, 0};
      for (int64_t p = 0; p < pieces.count; ++p) total = merged(total, partial[(b * pieces.count + p) * layout.groups + g]);
      statistics.put(b * layout.groups + g, standard<A>(total, eps));
    }
  }
}

template <bool kSilu, class T>
void forward_rows(
    const Tensor& input, T* y, const Layout& layout, const Affine<Acc<T>>& affine, double eps, Statistics<Acc<T>> statistics) {
  using A = Acc<T>;
  const T* x = read<T>(input);
  const Pieces pieces(layout);
  row_statistics<T>(input, layout, pieces, eps, statistics);
  const Coefficients<A> k(input, layout, affine, {statistics.mean, statistics.inverse});
  pieces.for_each<A>(input, layout, 0, [&, x, y](int64_t b, int64_t, int64_t first, int64_t rows, A*) {
    const int64_t channels = layout.channels;
    const A *mean = k.mean.data + b * channels, *gain = k.gain.data + b * channels, *offset = affine.offset.data + b * channels;
    for (int64_t r = first; r < first + rows; ++r) {
      const T* in = x + b * layout.sample_elements() + r * channels;
      T* out = y + b * layout.sample_elements() + r * channels;
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) out[c] = store<T>(activation<kSilu>((load(in[c]) - mean[c]) * gain[c] + offset[c]));
    }
  });
}

// Writes grad_z and each piece's sums over its rows of grad_z and of grad_z (x - mean), [B, pieces, 2, C].
template <bool kSilu, class T>
void row_sums(
    const T* grad, const T* x, Acc<T>* grad_z, const Layout& layout, const Pieces& pieces, const Affine<Acc<T>>& affine,
    const Coefficients<Acc<T>>& k, Acc<T>* partial) {
  using A = Acc<T>;
  pieces.for_each<A>(k.mean.tensor, layout, 0, [&, grad, x, grad_z](int64_t b, int64_t piece, int64_t first, int64_t rows, A*) {
    const int64_t channels = layout.channels;
    const A *mean = k.mean.data + b * channels, *gain = k.gain.data + b * channels, *offset = affine.offset.data + b * channels;
    A *plain = partial + (b * pieces.count + piece) * 2 * channels, *product = plain + channels;
    std::fill(plain, plain + 2 * channels, A(0));
    for (int64_t r = first; r < first + rows; ++r) {
      const int64_t at = b * layout.sample_elements() + r * channels;
      const T *in = x + at, *up = grad + at;
      A* out = grad_z + at;
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) {
        const A d = load(in[c]) - mean[c];
        const A dz = load(up[c]) * activation_gradient<kSilu>(d * gain[c] + offset[c]);
        out[c] = dz;
        plain[c] += dz;
        product[c] += dz * d;
      }
    }
  });
}

template <bool kSilu, class T>
void backward_rows(
    const T* grad, const Tensor& input, T* grad_x, const Layout& layout, const Affine<Acc<T>>& affine, Statistics<const Acc<T>> statistics,
    ChannelSums sums) {
  using A = Acc<T>;
  const T* x = read<T>(input);
  const Pieces pieces(layout);
  const Coefficients<A> k(input, layout, affine, statistics);
  const int64_t channels = layout.channels, width = layout.group_channels();
  Scratch<A> grad_z(input, layout.batch * layout.sample_elements()), partial(input, layout.batch * pieces.count * 2 * channels);
  row_sums<kSilu>(grad, x, grad_z.data, layout, pieces, affine, k, partial.data);

  Scratch<A> slopes(input, layout.batch * channels), constants(input, layout.batch * channels);
  for (int64_t b = 0; b < layout.batch; ++b) {
    for (int64_t g = 0; g < layout.groups; ++g) {
      const double inverse = statistics.inverse[b * layout.groups + g];
      double group_sum = 0, group_product = 0;
      for (int64_t c = g * width; c < (g + 1) * width; ++c) {
        double plain = 0, product = 0;
        for (int64_t p = 0; p < pieces.count; ++p) {
          const A* piece = partial.data + (b * pieces.count + p) * 2 * channels;
          plain += piece[c];
          product += piece[channels + c];
        }
        product *= inverse;
        sums.plain[b * channels + c] = plain;
        sums.product[b * channels + c] = product;
        group_sum += affine.gain.data[b * channels + c] * plain;
        group_product += affine.gain.data[b * channels + c] * product;
      }
      const GroupGradient<A> gradient = group_gradient<A>(group_sum, group_product, double(layout.group_elements()), inverse);
      std::fill(slopes.data + b * channels + g * width, slopes.data + b * channels + (g + 1) * width, gradient.slope);
      std::fill(constants.data + b * channels + g * width, constants.data + b * channels + (g + 1) * width, gradient.constant);
    }
  }
  if (grad_x == nullptr) return;
  pieces.for_each<A>(input, layout, 0, [&, x, grad_x](int64_t b, int64_t, int64_t first, int64_t rows, A*) {
    const A *mean = k.mean.data + b * channels, *gain = k.gain.data + b * channels;
    const A *slope = slopes.data + b * channels, *constant = constants.data + b * channels;
    for (int64_t r = first; r < first + rows; ++r) {
      const int64_t at = b * layout.sample_elements() + r * channels;
      const T* in = x + at;
      const A* dz = grad_z.data + at;
      T* out = grad_x + at;
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) out[c] = store<T>(dz[c] * gain[c] + ((load(in[c]) - mean[c]) * slope[c] + constant[c]));
    }
  });
}

template <class F>
void with_activation(const std::optional<std::string>& activation, F&& body) {
  if (activation) {
    body(std::true_type{});
  } else {
    body(std::false_type{});
  }
}

std::tuple<Tensor, Tensor, Tensor> group_norm_silu(
    const Tensor& x, int64_t num_groups, OptionalTensor weight, OptionalTensor bias, OptionalTensor scale, OptionalTensor shift, double eps,
    std::optional<std::string> activation) {
  const Layout layout(x, num_groups);
  const Tensor input = layout.arranged(x);
  Tensor out = layout.empty(x), mean = layout.empty_statistics(x), inverse = layout.empty_statistics(x);
  dispatch(x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Statistics<Acc<T>> statistics{write<Acc<T>>(mean), write<Acc<T>>(inverse)};
    const Affine<Acc<T>> affine(x, layout, weight, bias, scale, shift);
    with_activation(activation, [&](auto silu) {
      if (layout.rows) {
        forward_rows<silu()>(input, write<T>(out), layout, affine, eps, statistics);
      } else {
        forward_planes<silu()>(read<T>(input), write<T>(out), layout, affine, eps, statistics);
      }
    });
  });
  return {out, mean, inverse};
}

// A gradient of shape [B, C] from value(b, c).
template <class F>
Tensor per_channel(const OptionalTensor& like, const Layout& layout, F&& value) {
  Tensor out = empty_as(*like);
  dispatch(out.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    T* y = write<T>(out);
    for (int64_t b = 0; b < layout.batch; ++b) {
      for (int64_t c = 0; c < layout.channels; ++c) y[b * layout.channels + c] = store<T>(static_cast<Acc<T>>(value(b, c)));
    }
  });
  return out;
}

// A gradient of shape [C]: value(b, c) summed over the samples in their order.
template <class F>
Tensor over_batch(const OptionalTensor& like, const Layout& layout, F&& value) {
  Tensor out = empty_as(*like);
  Scratch<double> total(*like, layout.channels);
  std::fill(total.data, total.data + layout.channels, 0.0);
  for (int64_t b = 0; b < layout.batch; ++b) {
    for (int64_t c = 0; c < layout.channels; ++c) total.data[c] += value(b, c);
  }
  dispatch(out.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    T* y = write<T>(out);
    for (int64_t c = 0; c < layout.channels; ++c) y[c] = store<T>(static_cast<Acc<T>>(total.data[c]));
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> group_norm_silu_backward(
    const Tensor& grad, const Tensor& x, int64_t num_groups, OptionalTensor weight, OptionalTensor bias, OptionalTensor scale,
    OptionalTensor shift, double, std::optional<std::string> activation, const Tensor& mean, const Tensor& inverse, std::vector<bool> needs) {
  const Layout layout(x, num_groups);
  const Tensor input = layout.arranged(x), upstream = layout.arranged(grad), means = dense(mean), inverses = dense(inverse);
  Tensor grad_x = needs[0] ? layout.empty(x) : absent(x);
  Tensor grad_weight = absent(x), grad_bias = absent(x), grad_scale = absent(x), grad_shift = absent(x);
  dispatch(x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Acc<T>;
    const Affine<A> affine(x, layout, weight, bias, scale, shift);
    const Statistics<const A> statistics{read<A>(means), read<A>(inverses)};
    T* out = needs[0] ? write<T>(grad_x) : nullptr;
    Scratch<double> plain(x, layout.batch * layout.channels), product(x, layout.batch * layout.channels);
    with_activation(activation, [&](auto silu) {
      if (layout.rows) {
        backward_rows<silu()>(read<T>(upstream), input, out, layout, affine, statistics, {plain.data, product.data});
      } else {
        backward_planes<silu()>(read<T>(upstream), read<T>(input), out, x, layout, affine, statistics, {plain.data, product.data});
      }
    });
    const auto at = [&](int64_t b, int64_t c) { return b * layout.channels + c; };
    if (needs[1]) {
      grad_weight = over_batch(weight, layout, [&](int64_t b, int64_t c) { return (1.0 + affine.scale(b, c)) * product.data[at(b, c)]; });
    }
    if (needs[2]) {
      grad_bias = over_batch(bias, layout, [&](int64_t b, int64_t c) { return (1.0 + affine.scale(b, c)) * plain.data[at(b, c)]; });
    }
    if (needs[3]) {
      grad_scale = per_channel(scale, layout, [&](int64_t b, int64_t c) {
        return affine.weight(b, c) * product.data[at(b, c)] + affine.bias(b, c) * plain.data[at(b, c)];
      });
    }
    if (needs[4]) grad_shift = per_channel(shift, layout, [&](int64_t b, int64_t c) { return plain.data[at(b, c)]; });
  });
  return {grad_x, grad_weight, grad_bias, grad_scale, grad_shift};
}

}  // namespace
}  // namespace fastdiff::FASTDIFF_VARIANT

#include "fastdiff/variant_end.h"

FASTDIFF_CPU_KERNELS(m) {
  using namespace fastdiff::FASTDIFF_VARIANT;
  m.impl("group_norm_silu", TORCH_BOX(&group_norm_silu));
  m.impl("group_norm_silu_backward", TORCH_BOX(&group_norm_silu_backward));
}
