#pragma once
// How group norm sees its arguments, whichever order the elements of x lie in.
// To be included between variant_begin.h and variant_end.h, after cpu/torch.h.

#include "cpu/common.h"
#include "fastdiff/group_norm.h"

namespace fastdiff::FASTDIFF_VARIANT {

using OptionalTensor = std::optional<Tensor>;
using torch::headeronly::MemoryFormat;

// x as [batch, channels, positions] in one of two orders: planes (a channel's positions together) or rows (a position's channels together).
struct Layout {
  int64_t batch, channels, positions, groups;
  bool rows;
  MemoryFormat format;

  Layout(const Tensor& x, int64_t num_groups) : batch(x.size(0)), channels(x.size(1)), positions(1), groups(num_groups) {
    for (int64_t d = 2; d < x.dim(); ++d) positions *= x.size(d);
    const bool last = channels_last(x);
    rows = last || positions == 1;
    format = !last ? MemoryFormat::Contiguous : x.dim() == 4 ? MemoryFormat::ChannelsLast : MemoryFormat::ChannelsLast3d;
  }

  int64_t group_channels() const { return channels / groups; }
  int64_t group_elements() const { return group_channels() * positions; }
  int64_t sample_elements() const { return channels * positions; }

  Tensor arranged(const Tensor& x) const { return torch::stable::contiguous(x, format); }
  Tensor empty(const Tensor& x) const {
    if (format == MemoryFormat::Contiguous) return empty_as(x);
    return torch::stable::empty(x.sizes(), x.scalar_type(), std::nullopt, x.device(), std::nullopt, format);
  }
  Tensor empty_statistics(const Tensor& x) const {
    return torch::stable::new_empty(x, {batch, groups}, x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float);
  }

 private:
  static bool channels_last(const Tensor& x) {
    if ((x.dim() != 4 && x.dim() != 5) || x.is_contiguous()) return false;
    int64_t expected = 1;
    const auto next = [&](int64_t d) {
      const bool fits = x.size(d) == 1 || x.stride(d) == expected;
      expected *= x.size(d);
      return fits;
    };
    bool fits = next(1);
    for (int64_t d = x.dim() - 1; d >= 2; --d) fits = next(d) && fits;
    return next(0) && fits;
  }
};

template <class A>
struct Scratch {
  Tensor tensor;
  A* data;

  Scratch(const Tensor& like, int64_t size)
      : tensor(torch::stable::new_empty(like, {size}, std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float)),
        data(write<A>(tensor)) {}
};

// Mean and inverse deviation of every group, [B, groups].
template <class A>
struct Statistics {
  A *mean, *inverse;

  void put(int64_t i, const Standard<A>& s) const {
    mean[i] = s.mean;
    inverse[i] = s.inverse;
  }
  Standard<std::remove_const_t<A>> of(int64_t i) const { return {mean[i], inverse[i]}; }
};

// A tensor [C] or [B, C] of any strides read in A, or a constant in its place.
template <class A>
class Plane {
 public:
  Plane(const OptionalTensor& x, A constant, const Tensor& like, int64_t channels) {
    const auto dtype = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;
    if (x) {
      tensor_ = x->scalar_type() == dtype ? *x : torch::stable::to(*x, dtype);
      stride_ = tensor_->stride(tensor_->dim() - 1);
      batch_stride_ = tensor_->dim() == 2 ? tensor_->stride(0) : 0;
    } else {
      tensor_ = torch::stable::new_empty(like, {channels}, dtype);
      std::fill(write<A>(*tensor_), write<A>(*tensor_) + channels, constant);
    }
    data_ = read<A>(*tensor_);
  }

  A operator()(int64_t b, int64_t c) const { return data_[b * batch_stride_ + c * stride_]; }

 private:
  OptionalTensor tensor_;
  const A* data_;
  int64_t stride_ = 1, batch_stride_ = 0;
};

// z = normalised * gain + offset, with gain = weight (1 + scale) and offset = bias (1 + scale) + shift as arrays [B, C].
template <class A>
struct Affine {
  Plane<A> weight, bias, scale, shift;
  Scratch<A> gain, offset;

  Affine(
      const Tensor& x, const Layout& layout, const OptionalTensor& weights, const OptionalTensor& biases, const OptionalTensor& scales,
      const OptionalTensor& shifts)
      : weight(weights, 1, x, layout.channels),
        bias(biases, 0, x, layout.channels),
        scale(scales, 0, x, layout.channels),
        shift(shifts, 0, x, layout.channels),
        gain(x, layout.batch * layout.channels),
        offset(x, layout.batch * layout.channels) {
    for (int64_t b = 0; b < layout.batch; ++b) {
      A *gains = gain.data + b * layout.channels, *offsets = offset.data + b * layout.channels;
#pragma omp simd
      for (int64_t c = 0; c < layout.channels; ++c) {
        const A factor = A(1) + scale(b, c);
        gains[c] = weight(b, c) * factor;
        offsets[c] = bias(b, c) * factor + shift(b, c);
      }
    }
  }
};

}  // namespace fastdiff::FASTDIFF_VARIANT
