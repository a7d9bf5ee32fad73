#include "cpu/torch.h"

#include "fastdiff/variant_begin.h"

#include "cpu/modulate.h"
#include "cpu/rows.h"
#include "fastdiff/modulate.h"

namespace fastdiff::FASTDIFF_VARIANT {
namespace {

// The arguments of all four ops. With a branch the row that is normalised is x + gate * branch. The table has a row for each of gate,
// shift and scale that the op takes, in this order.
struct Operands {
  Tensor x;
  std::optional<Tensor> branch = {}, gate = {}, weight = {}, shift = {}, scale = {}, table = {};
  bool centred = true;
  double eps = 0;

  std::optional<TableRow> gate_bias() const { return gate ? bias(0) : std::nullopt; }
  std::optional<TableRow> shift_bias() const { return bias(gate ? 1 : 0); }
  std::optional<TableRow> scale_bias() const { return bias(gate ? 2 : 1); }

 private:
  std::optional<TableRow> bias(int64_t row) const { return table ? std::optional<TableRow>({*table, row}) : std::nullopt; }
};

// weight (1 + scale), made anew only where the row changes.
template <class A>
class FactorRows {
 public:
  FactorRows(const Operands& in, const Shape& shape)
      : weight(InputRows<A>::optional(in.weight, 1, shape)),
        scale(InputRows<A>::optional(in.scale, in.scale_bias(), 0, shape)),
        channels_(shape.channels),
        buffer_(shape.channels) {}

  const A* at(int64_t b, int64_t n) {
    const int64_t offset = scale.offset(b, n);
    if (offset != held_) {
      const A *w = weight.at(b, n), *s = scale.at(b, n);
      A* factor = buffer_.data();
#pragma omp simd
      for (int64_t i = 0; i < channels_; ++i) factor[i] = w[i] * (1 + s[i]);
      held_ = offset;
    }
    return buffer_.data();
  }

  InputRows<A> weight, scale;

 private:
  int64_t channels_, held_ = -1;
  Buffer<A> buffer_;
};

// Sum of term(i): four streams side by side hide the latency of additions; in A over runs, in double over those.
template <class A, class F>
FD_INLINE double sum_row(int64_t n, F&& term) {
  constexpr int64_t run = 4096;
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += run) {
    const int64_t quarter = (n - begin < run ? n - begin : run) / 4;
    const int64_t second = begin + quarter, third = second + quarter, fourth = third + quarter, end = n - begin < run ? n : begin + run;
    A p = 0, q = 0, r = 0, s = 0;
#pragma omp simd reduction(+ : p, q, r, s)
    for (int64_t i = 0; i < quarter; ++i) {
      p += term(begin + i);
      q += term(second + i);
      r += term(third + i);
      s += term(fourth + i);
    }
    for (int64_t i = fourth + quarter; i < end; ++i) s += term(i);
    total += double(p) + double(q) + (double(r) + double(s));
  }
  return total;
}

template <class A>
FD_INLINE RowStatistics<A> statistics(const A* x, int64_t n, bool centred, double eps) {
  const A mean = centred ? A(sum_row<A>(n, [=](int64_t i) { return x[i]; }) / n) : A(0);
  const double variance = sum_row<A>(n, [=](int64_t i) { return (x[i] - mean) * (x[i] - mean); }) / n;
  return {mean, A(1 / std::sqrt(variance + eps))};
}

// x's rows, or x + gate * branch.
template <class A>
class HiddenRows {
 public:
  HiddenRows(const Operands& in, const Shape& shape)
      : gate(InputRows<A>::optional(in.gate, in.gate_bias(), 1, shape)),
        branch(InputRows<A>::optional(in.branch, 0, shape)),
        gated_(in.branch.has_value()),
        channels_(shape.channels),
        x_(in.x, shape) {}

  // The row; made in `room` where it is not x's own.
  const A* at(int64_t b, int64_t n, A* room) {
    const A* x = x_.at(b, n);
    if (!gated_) return x;
    const A *y = branch.at(b, n), *g = gate.at(b, n);
#pragma omp simd
    for (int64_t i = 0; i < channels_; ++i) room[i] = x[i] + g[i] * y[i];
    return room;
  }

  InputRows<A> gate, branch;

 private:
  bool gated_;
  int64_t channels_;
  InputRows<A> x_;
};

template <class F>
void for_each_row(const Shape& shape, F&& body) {
  const int64_t grain = std::max<int64_t>(1, kTaskElements / std::max<int64_t>(shape.channels, 1));
  torch::stable::parallel_for(0, shape.rows(), grain, body);
}

// Fills those of the outputs that are there.
template <class A>
void forward(const Operands& in, const Tensor* hidden_out, const Tensor* modulated_out) {
  const Shape shape(in.x);
  const int64_t channels = shape.channels;
  for_each_row(shape, [&](int64_t first, int64_t last) {
    HiddenRows<A> hidden(in, shape);
    FactorRows<A> factors(in, shape);
    InputRows<A> shifts = InputRows<A>::optional(in.shift, in.shift_bias(), 0, shape);
    const OutputRows<A> sums(hidden_out, channels), results(modulated_out, channels);
    for (int64_t row = first; row < last; ++row) {
      const int64_t b = row / shape.tokens, n = row % shape.tokens;
      const A* h = hidden.at(b, n, sums.at(row));
      sums.finish(row);
      if (!results.wanted()) continue;
      const RowStatistics<A> stats = statistics(h, channels, in.centred, in.eps);
      const A *factor = factors.at(b, n), *shift = shifts.at(b, n);
      A* y = results.at(row);
#pragma omp simd
      for (int64_t i = 0; i < channels; ++i) y[i] = modulated(stats.normalise(h[i]), factor[i], shift[i]);
      results.finish(row);
    }
  });
}

struct Gradients {
  Tensor x, branch, gate, weight, shift, scale, table;
};

struct Needs {
  bool x, branch = false, gate = false, weight = false, shift = false, scale = false, table = false;
};

Tensor gradient_of(const std::optional<Tensor>& argument, bool needed, const Tensor& x) { return needed ? empty_as(*argument) : absent(x); }

// Everything about a row happens while it is in the cache.
template <class A>
class BackwardTask {
 public:
  BackwardTask(
      const Operands& in, const Shape& shape, const std::optional<Tensor>& grad_hidden, const std::optional<Tensor>& grad_modulated,
      const Gradients& out, const ModulationGradient<A>& gate, const ModulationGradient<A>& weight, const ModulationGradient<A>& shift,
      const ModulationGradient<A>& scale)
      : in_(in),
        shape_(shape),
        normalised_(grad_modulated.has_value()),
        gate_(gate, shape.channels),
        weight_(weight, shape.channels),
        shift_(shift, shape.channels),
        scale_(scale, shape.channels),
        hidden_(in, shape),
        factors_(in, shape),
        upstream_hidden_(InputRows<A>::optional(grad_hidden, 0, shape)),
        upstream_(InputRows<A>::optional(grad_modulated, 0, shape)),
        grad_x_(&out.x, shape.channels),
        grad_branch_(&out.branch, shape.channels),
        room_(shape.channels),
        normal_(shape.channels) {}

  void rows(int64_t block, int64_t begin, int64_t end) {
    for (const auto* gradient : modulation()) gradient->start(block);
    for (int64_t run = begin; run < end; run += kRowRun) {
      for (int64_t row = run; row < std::min(run + kRowRun, end); ++row) this->row(row);
      for (const auto* gradient : modulation()) gradient->flush(block);
    }
  }

 private:
  std::array<const ModulationGradientRows<A>*, 4> modulation() const { return {&gate_, &weight_, &shift_, &scale_}; }

  void row(int64_t row) {
    const int64_t b = row / shape_.tokens, n = row % shape_.tokens;
    A* grad = grad_x_.at(row);
    if (normalised_) {
      through_norm(row, b, n, grad);
    } else {
      copy(upstream_hidden_.at(b, n), grad);
      if (shift_.needed()) shift_.add(row, [](int64_t) { return A(0); });
      if (scale_.needed()) scale_.add(row, [](int64_t) { return A(0); });
    }
    grad_x_.finish(row);
    through_gate(row, b, n, grad);
  }

  void copy(const A* from, A* to) const { std::memcpy(to, from, shape_.channels * sizeof(A)); }

  void through_norm(int64_t row, int64_t b, int64_t n, A* grad) {
    const int64_t channels = shape_.channels;
    const A* h = hidden_.at(b, n, room_.data());
    const RowStatistics<A> stats = statistics(h, channels, in_.centred, in_.eps);
    A* normal = normal_.data();
#pragma omp simd
    for (int64_t i = 0; i < channels; ++i) normal[i] = stats.normalise(h[i]);
    const A *up = upstream_.at(b, n), *factor = factors_.at(b, n), *up_hidden = upstream_hidden_.at(b, n);
    modulation_gradients(row, b, n, up, normal);
    const A constant = in_.centred ? A(sum_row<A>(channels, [=](int64_t i) { return up[i] * factor[i]; }) / channels) : A(0);
    const A along = A(sum_row<A>(channels, [=](int64_t i) { return up[i] * factor[i] * normal[i]; }) / channels);
    const RowProjections<A> projections{constant, along};
#pragma omp simd
    for (int64_t i = 0; i < channels; ++i) grad[i] = up_hidden[i] + norm_input_gradient(up[i] * factor[i], normal[i], stats, projections);
  }

  void modulation_gradients(int64_t row, int64_t b, int64_t n, const A* up, const A* normal) {
    if (shift_.needed()) shift_.add(row, [=](int64_t i) { return up[i]; });
    if (scale_.needed()) {
      const A* weight = factors_.weight.at(b, n);
      scale_.add(row, [=](int64_t i) { return up[i] * normal[i] * weight[i]; });
    }
    if (weight_.needed()) {
      const A* scale = factors_.scale.at(b, n);
      weight_.add(row, [=](int64_t i) { return up[i] * normal[i] * (1 + scale[i]); });
    }
  }

  void through_gate(int64_t row, int64_t b, int64_t n, const A* grad) {
    if (gate_.needed()) {
      const A* branch = hidden_.branch.at(b, n);
      gate_.add(row, [=](int64_t i) { return grad[i] * branch[i]; });
    }
    if (grad_branch_.wanted()) {
      const A* gate = hidden_.gate.at(b, n);
      A* to = grad_branch_.at(row);
#pragma omp simd
      for (int64_t i = 0; i < shape_.channels; ++i) to[i] = grad[i] * gate[i];
      grad_branch_.finish(row);
    }
  }

  const Operands& in_;
  const Shape& shape_;
  bool normalised_;
  ModulationGradientRows<A> gate_, weight_, shift_, scale_;
  HiddenRows<A> hidden_;
  FactorRows<A> factors_;
  InputRows<A> upstream_hidden_, upstream_;
  OutputRows<A> grad_x_, grad_branch_;
  Buffer<A> room_, normal_;
};

template <class A>
void backward_into(
    const Operands& in, const std::optional<Tensor>& grad_hidden, const std::optional<Tensor>& grad_modulated, const Needs& needs,
    const Gradients& out) {
  const Shape shape(in.x);
  const bool split = (needs.gate && by_sample(in.gate, shape)) || (needs.shift && by_sample(in.shift, shape)) ||
                     (needs.scale && by_sample(in.scale, shape));
  const Blocks blocks(shape, split);
  const auto gradient = [&](const Tensor& to, const std::optional<Tensor>& argument, bool needed, const std::optional<TableRow>& bias) {
    const ScalarType dtype = out.table.scalar_type();
    char* row = needs.table && bias ? static_cast<char*>(out.table.mutable_data_ptr()) + bias->row * shape.channels * size_of(dtype) : nullptr;
    return ModulationGradient<A>(to, argument, needed, row, dtype, shape, blocks);
  };
  const auto gate = gradient(out.gate, in.gate, needs.gate, in.gate_bias());
  const auto weight = gradient(out.weight, in.weight, needs.weight, std::nullopt);
  // Where there is no norm the table has no rows for shift and scale.
  const bool norm = in.shift || grad_modulated;
  const auto shift = gradient(out.shift, in.shift, needs.shift, norm ? in.shift_bias() : std::nullopt);
  const auto scale = gradient(out.scale, in.scale, needs.scale, norm ? in.scale_bias() : std::nullopt);
  const int64_t block_elements = std::max<int64_t>(1, std::min(kRowBlock, blocks.segment) * shape.channels);
  torch::stable::parallel_for(0, blocks.count, std::max<int64_t>(1, kTaskElements / block_elements), [&](int64_t first, int64_t last) {
    BackwardTask<A> task(in, shape, grad_hidden, grad_modulated, out, gate, weight, shift, scale);
    for (int64_t block = first; block < last; ++block) task.rows(block, blocks.begin(block), blocks.end(block));
  });
  for (const auto* gradient : {&gate, &weight, &shift, &scale}) gradient->finish();
}

template <class F>
void by_accumulator(const Tensor& x, F&& body) {
  if (x.scalar_type() == ScalarType::Double) {
    body(Tag<double>{});
  } else {
    body(Tag<float>{});
  }
}

Gradients backward(
    const Operands& in, const std::optional<Tensor>& grad_hidden, const std::optional<Tensor>& grad_modulated, const Needs& needs) {
  const Tensor& x = in.x;
  const Gradients out{
      gradient_of(x, needs.x, x),
      gradient_of(in.branch, needs.branch, x),
      gradient_of(in.gate, needs.gate, x),
      gradient_of(in.weight, needs.weight, x),
      gradient_of(in.shift, needs.shift, x),
      gradient_of(in.scale, needs.scale, x),
      gradient_of(in.table, needs.table, x),
  };
  by_accumulator(x, [&](auto tag) { backward_into<typename decltype(tag)::type>(in, grad_hidden, grad_modulated, needs, out); });
  return out;
}

Tensor forward_modulated(const Operands& in) {
  Tensor out = empty_as(in.x);
  by_accumulator(in.x, [&](auto tag) { forward<typename decltype(tag)::type>(in, nullptr, &out); });
  return out;
}

Tensor layer_norm_modulate(const Tensor& x, const Tensor& shift, const Tensor& scale, const std::optional<Tensor>& table, double eps) {
  return forward_modulated({.x = x, .shift = shift, .scale = scale, .table = table, .eps = eps});
}

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_modulate_backward(
    const Tensor& grad, const Tensor& x, const Tensor& shift, const Tensor& scale, const std::optional<Tensor>& table, double eps,
    std::vector<bool> needs) {
  const Operands in{.x = x, .shift = shift, .scale = scale, .table = table, .eps = eps};
  const Needs wanted{.x = needs[0], .shift = needs[1], .scale = needs[2], .table = needs[3]};
  const Gradients out = backward(in, std::nullopt, grad, wanted);
  return {out.x, out.shift, out.scale, out.table};
}

Tensor rms_norm_modulate(
    const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& shift, const std::optional<Tensor>& scale,
    const std::optional<Tensor>& table, double eps) {
  return forward_modulated({.x = x, .weight = weight, .shift = shift, .scale = scale, .table = table, .centred = false, .eps = eps});
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> rms_norm_modulate_backward(
    const Tensor& grad, const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& shift,
    const std::optional<Tensor>& scale, const std::optional<Tensor>& table, double eps, std::vector<bool> needs) {
  const Operands in{.x = x, .weight = weight, .shift = shift, .scale = scale, .table = table, .centred = false, .eps = eps};
  const Needs wanted{.x = needs[0], .weight = needs[1], .shift = needs[2], .scale = needs[3], .table = needs[4]};
  const Gradients out = backward(in, std::nullopt, grad, wanted);
  return {out.x, out.weight, out.shift, out.scale, out.table};
}

Tensor gate_residual(const Tensor& residual, const Tensor& branch, const Tensor& gate, const std::optional<Tensor>& table) {
  Tensor out = empty_as(residual);
  const Operands in{.x = residual, .branch = branch, .gate = gate, .table = table};
  by_accumulator(residual, [&](auto tag) { forward<typename decltype(tag)::type>(in, &out, nullptr); });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gate_residual_backward(
    const Tensor& grad, const Tensor& residual, const Tensor& branch, const Tensor& gate, const std::optional<Tensor>& table,
    std::vector<bool> needs) {
  const Operands in{.x = residual, .branch = branch, .gate = gate, .table = table};
  const Gradients out = backward(in, grad, std::nullopt, {.x = needs[0], .branch = needs[1], .gate = needs[2], .table = needs[3]});
  return {out.x, out.branch, out.gate, out.table};
}

std::tuple<Tensor, Tensor> gate_residual_norm_modulate(
    const Tensor& residual, const Tensor& branch, const std::optional<Tensor>& gate, const Tensor& shift, const Tensor& scale,
    const std::optional<Tensor>& table, std::string norm, double eps) {
  Tensor hidden = empty_as(residual), out = empty_as(residual);
  const Operands in{.x = residual, .branch = branch, .gate = gate, .shift = shift, .scale = scale, .table = table,
                    .centred = norm == "layer", .eps = eps};
  by_accumulator(residual, [&](auto tag) { forward<typename decltype(tag)::type>(in, &hidden, &out); });
  return {hidden, out};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gate_residual_norm_modulate_backward(
    const std::optional<Tensor>& grad_hidden, const std::optional<Tensor>& grad_modulated, const Tensor& residual, const Tensor& branch,
    const std::optional<Tensor>& gate, const Tensor& shift, const Tensor& scale, const std::optional<Tensor>& table, std::string norm,
    double eps, std::vector<bool> needs) {
  const Operands in{.x = residual, .branch = branch, .gate = gate, .shift = shift, .scale = scale, .table = table,
                    .centred = norm == "layer", .eps = eps};
  const Needs wanted{.x = needs[0], .branch = needs[1], .gate = needs[2], .shift = needs[3], .scale = needs[4], .table = needs[5]};
  const Gradients out = backward(in, grad_hidden, grad_modulated, wanted);
  return {out.x, out.branch, out.gate, out.shift, out.scale, out.table};
}

}  // namespace
}  // namespace fastdiff::FASTDIFF_VARIANT

#include "fastdiff/variant_end.h"

FASTDIFF_CPU_KERNELS(m) {
  using namespace fastdiff::FASTDIFF_VARIANT;
  m.impl("layer_norm_modulate", TORCH_BOX(&layer_norm_modulate));
  m.impl("layer_norm_modulate_backward", TORCH_BOX(&layer_norm_modulate_backward));
  m.impl("rms_norm_modulate", TORCH_BOX(&rms_norm_modulate));
  m.impl("rms_norm_modulate_backward", TORCH_BOX(&rms_norm_modulate_backward));
  m.impl("gate_residual", TORCH_BOX(&gate_residual));
  m.impl("gate_residual_backward", TORCH_BOX(&gate_residual_backward));
  m.impl("gate_residual_norm_modulate", TORCH_BOX(&gate_residual_norm_modulate));
  m.impl("gate_residual_norm_modulate_backward", TORCH_BOX(&gate_residual_norm_modulate_backward));
}
