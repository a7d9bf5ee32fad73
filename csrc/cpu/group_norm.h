#pragma once
// How group norm sees its arguments, whichever order the elements of x lie in.
// To be included between variant_begin.h and variant_end.h, after cpu/torch.h.

#include "cpu/lanes.h"
#include "cpu/rows.h"
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
  Plane(const OptionalTensor& x, A constant) : constant_(constant) {
    if (!x) return;
    tensor_ = x->scalar_type() == kDtype<A> ? *x : torch::stable::to(*x, kDtype<A>);
    stride_ = tensor_->stride(tensor_->dim() - 1);
    batch_stride_ = tensor_->dim() == 2 ? tensor_->stride(0) : 0;
    data_ = read<A>(*tensor_);
  }

  A operator()(int64_t b, int64_t c) const { return data_ == nullptr ? constant_ : data_[b * batch_stride_ + c * stride_]; }

 private:
  OptionalTensor tensor_;
  A constant_;
  const A* data_ = nullptr;
  int64_t stride_ = 0, batch_stride_ = 0;
};

// z = normalised * gain + offset.
template <class A>
struct Affine {
  Plane<A> weight, bias, scale, shift;

  Affine(const OptionalTensor& weights, const OptionalTensor& biases, const OptionalTensor& scales, const OptionalTensor& shifts)
      : weight(weights, 1), bias(biases, 0), scale(scales, 0), shift(shifts, 0) {}

  A gain(int64_t b, int64_t c) const { return weight(b, c) * (A(1) + scale(b, c)); }
  A offset(int64_t b, int64_t c) const { return bias(b, c) * (A(1) + scale(b, c)) + shift(b, c); }
};

// Numbers ahead of which an output is fetched before it is written: a store that misses the cache waits longer than the arithmetic takes.
constexpr int64_t kWriteAhead = 256;

// Where the sigmoid is 0 and 1 to the last digit that a sum keeps; beyond, the exponential would leave the normal range.
template <class A>
struct Saturation {
  static constexpr A low = sizeof(A) == sizeof(float) ? -88 : -708, high = sizeof(A) == sizeof(float) ? 87 : 708;
};

// z between the ends of the sigmoid's range, and z at least the lower of them.
template <class A>
FD_INLINE void clamp_to_sigmoid(const Lanes<A>& z, Lanes<A>& above, Lanes<A>& clamped) {
  above = z < Saturation<A>::low ? Lanes<A>{} + Saturation<A>::low : z;
  clamped = above > Saturation<A>::high ? Lanes<A>{} + Saturation<A>::high : above;
}

template <bool kSilu, class A>
FD_INLINE void activation(const Lanes<A>& z, Lanes<A>& y) {
  if constexpr (kSilu) {
    Lanes<A> numerator, clamped, power;
    clamp_to_sigmoid<A>(z, numerator, clamped);
    exp_of_normal(-clamped, power);
    y = numerator / (A(1) + power);
  } else {
    y = z;
  }
}

// The derivative of the activation; 1 - sigmoid is had without a cancellation.
template <bool kSilu, class A>
FD_INLINE void activation_gradient(const Lanes<A>& z, Lanes<A>& slope) {
  if constexpr (kSilu) {
    Lanes<A> above, clamped, power;
    clamp_to_sigmoid<A>(z, above, clamped);
    exp_of_normal(-clamped, power);
    const Lanes<A> sigmoid = A(1) / (A(1) + power);
    slope = sigmoid * (A(1) + clamped * (power * sigmoid));
  } else {
    slope = Lanes<A>{} + A(1);
  }
}

}  // namespace fastdiff::FASTDIFF_VARIANT
