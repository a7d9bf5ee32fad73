#pragma once
// Sums of gradients over rows, in two stages.
// To be included between variant_begin.h and variant_end.h, after cpu/torch.h.

#include "cpu/rows.h"

namespace fastdiff::FASTDIFF_VARIANT {

// Rows over which one task sums gradients before the second stage takes over, and rows whose sum is one term of that: many short sums
// in float32 round less than a long one. Fixed, so that no result depends on threads.
constexpr int64_t kRowBlock = 32;
constexpr int64_t kRowRun = 8;
// Elements that are worth a task of their own.
constexpr int64_t kTaskElements = 32768;

// Blocks of rows, none of them across samples where a gradient is summed by sample.
struct Blocks {
  int64_t segment, per_segment, count;

  Blocks(const Shape& shape, bool by_sample)
      : segment(by_sample ? shape.tokens : shape.rows()),
        per_segment((segment + kRowBlock - 1) / kRowBlock),
        count(by_sample ? shape.batch * per_segment : per_segment) {}

  int64_t begin(int64_t block) const { return block / per_segment * segment + block % per_segment * kRowBlock; }
  int64_t end(int64_t block) const { return std::min(begin(block) + kRowBlock, (block / per_segment + 1) * segment); }
};

inline bool by_sample(const std::optional<Tensor>& t, const Shape& shape) {
  return t && (t->dim() == 2 || (t->dim() == 3 && t->size(1) != shape.tokens));
}

// The gradients of a modulation argument and of the row of a table that is added to it: a row for each row of x, or sums, by sample or over
// all rows, in two stages: over the rows of a block, then over blocks in their order.
template <class A>
class ModulationGradient {
 public:
  // `table` is the gradient's row of the table, or null.
  ModulationGradient(
      const Tensor& out, const std::optional<Tensor>& argument, bool needed, char* table, ScalarType table_dtype, const Shape& shape,
      const Blocks& blocks)
      : out_(out),
        by_row_(needed && argument->dim() == 3 && argument->size(1) == shape.tokens),
        into_out_(needed && !by_row_),
        table_(table),
        table_dtype_(table_dtype),
        channels_(shape.channels),
        groups_(into_out_ && argument->dim() > 1 ? shape.batch : 1),
        blocks_(blocks.count),
        partial_(summed() ? blocks_ * channels_ : 0) {}

  bool by_row() const { return by_row_; }
  bool summed() const { return into_out_ || table_ != nullptr; }
  const Tensor& out() const { return out_; }
  A* sums(int64_t block) const { return partial_.data() + block * channels_; }

  void finish() const {
    if (into_out_) add_blocks(groups_, out_.scalar_type(), static_cast<char*>(out_.mutable_data_ptr()));
    if (table_ != nullptr) add_blocks(1, table_dtype_, table_);
  }

 private:
  void add_blocks(int64_t groups, ScalarType dtype, char* out) const {
    constexpr int64_t width = 256;
    const int64_t per_group = blocks_ / std::max<int64_t>(groups, 1), element_size = size_of(dtype);
    const int64_t pieces = (channels_ + width - 1) / width, cost = std::max<int64_t>(1, per_group * width);
    torch::stable::parallel_for(0, groups * pieces, std::max<int64_t>(1, kTaskElements / cost), [&](int64_t first, int64_t last) {
      for (int64_t item = first; item < last; ++item) {
        const int64_t group = item / pieces, begin = item % pieces * width, n = std::min(width, channels_ - begin);
        double sums[width] = {};
        A narrowed[width];
        for (int64_t block = group * per_group; block < (group + 1) * per_group; ++block) {
          const A* part = partial_.data() + block * channels_ + begin;
          for (int64_t i = 0; i < n; ++i) sums[i] += part[i];
        }
        for (int64_t i = 0; i < n; ++i) narrowed[i] = static_cast<A>(sums[i]);
        narrow_row(dtype, narrowed, n, out + (group * channels_ + begin) * element_size);
      }
    });
  }

  Tensor out_;
  bool by_row_, into_out_;
  char* table_;
  ScalarType table_dtype_;
  int64_t channels_, groups_, blocks_;
  Buffer<A> partial_;
};

// One task's hand in a modulation gradient.
template <class A>
class ModulationGradientRows {
 public:
  ModulationGradientRows(const ModulationGradient<A>& gradient, int64_t channels)
      : gradient_(gradient), channels_(channels), rows_(gradient.by_row() ? &gradient.out() : nullptr, channels), run_(channels) {
    clear(run_.data());
  }

  bool needed() const { return gradient_.by_row() || gradient_.summed(); }

  void start(int64_t block) const {
    if (gradient_.summed()) clear(gradient_.sums(block));
  }

  template <class F>
  void add(int64_t row, F&& term) const {
    if (gradient_.summed()) {
      A* to = run_.data();
#pragma omp simd
      for (int64_t i = 0; i < channels_; ++i) to[i] += term(i);
    }
    if (gradient_.by_row()) {
      A* to = rows_.at(row);
#pragma omp simd
      for (int64_t i = 0; i < channels_; ++i) to[i] = term(i);
      rows_.finish(row);
    }
  }

  // Ends a run of rows.
  void flush(int64_t block) const {
    if (!gradient_.summed()) return;
    A *run = run_.data(), *sums = gradient_.sums(block);
#pragma omp simd
    for (int64_t i = 0; i < channels_; ++i) sums[i] += run[i];
    clear(run);
  }

 private:
  void clear(A* row) const { std::memset(row, 0, channels_ * sizeof(A)); }

  const ModulationGradient<A>& gradient_;
  int64_t channels_;
  OutputRows<A> rows_;
  Buffer<A> run_;
};

}  // namespace fastdiff::FASTDIFF_VARIANT
