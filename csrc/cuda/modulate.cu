#include "cuda/modulate.h"

namespace fastdiff::FASTDIFF_VARIANT {
namespace {

// Calls body(Tag<T>{}) for the dtypes of these kernels.
template <class F>
void dispatch_modulate(const Tensor& x, F&& body) {
  STD_TORCH_CHECK(x.scalar_type() != ScalarType::Double, "fastdiff: the CUDA kernels of modulation take float32, bfloat16 and float16");
  dispatch(x.scalar_type(), [&](auto tag) {
    if constexpr (!std::is_same_v<typename decltype(tag)::type, double>) body(tag);
  });
}

// The block's threads and the bytes of shared memory that hold a row.
struct Launch {
  unsigned threads;
  size_t shared;

  explicit Launch(int64_t channels) : threads(32), shared(0) {
    const int64_t steps = (channels + kStep - 1) / kStep;
    threads = static_cast<unsigned>(std::min<int64_t>((steps + 31) / 32 * 32, kMostThreads));
    shared = static_cast<size_t>(steps) * kStep * sizeof(float);
    STD_TORCH_CHECK(shared <= 47 * 1024, "fastdiff: the CUDA kernels of modulation take at most 12032 channels; got ", channels);
  }
};

void forward(const char* where, const Call& call, const Tensor* hidden, const Tensor* modulated) {
  const OnDevice device(call.x);
  if (call.x.numel() == 0) return;
  dispatch_modulate(call.x, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Inputs<T> in(call);
    const Launch launch(in.channels);
    modulate_kernel<T><<<grid_size(in.batch * in.tokens), launch.threads, launch.shared, device.stream()>>>(
        in, hidden ? write<T>(*hidden) : nullptr, modulated ? write<T>(*modulated) : nullptr);
  });
  check_launch(where);
}

Tensor zeros_or_empty(const std::optional<Tensor>& argument, bool needed, const Tensor& x) {
  if (!needed) return absent(x);
  Tensor out = empty_as(*argument);
  // Sums over no rows.
  if (x.numel() == 0 && out.numel() > 0) torch::stable::zero_(out);
  return out;
}

struct Needs {
  bool x, branch = false, gate = false, weight = false, shift = false, scale = false, table = false;
};

struct Results {
  Tensor x, branch, gate, weight, shift, scale, table;
};

bool by_row(const Tensor& argument, const Tensor& x) { return argument.dim() == 3 && argument.size(1) == x.size(1); }

// The gradients of modulation arguments and of the table's rows, as the kernels see them.
class Sums {
 public:
  Sums(const Call& call, const Results& out, const Needs& needs, int64_t blocks)
      : call_(call), blocks_(blocks), channels_(call.x.size(2)), table_(needs.table ? &out.table : nullptr) {
    totals.channels = channels_;
  }

  int64_t slots = 0;
  Totals totals;

  // `table_row` is the argument's row of the table, -1 for none.
  template <class T>
  GradientOf<T> gradient(const std::optional<Tensor>& argument, const Tensor& out, bool needed, int64_t table_row, float* partial) {
    GradientOf<T> result;
    const bool rowwise = needed && by_row(*argument, call_.x), in_table = table_ != nullptr && table_row >= 0;
    if (rowwise) {
      result.rows = out.mutable_data_ptr();
      result.wide = out.scalar_type() == ScalarType::Float;
    }
    if (!in_table && (!needed || rowwise)) return result;
    result.partial = partial + slots * blocks_ * channels_;
    ++slots;
    if (needed && !rowwise) {
      const int64_t groups = argument->dim() > 1 ? call_.x.size(0) : 1;
      add(Total{result.partial, out.mutable_data_ptr(), out.scalar_type(), groups, blocks_ / groups});
    }
    if (in_table) {
      char* row = static_cast<char*>(table_->mutable_data_ptr()) + table_row * channels_ * table_->element_size();
      add(Total{result.partial, row, table_->scalar_type(), 1, blocks_});
    }
    return result;
  }

 private:
  void add(const Total& total) { totals.each[totals.count++] = total; }

  const Call& call_;
  int64_t blocks_, channels_;
  const Tensor* table_;
};

Results backward(
    const char* where, const Call& call, const std::optional<Tensor>& grad_hidden, const std::optional<Tensor>& grad_modulated,
    const Needs& needs) {
  const OnDevice device(call.x);
  const Tensor& x = call.x;
  const Results out{
      zeros_or_empty(x, needs.x, x),
      zeros_or_empty(call.branch, needs.branch, x),
      zeros_or_empty(call.gate, needs.gate, x),
      zeros_or_empty(call.weight, needs.weight, x),
      zeros_or_empty(call.shift, needs.shift, x),
      zeros_or_empty(call.scale, needs.scale, x),
      zeros_or_empty(call.table, needs.table, x),
  };
  if (x.numel() == 0) return out;
  const int64_t block_rows = rows_of_block(x.size(1)), channels = x.size(2);
  const int64_t blocks = x.size(0) * ((x.size(1) + block_rows - 1) / block_rows);
  const Tensor partial = torch::stable::new_empty(x, {4 * blocks * channels}, ScalarType::Float);
  Sums sums(call, out, needs, blocks);
  dispatch_modulate(x, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Inputs<T> in(call);
    Gradients<T> to;
    to.of_hidden = Rows<T>(grad_hidden, in.tokens);
    to.of_modulated = Rows<T>(grad_modulated, in.tokens);
    to.x = needs.x ? write<T>(out.x) : nullptr;
    to.branch = needs.branch ? write<T>(out.branch) : nullptr;
    float* room = write<float>(partial);
    to.gate = sums.gradient<T>(call.gate, out.gate, needs.gate, call.gate_row(), room);
    to.weight = sums.gradient<T>(call.weight, out.weight, needs.weight, -1, room);
    to.shift = sums.gradient<T>(call.shift, out.shift, needs.shift, call.shift_row(), room);
    to.scale = sums.gradient<T>(call.scale, out.scale, needs.scale, call.scale_row(), room);
    const Launch launch(channels);
    modulate_backward_kernel<T><<<grid_size(blocks), launch.threads, launch.shared, device.stream()>>>(in, to, block_rows);
  });
  check_launch(where);
  if (sums.totals.count == 0) return out;
  int64_t groups = 1;
  for (int i = 0; i < sums.totals.count; ++i) groups = std::max(groups, sums.totals.each[i].groups);
  STD_TORCH_CHECK(groups <= 65535, "fastdiff: the CUDA kernels of modulation sum over at most 65535 samples; got ", groups);
  const dim3 grid(grid_size((channels + 31) / 32), static_cast<unsigned>(groups), static_cast<unsigned>(sums.totals.count));
  add_blocks_kernel<<<grid, kThreads, 0, device.stream()>>>(sums.totals);
  check_launch(where);
  return out;
}

Tensor layer_norm_modulate(const Tensor& x, const Tensor& shift, const Tensor& scale, const std::optional<Tensor>& table, double eps) {
  Tensor out = empty_as(x);
  forward("layer_norm_modulate", {.x = x, .shift = shift, .scale = scale, .table = table, .eps = eps}, nullptr, &out);
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_modulate_backward(
    const Tensor& grad, const Tensor& x, const Tensor& shift, const Tensor& scale, const std::optional<Tensor>& table, double eps,
    std::vector<bool> needs) {
  const Call call{.x = x, .shift = shift, .scale = scale, .table = table, .eps = eps};
  const Needs wanted{.x = needs[0], .shift = needs[1], .scale = needs[2], .table = needs[3]};
  const Results out = backward("layer_norm_modulate_backward", call, std::nullopt, grad, wanted);
  return {out.x, out.shift, out.scale, out.table};
}

Tensor rms_norm_modulate(
    const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& shift, const std::optional<Tensor>& scale,
    const std::optional<Tensor>& table, double eps) {
  Tensor out = empty_as(x);
  const Call call{.x = x, .weight = weight, .shift = shift, .scale = scale, .table = table, .centred = false, .eps = eps};
  forward("rms_norm_modulate", call, nullptr, &out);
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> rms_norm_modulate_backward(
    const Tensor& grad, const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& shift,
    const std::optional<Tensor>& scale, const std::optional<Tensor>& table, double eps, std::vector<bool> needs) {
  const Call call{.x = x, .weight = weight, .shift = shift, .scale = scale, .table = table, .centred = false, .eps = eps};
  const Needs wanted{.x = needs[0], .weight = needs[1], .shift = needs[2], .scale = needs[3], .table = needs[4]};
  const Results out = backward("rms_norm_modulate_backward", call, std::nullopt, grad, wanted);
  return {out.x, out.weight, out.shift, out.scale, out.table};
}

Tensor gate_residual(const Tensor& residual, const Tensor& branch, const Tensor& gate, const std::optional<Tensor>& table) {
  Tensor out = empty_as(residual);
  forward("gate_residual", {.x = residual, .branch = branch, .gate = gate, .table = table, .normalised = false}, &out, nullptr);
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gate_residual_backward(
    const Tensor& grad, const Tensor& residual, const Tensor& branch, const Tensor& gate, const std::optional<Tensor>& table,
    std::vector<bool> needs) {
  const Call call{.x = residual, .branch = branch, .gate = gate, .table = table, .normalised = false};
  const Needs wanted{.x = needs[0], .branch = needs[1], .gate = needs[2], .table = needs[3]};
  const Results out = backward("gate_residual_backward", call, grad, std::nullopt, wanted);
  return {out.x, out.branch, out.gate, out.table};
}

std::tuple<Tensor, Tensor> gate_residual_norm_modulate(
    const Tensor& residual, const Tensor& branch, const std::optional<Tensor>& gate, const Tensor& shift, const Tensor& scale,
    const std::optional<Tensor>& table, std::string norm, double eps) {
  Tensor hidden = empty_as(residual), out = empty_as(residual);
  const Call call{.x = residual, .branch = branch, .gate = gate, .shift = shift, .scale = scale, .table = table,
                  .centred = norm == "layer", .eps = eps};
  forward("gate_residual_norm_modulate", call, &hidden, &out);
  return {hidden, out};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gate_residual_norm_modulate_backward(
    const std::optional<Tensor>& grad_hidden, const std::optional<Tensor>& grad_modulated, const Tensor& residual, const Tensor& branch,
    const std::optional<Tensor>& gate, const Tensor& shift, const Tensor& scale, const std::optional<Tensor>& table, std::string norm,
    double eps, std::vector<bool> needs) {
  const Call call{.x = residual, .branch = branch, .gate = gate, .shift = shift, .scale = scale, .table = table,
                  .centred = norm == "layer", .eps = eps};
  const Needs wanted{.x = needs[0], .branch = needs[1], .gate = needs[2], .shift = needs[3], .scale = needs[4], .table = needs[5]};
  const Results out = backward("gate_residual_norm_modulate_backward", call, grad_hidden, grad_modulated, wanted);
  return {out.x, out.branch, out.gate, out.shift, out.scale, out.table};
}

}  // namespace
}  // namespace fastdiff::FASTDIFF_VARIANT

STABLE_TORCH_LIBRARY_IMPL(fastdiff_cuda, CUDA, m) {
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
