#pragma once
// Rows of tensors [B, N, C] and of what is broadcast against them, whatever their strides and dtype.
// To be included between variant_begin.h and variant_end.h, after cpu/torch.h.

#include "cpu/common.h"

namespace fastdiff::FASTDIFF_VARIANT {

struct Shape {
  int64_t batch, tokens, channels;
  explicit Shape(const Tensor& x) : batch(x.size(0)), tokens(x.size(1)), channels(x.size(2)) {}
  int64_t rows() const { return batch * tokens; }
  int64_t elements() const { return rows() * channels; }
};

// Uninitialised numbers that begin with a line of the cache, so that no lanes lie on two.
template <class A>
class Buffer {
 public:
  explicit Buffer(int64_t size) : data_(static_cast<A*>(std::aligned_alloc(64, (std::max<int64_t>(size, 1) * sizeof(A) + 63) / 64 * 64))) {
    STD_TORCH_CHECK(data_ != nullptr, "fastdiff: out of memory");
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  A* data() const { return data_; }

 private:
  A* data_;
};

template <class A>
constexpr ScalarType kDtype = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;

// Calls body(Tag<T>{}) for a dtype whose arithmetic is done in A.
template <class A, class F>
void dispatch_narrow(ScalarType dtype, F&& body) {
  dispatch(dtype, [&](auto tag) {
    if constexpr (std::is_same_v<Acc<typename decltype(tag)::type>, A>) {
      body(tag);
    } else {
      STD_TORCH_CHECK(false, "fastdiff: float64 mixes with no other dtype");
    }
  });
}

inline int64_t size_of(ScalarType dtype) {
  return dispatch(dtype, [](auto tag) { return static_cast<int64_t>(sizeof(typename decltype(tag)::type)); });
}

template <class A>
void widen_row(ScalarType dtype, const char* from, int64_t stride, int64_t n, A* to) {
  dispatch_narrow<A>(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T* x = reinterpret_cast<const T*>(from);
    if (stride == 1) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) to[i] = load(x[i]);
    } else {
      for (int64_t i = 0; i < n; ++i) to[i] = load(x[i * stride]);
    }
  });
}

template <class A>
void narrow_row(ScalarType dtype, const A* from, int64_t n, char* to) {
  dispatch_narrow<A>(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    T* y = reinterpret_cast<T*>(to);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) y[i] = store<T>(from[i]);
  });
}

// Row `row` of a table [rows, C] or [C].
struct TableRow {
  const Tensor& table;
  int64_t row;

  int64_t channel_stride() const { return table.size(table.dim() - 1) > 1 ? table.stride(table.dim() - 1) : 1; }
  const char* data() const {
    return static_cast<const char*>(table.const_data_ptr()) + (table.dim() > 1 ? row * table.stride(0) * table.element_size() : 0);
  }
};

// An operand [B, N, C], [B, 1, C], [B, C] or [C] as rows of A, one for each row of x, whatever its strides and dtype: in place where it
// holds such rows, else in a buffer that is filled anew only where the row changes. An absent operand reads as a constant.
template <class A>
class InputRows {
 public:
  InputRows(const Tensor& t, const Shape& shape) : InputRows(t, std::nullopt, shape) {}

  // Rows to each of which a table's row is added.
  InputRows(const Tensor& t, const std::optional<TableRow>& bias, const Shape& shape)
      : batch_stride_(t.dim() > 1 ? t.stride(0) : 0),
        token_stride_(t.dim() == 3 && t.size(1) == shape.tokens ? t.stride(1) : 0),
        channel_stride_(shape.channels > 1 ? t.stride(t.dim() - 1) : 1),
        channels_(shape.channels),
        element_size_(t.element_size()),
        dtype_(t.scalar_type()),
        data_(static_cast<const char*>(t.const_data_ptr())),
        in_place_(dtype_ == kDtype<A> && channel_stride_ == 1 && !bias),
        buffer_(in_place_ ? 0 : channels_),
        bias_(bias ? channels_ : 0),
        biased_(bias.has_value()) {
    if (bias) widen_row(bias->table.scalar_type(), bias->data(), bias->channel_stride(), channels_, bias_.data());
  }

  static InputRows optional(const std::optional<Tensor>& t, A otherwise, const Shape& shape) { return optional(t, std::nullopt, otherwise, shape); }

  static InputRows optional(const std::optional<Tensor>& t, const std::optional<TableRow>& bias, A otherwise, const Shape& shape) {
    return t ? InputRows(*t, bias, shape) : InputRows(otherwise, bias, shape);
  }

  const A* at(int64_t b, int64_t n) {
    const int64_t offset = this->offset(b, n);
    const char* row = data_ + offset * element_size_;
    if (in_place_) return reinterpret_cast<const A*>(row);
    if (offset != held_) fill(row);
    held_ = offset;
    return buffer_.data();
  }

  // Equal offsets, equal rows.
  int64_t offset(int64_t b, int64_t n) const { return b * batch_stride_ + n * token_stride_; }

 private:
  InputRows(A constant, const std::optional<TableRow>& bias, const Shape& shape)
      : channels_(shape.channels), held_(0), buffer_(shape.channels), bias_(0) {
    A* row = buffer_.data();
    if (bias) {
      widen_row(bias->table.scalar_type(), bias->data(), bias->channel_stride(), channels_, row);
    } else {
      std::memset(row, 0, channels_ * sizeof(A));
    }
    for (int64_t i = 0; i < channels_; ++i) row[i] += constant;
  }

  void fill(const char* row) {
    A* to = buffer_.data();
    widen_row(dtype_, row, channel_stride_, channels_, to);
    if (!biased_) return;
    const A* bias = bias_.data();
#pragma omp simd
    for (int64_t i = 0; i < channels_; ++i) to[i] += bias[i];
  }

  int64_t batch_stride_ = 0, token_stride_ = 0, channel_stride_ = 1, channels_, element_size_ = 1, held_ = -1;
  ScalarType dtype_ = kDtype<A>;
  const char* data_ = nullptr;
  bool in_place_ = false;
  Buffer<A> buffer_, bias_;
  bool biased_ = false;
};

// Rows of A that end in a contiguous tensor of any dtype; without a tensor, or with an empty one, they go nowhere.
template <class A>
class OutputRows {
 public:
  OutputRows(const Tensor* t, int64_t channels)
      : channels_(channels),
        wanted_(t != nullptr && t->numel() > 0),
        element_size_(wanted_ ? t->element_size() : 0),
        dtype_(wanted_ ? t->scalar_type() : kDtype<A>),
        data_(wanted_ ? static_cast<char*>(t->mutable_data_ptr()) : nullptr),
        in_place_(wanted_ && dtype_ == kDtype<A>),
        buffer_(in_place_ ? 0 : channels) {}

  bool wanted() const { return wanted_; }

  A* at(int64_t row) const { return in_place_ ? reinterpret_cast<A*>(address(row)) : buffer_.data(); }

  void finish(int64_t row) const {
    if (wanted_ && !in_place_) narrow_row(dtype_, buffer_.data(), channels_, address(row));
  }

 private:
  char* address(int64_t row) const { return data_ + row * channels_ * element_size_; }

  int64_t channels_;
  bool wanted_;
  int64_t element_size_;
  ScalarType dtype_;
  char* data_;
  bool in_place_;
  Buffer<A> buffer_;
};

}  // namespace fastdiff::FASTDIFF_VARIANT
