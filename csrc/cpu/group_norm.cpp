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
  if (0 < count && count <= kRun) return run_moments(widened(x, count, room), count);
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

// Groups whose statistics are taken one after another, while they all stay in the first cache: each is a chain of sums, divisions and a
// root, whose waiting times then overlap.
constexpr int64_t kStatisticsElements = 4096, kStatisticsGroups = 8;

// Fetches what lies `ahead` of x, which is what the thread reads next: else memory and arithmetic take turns.
template <bool kSilu, class T>
FD_INLINE void normalise_channel(const T* x, T* y, int64_t positions, Acc<T> mean, Acc<T> gain, Acc<T> offset, int64_t ahead) {
  using A = Acc<T>;
  for_each_lanes<A>(positions, [=](int64_t i, int64_t n) {
    __builtin_prefetch(x + i + ahead);
    __builtin_prefetch(y + i + kWriteAhead, 1);
    Lanes<A> value, result;
    load_some(x + i, n, value);
    activation<kSilu, A>((value - mean) * gain + offset, result);
    store_some(result, n, y + i);
  });
}

template <bool kSilu, class T>
void forward_planes(const T* x, T* y, const Layout& layout, const Affine<Acc<T>>& affine, double eps, Statistics<Acc<T>> statistics) {
  using A = Acc<T>;
  for_each_group(layout, [&, x, y](int64_t first, int64_t last) {
    const int64_t width = layout.group_channels(), positions = layout.positions, count = layout.group_elements();
    const int64_t together = std::clamp<int64_t>(kStatisticsElements / std::max<int64_t>(count, 1), 1, kStatisticsGroups);
    Moments found[kStatisticsGroups];
    for (int64_t begin = first; begin < last; begin += together) {
      const int64_t end = std::min(begin + together, last);
      for (int64_t i = begin; i < end; ++i) found[i - begin] = moments(x + i * count, count);
      for (int64_t i = begin; i < end; ++i) statistics.put(i, standard<A>(found[i - begin], eps));
      for (int64_t i = begin; i < end; ++i) {
        const Standard<A> s = statistics.of(i);
        for (int64_t c = i * width; c < (i + 1) * width; ++c) {
          const int64_t b = c / layout.channels, k = c % layout.channels;
          const A gain = s.inverse * affine.gain(b, k), offset = affine.offset(b, k);
          normalise_channel<kSilu>(x + c * positions, y + c * positions, positions, s.mean, gain, offset, (end - begin) * count);
        }
      }
    }
  });
}

// Sums over a sample's channel, [B, C]: of grad_z, and of grad_z times the normalised values.
struct ChannelSums {
  double *plain, *product;
};

// Writes a channel's grad_z and adds up it and grad_z (x - mean), over runs short enough for float32.
template <bool kSilu, class T>
FD_INLINE void channel_sums(
    const T* grad, const T* x, Acc<T>* grad_z, int64_t positions, Acc<T> mean, Acc<T> gain, Acc<T> offset, double& plain, double& product) {
  using A = Acc<T>;
  plain = product = 0;
  for (int64_t begin = 0; begin < positions; begin += kRunLength) {
    Lanes<A> sums{}, products{};
    for_each_lanes<A>(std::min(kRunLength, positions - begin), [&, begin](int64_t i, int64_t n) {
      Lanes<A> value, upstream, slope;
      load_some(x + begin + i, n, value);
      load_some(grad + begin + i, n, upstream);
      const Lanes<A> centred = value - mean;
      activation_gradient<kSilu, A>(centred * gain + offset, slope);
      const Lanes<A> found = upstream * slope;
      store_some(found, n, grad_z + begin + i);
      sums += found;
      products += found * centred;
    });
    plain += sum_of_lanes<A>(sums);
    product += sum_of_lanes<A>(products);
  }
}

template <bool kSilu, class T>
void backward_planes(
    const T* grad, const T* x, T* grad_x, const Layout& layout, const Affine<Acc<T>>& affine, Statistics<const Acc<T>> statistics,
    ChannelSums sums) {
  using A = Acc<T>;
  for_each_group(layout, [&, grad, x, grad_x](int64_t first, int64_t last) {
    const int64_t positions = layout.positions, width = layout.group_channels(), count = layout.group_elements();
    const Buffer<A> grad_z(count), gains(width);
    for (int64_t i = first; i < last; ++i) {
      const Standard<A> s = statistics.of(i);
      const int64_t b = i / layout.groups, channel = i % layout.groups * width;
      double sum = 0, weighted = 0;
      for (int64_t c = 0; c < width; ++c) {
        const int64_t at = (i * width + c) * positions;
        const A gain = affine.gain(b, channel + c);
        gains.data()[c] = s.inverse * gain;
        double &plain = sums.plain[i * width + c], &product = sums.product[i * width + c];
        const A offset = affine.offset(b, channel + c);
        channel_sums<kSilu>(grad + at, x + at, grad_z.data() + c * positions, positions, s.mean, gains.data()[c], offset, plain, product);
        product *= s.inverse;
        sum += gain * plain;
        weighted += gain * product;
      }
      if (grad_x == nullptr) continue;
      const GroupGradient<A> g = group_gradient<A>(sum, weighted, double(count), s.inverse);
      for (int64_t c = 0; c < width; ++c) {
        const A gain = gains.data()[c], mean = s.mean;
        const int64_t at = (i * width + c) * positions;
        const A* dz = grad_z.data() + c * positions;
        for_each_lanes<A>(positions, [=](int64_t l, int64_t n) {
          __builtin_prefetch(x + at + l + count);
          __builtin_prefetch(grad + at + l + count);
          __builtin_prefetch(grad_x + at + l + kWriteAhead, 1);
          Lanes<A> value, upstream;
          load_some(x + at + l, n, value);
          load_some(dz + l, n, upstream);
          store_some(upstream * gain + ((value - mean) * g.slope + g.constant), n, grad_x + at + l);
        });
      }
    }
  });
}

// The positions of a sample in pieces of some rows each: few, since a channel's sum over them is a chain of additions.
struct Pieces {
  int64_t positions, rows, count;

  explicit Pieces(const Layout& layout)
      : positions(layout.positions), rows(std::clamp<int64_t>(kChunk / layout.channels, 8, 32)), count((positions + rows - 1) / rows) {}

  int64_t first(int64_t piece) const { return piece * rows; }
  int64_t last(int64_t piece) const { return std::min((piece + 1) * rows, positions); }
};

// Calls measure(b, piece) for all pieces of a sample, then settle(b), then apply(b, piece). Where there are samples enough for all threads,
// one after another, so that apply finds in the cache what measure has read; else pieces are spread over threads.
template <class F, class G, class H>
void in_stages(const Layout& layout, const Pieces& pieces, F&& measure, G&& settle, H&& apply) {
  const int64_t batch = layout.batch, threads = torch::stable::get_num_threads();
  if (batch % threads == 0 || batch >= 4 * threads) {
    const int64_t grain = std::max<int64_t>(1, 2 * kChunk / std::max<int64_t>(layout.sample_elements(), 1));
    torch::stable::parallel_for(0, batch, grain, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        for (int64_t piece = 0; piece < pieces.count; ++piece) measure(b, piece);
        settle(b);
        for (int64_t piece = 0; piece < pieces.count; ++piece) apply(b, piece);
      }
    });
    return;
  }
  const int64_t grain = std::max<int64_t>(1, 2 * kChunk / std::max<int64_t>(std::min(pieces.rows, pieces.positions) * layout.channels, 1));
  const auto in_parallel = [&](const auto& body) {
    torch::stable::parallel_for(0, batch * pieces.count, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) body(i / pieces.count, i % pieces.count);
    });
  };
  in_parallel(measure);
  for (int64_t b = 0; b < batch; ++b) settle(b);
  in_parallel(apply);
}

// z = (x - mean) * gain + offset for every channel, [B, C] each.
template <class A>
struct Coefficients {
  Buffer<A> mean, gain, offset;

  explicit Coefficients(const Layout& layout)
      : mean(layout.batch * layout.channels), gain(layout.batch * layout.channels), offset(layout.batch * layout.channels) {}

  void settle(int64_t b, const Layout& layout, const Affine<A>& affine, Statistics<const A> statistics) const {
    const int64_t width = layout.group_channels();
    for (int64_t g = 0; g < layout.groups; ++g) {
      const Standard<A> s = statistics.of(b * layout.groups + g);
      for (int64_t c = g * width; c < (g + 1) * width; ++c) {
        const int64_t at = b * layout.channels + c;
        mean.data()[at] = s.mean;
        gain.data()[at] = s.inverse * affine.gain(b, c);
        offset.data()[at] = affine.offset(b, c);
      }
    }
  }
};

// A piece's moments for each group.
template <class T>
void piece_moments(const T* x, int64_t rows, const Layout& layout, Moments* out) {
  using A = Acc<T>;
  const int64_t channels = layout.channels, width = layout.group_channels();
  const Buffer<A> room(2 * channels);
  A *sums = room.data(), *centres = sums + channels;
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

template <bool kSilu, class T>
void forward_rows(const T* x, T* y, const Layout& layout, const Affine<Acc<T>>& affine, double eps, Statistics<Acc<T>> statistics) {
  using A = Acc<T>;
  const Pieces pieces(layout);
  const int64_t channels = layout.channels, groups = layout.groups, sample = layout.sample_elements();
  const Coefficients<A> k(layout);
  std::vector<Moments> partial(layout.batch * pieces.count * groups);
  const auto measure = [&](int64_t b, int64_t piece) {
    const int64_t first = pieces.first(piece), rows = pieces.last(piece) - first;
    piece_moments(x + b * sample + first * channels, rows, layout, &partial[(b * pieces.count + piece) * groups]);
  };
  const auto settle = [&](int64_t b) {
    for (int64_t g = 0; g < groups; ++g) {
      Moments total{0, 0, 0};
      for (int64_t p = 0; p < pieces.count; ++p) total = merged(total, partial[(b * pieces.count + p) * groups + g]);
      statistics.put(b * groups + g, standard<A>(total, eps));
    }
    k.settle(b, layout, affine, {statistics.mean, statistics.inverse});
  };
  const auto apply = [&](int64_t b, int64_t piece) {
    const A *mean = k.mean.data() + b * channels, *gain = k.gain.data() + b * channels, *offset = k.offset.data() + b * channels;
    for (int64_t r = pieces.first(piece); r < pieces.last(piece); ++r) {
      const T* in = x + b * sample + r * channels;
      T* out = y + b * sample + r * channels;
      for_each_lanes<A>(channels, [=](int64_t c, int64_t n) {
        __builtin_prefetch(out + c + kWriteAhead, 1);
        Lanes<A> value, centre, factor, addend, result;
        load_some(in + c, n, value);
        load_some(mean + c, n, centre);
        load_some(gain + c, n, factor);
        load_some(offset + c, n, addend);
        activation<kSilu, A>((value - centre) * factor + addend, result);
        store_some(result, n, out + c);
      });
    }
  };
  in_stages(layout, pieces, measure, settle, apply);
}

// Writes the grad_z of some rows and adds up, by channel, it and grad_z (x - mean).
template <bool kSilu, class T>
void row_sums(
    const T* grad, const T* x, Acc<T>* grad_z, int64_t rows, int64_t channels, const Acc<T>* mean, const Acc<T>* gain, const Acc<T>* offset,
    Acc<T>* plain, Acc<T>* product) {
  using A = Acc<T>;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t at = r * channels;
    for_each_lanes<A>(channels, [=](int64_t c, int64_t n) {
      Lanes<A> value, upstream, centre, factor, addend, sum, weighted, slope;
      load_some(x + at + c, n, value);
      load_some(grad + at + c, n, upstream);
      load_some(mean + c, n, centre);
      load_some(gain + c, n, factor);
      load_some(offset + c, n, addend);
      load_some(plain + c, n, sum);
      load_some(product + c, n, weighted);
      const Lanes<A> centred = value - centre;
      activation_gradient<kSilu, A>(centred * factor + addend, slope);
      const Lanes<A> found = upstream * slope;
      store_some(found, n, grad_z + at + c);
      store_some(sum + found, n, plain + c);
      store_some(weighted + found * centred, n, product + c);
    });
  }
}

template <bool kSilu, class T>
void backward_rows(
    const T* grad, const T* x, T* grad_x, const Layout& layout, const Affine<Acc<T>>& affine, Statistics<const Acc<T>> statistics,
    ChannelSums sums) {
  using A = Acc<T>;
  const Pieces pieces(layout);
  const int64_t channels = layout.channels, width = layout.group_channels(), sample = layout.sample_elements();
  const Coefficients<A> k(layout);
  const Buffer<A> grad_z(layout.batch * sample), partial(layout.batch * pieces.count * 2 * channels);
  const Buffer<A> slopes(layout.batch * channels), constants(layout.batch * channels);
  torch::stable::parallel_for(0, layout.batch, std::max<int64_t>(1, kRunLength / channels), [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) k.settle(b, layout, affine, statistics);
  });
  const auto measure = [&](int64_t b, int64_t piece) {
    const int64_t first = pieces.first(piece), at = b * sample + first * channels;
    A* plain = partial.data() + (b * pieces.count + piece) * 2 * channels;
    std::fill(plain, plain + 2 * channels, A(0));
    row_sums<kSilu>(
        grad + at, x + at, grad_z.data() + at, pieces.last(piece) - first, channels, k.mean.data() + b * channels,
        k.gain.data() + b * channels, k.offset.data() + b * channels, plain, plain + channels);
  };
  const auto settle = [&](int64_t b) {
    double *plain = sums.plain + b * channels, *product = sums.product + b * channels;
    std::fill(plain, plain + channels, 0.0);
    std::fill(product, product + channels, 0.0);
    for (int64_t p = 0; p < pieces.count; ++p) {
      const A* piece = partial.data() + (b * pieces.count + p) * 2 * channels;
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) {
        plain[c] += piece[c];
        product[c] += piece[channels + c];
      }
    }
    for (int64_t g = 0; g < layout.groups; ++g) {
      const double inverse = statistics.inverse[b * layout.groups + g];
      double sum = 0, weighted = 0;
      for (int64_t c = g * width; c < (g + 1) * width; ++c) {
        product[c] *= inverse;
        sum += affine.gain(b, c) * plain[c];
        weighted += affine.gain(b, c) * product[c];
      }
      const GroupGradient<A> gradient = group_gradient<A>(sum, weighted, double(layout.group_elements()), inverse);
      std::fill(slopes.data() + b * channels + g * width, slopes.data() + b * channels + (g + 1) * width, gradient.slope);
      std::fill(constants.data() + b * channels + g * width, constants.data() + b * channels + (g + 1) * width, gradient.constant);
    }
  };
  const auto apply = [&](int64_t b, int64_t piece) {
    if (grad_x == nullptr) return;
    const A *mean = k.mean.data() + b * channels, *gain = k.gain.data() + b * channels;
    const A *slope = slopes.data() + b * channels, *constant = constants.data() + b * channels;
    for (int64_t r = pieces.first(piece); r < pieces.last(piece); ++r) {
      const int64_t at = b * sample + r * channels;
      const T* in = x + at;
      const A* dz = grad_z.data() + at;
      T* out = grad_x + at;
      for (int64_t c = 0; c < channels; c += 64 / int64_t{sizeof(T)}) __builtin_prefetch(out + c + kWriteAhead, 1);
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) out[c] = store<T>(dz[c] * gain[c] + ((load(in[c]) - mean[c]) * slope[c] + constant[c]));
    }
  };
  in_stages(layout, pieces, measure, settle, apply);
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
    const Affine<Acc<T>> affine(weight, bias, scale, shift);
    with_activation(activation, [&](auto silu) {
      if (layout.rows) {
        forward_rows<silu()>(read<T>(input), write<T>(out), layout, affine, eps, statistics);
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
  const Buffer<double> total(layout.channels);
  std::fill(total.data(), total.data() + layout.channels, 0.0);
  for (int64_t b = 0; b < layout.batch; ++b) {
    for (int64_t c = 0; c < layout.channels; ++c) total.data()[c] += value(b, c);
  }
  dispatch(out.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    T* y = write<T>(out);
    for (int64_t c = 0; c < layout.channels; ++c) y[c] = store<T>(static_cast<Acc<T>>(total.data()[c]));
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
    const Affine<A> affine(weight, bias, scale, shift);
    const Statistics<const A> statistics{read<A>(means), read<A>(inverses)};
    T* out = needs[0] ? write<T>(grad_x) : nullptr;
    const Buffer<double> plain(layout.batch * layout.channels), product(layout.batch * layout.channels);
    with_activation(activation, [&](auto silu) {
      if (layout.rows) {
        backward_rows<silu()>(read<T>(upstream), read<T>(input), out, layout, affine, statistics, {plain.data(), product.data()});
      } else {
        backward_planes<silu()>(read<T>(upstream), read<T>(input), out, layout, affine, statistics, {plain.data(), product.data()});
      }
    });
    const auto at = [&](int64_t b, int64_t c) { return b * layout.channels + c; };
    if (needs[1]) {
      grad_weight = over_batch(weight, layout, [&](int64_t b, int64_t c) { return (1.0 + affine.scale(b, c)) * product.data()[at(b, c)]; });
    }
    if (needs[2]) {
      grad_bias = over_batch(bias, layout, [&](int64_t b, int64_t c) { return (1.0 + affine.scale(b, c)) * plain.data()[at(b, c)]; });
    }
    if (needs[3]) {
      grad_scale = per_channel(scale, layout, [&](int64_t b, int64_t c) {
        return affine.weight(b, c) * product.data()[at(b, c)] + affine.bias(b, c) * plain.data()[at(b, c)];
      });
    }
    if (needs[4]) grad_shift = per_channel(shift, layout, [&](int64_t b, int64_t c) { return plain.data()[at(b, c)]; });
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
