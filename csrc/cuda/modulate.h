#pragma once
// Kernels of modulation for few rows, and what they see of a call.
//
// For calls that are over before a GPU is full, where what counts is one cheap launch forward and two backward: a block takes rows one after
// another, each through shared memory. What is optional is a null pointer and costs a branch that all threads take alike, so that one kernel
// serves all four ops.

#include "cuda/common.h"
#include "fastdiff/modulate.h"

namespace fastdiff::FASTDIFF_VARIANT {
namespace {

// Channels that a thread takes at a time, and the most threads of a block: enough for a row of most networks to be one step.
constexpr int kStep = 4;
constexpr int kMostThreads = 384;

struct Values {
  float v[kStep];
};

// Where the channels of one row lie: an activation's, or those of a modulation, a table's row or a weight, of x's dtype or float32.
template <class T>
struct Rows {
  const void* data = nullptr;  // null where the operand is absent
  int64_t batch_stride = 0, token_stride = 0, channel_stride = 1;
  bool wide = std::is_same_v<T, float>;

  Rows() = default;
  Rows(const std::optional<Tensor>& t, int64_t tokens) {
    if (!t) return;
    describe(*t);
    batch_stride = t->dim() > 1 ? t->stride(0) : 0;
    token_stride = t->dim() == 3 && t->size(1) == tokens ? t->stride(1) : 0;
  }

  // Row `row` of a table [rows, C] or [C].
  static Rows of_table(const std::optional<Tensor>& table, int64_t row) {
    Rows rows;
    if (!table) return rows;
    rows.describe(*table);
    const int64_t offset = table->dim() > 1 ? row * table->stride(0) * table->element_size() : 0;
    rows.data = static_cast<const char*>(rows.data) + offset;
    return rows;
  }

  __device__ __forceinline__ bool present() const { return data != nullptr; }

  // `count` channels from c on of an activation, in one load where that is possible; zeros for the others.
  __device__ __forceinline__ Values activation(int64_t b, int64_t n, int64_t c, int count) const {
    const T* from = static_cast<const T*>(data) + b * batch_stride + n * token_stride + c * channel_stride;
    Values out;
    if (count == kStep && channel_stride == 1 && reinterpret_cast<uintptr_t>(from) % (kStep * sizeof(T)) == 0) {
      using Raw = std::conditional_t<sizeof(T) == 4, uint4, uint2>;
      const Raw raw = *reinterpret_cast<const Raw*>(from);
#pragma unroll
      for (int i = 0; i < kStep; ++i) out.v[i] = load(reinterpret_cast<const T*>(&raw)[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kStep; ++i) out.v[i] = i < count ? load(from[i * channel_stride]) : 0.f;
    }
    return out;
  }

  // Adds `count` channels from c on of a modulation to `to`, if there is one.
  __device__ __forceinline__ void add_to(Values& to, int64_t b, int64_t n, int64_t c, int count) const {
    if (!present()) return;
    const int64_t at = b * batch_stride + n * token_stride + c * channel_stride;
#pragma unroll
    for (int i = 0; i < kStep; ++i) {
      if (i >= count) continue;
      const int64_t j = at + i * channel_stride;
      to.v[i] += wide ? static_cast<const float*>(data)[j] : load(static_cast<const T*>(data)[j]);
    }
  }

 private:
  void describe(const Tensor& t) {
    data = t.const_data_ptr();
    channel_stride = t.size(t.dim() - 1) > 1 ? t.stride(t.dim() - 1) : 1;
    wide = t.scalar_type() == ScalarType::Float;
  }
};

// A modulation with the table's row that is added to it; `otherwise` where there is neither.
template <class T>
struct Modulation {
  Rows<T> modulation, bias;
  float otherwise;

  __device__ __forceinline__ Values at(int64_t b, int64_t n, int64_t c, int count) const {
    Values out;
    const float start = modulation.present() || bias.present() ? 0.f : otherwise;
#pragma unroll
    for (int i = 0; i < kStep; ++i) out.v[i] = start;
    modulation.add_to(out, b, n, c, count);
    bias.add_to(out, b, n, c, count);
    return out;
  }
};

template <class T>
__device__ __forceinline__ void store_values(T* target, int count, const Values& values) {
  if (count == kStep && reinterpret_cast<uintptr_t>(target) % (kStep * sizeof(T)) == 0) {
    using Raw = std::conditional_t<sizeof(T) == 4, uint4, uint2>;
    Raw raw;
#pragma unroll
    for (int i = 0; i < kStep; ++i) reinterpret_cast<T*>(&raw)[i] = store<T>(values.v[i]);
    *reinterpret_cast<Raw*>(target) = raw;
  } else {
#pragma unroll
    for (int i = 0; i < kStep; ++i) {
      if (i < count) target[i] = store<T>(values.v[i]);
    }
  }
}

// The arguments of all four ops.
struct Call {
  Tensor x;
  std::optional<Tensor> branch = {}, gate = {}, weight = {}, shift = {}, scale = {}, table = {};
  bool normalised = true, centred = true;
  double eps = 0;

  // The arguments' rows of the table, -1 for none.
  int64_t gate_row() const { return gate ? 0 : -1; }
  int64_t shift_row() const { return !normalised ? -1 : gate ? 1 : 0; }
  int64_t scale_row() const { return !normalised ? -1 : gate ? 2 : 1; }
};

template <class T>
struct Inputs {
  Rows<T> x, branch;
  Modulation<T> gate, weight, shift, scale;
  int64_t batch, tokens, channels;
  bool centred;
  float eps;

  explicit Inputs(const Call& call)
      : batch(call.x.size(0)), tokens(call.x.size(1)), channels(call.x.size(2)), centred(call.centred), eps(static_cast<float>(call.eps)) {
    x = Rows<T>(call.x, tokens);
    branch = Rows<T>(call.branch, tokens);
    const auto modulation = [&](const std::optional<Tensor>& t, int64_t table_row, float otherwise) {
      return Modulation<T>{Rows<T>(t, tokens), table_row < 0 ? Rows<T>() : Rows<T>::of_table(call.table, table_row), otherwise};
    };
    gate = modulation(call.gate, call.gate_row(), 1.f);
    weight = modulation(call.weight, -1, 1.f);
    shift = modulation(call.shift, call.shift_row(), 0.f);
    scale = modulation(call.scale, call.scale_row(), 0.f);
  }

  // x + gate * branch, or x.
  __device__ __forceinline__ Values hidden(int64_t b, int64_t n, int64_t c, int count) const {
    Values h = x.activation(b, n, c, count);
    if (branch.present()) {
      const Values y = branch.activation(b, n, c, count), g = gate.at(b, n, c, count);
#pragma unroll
      for (int i = 0; i < kStep; ++i) h.v[i] += g.v[i] * y.v[i];
    }
    return h;
  }
};

// Sums over a block of whole warps, in every thread, in an order that depends on the number of threads alone.
template <int K>
__device__ __forceinline__ void sum_everywhere(float (&sums)[K]) {
  __shared__ float of_warp[K][kMostThreads / 32];
#pragma unroll
  for (int k = 0; k < K; ++k) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) sums[k] += __shfl_xor_sync(~0u, sums[k], offset);
    if (threadIdx.x % 32 == 0) of_warp[k][threadIdx.x / 32] = sums[k];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < K; ++k) {
    sums[k] = 0;
#pragma unroll 1
    for (int w = 0; w < static_cast<int>(blockDim.x) / 32; ++w) sums[k] += of_warp[k][w];
  }
  __syncthreads();
}

// Calls body(c, count) for the thread's channels: always the same ones, so that what it leaves in memory needs no barrier.
template <class F>
__device__ __forceinline__ void for_each_step(int64_t channels, F&& body) {
#pragma unroll 1
  for (int64_t c = int64_t{threadIdx.x} * kStep; c < channels; c += int64_t{blockDim.x} * kStep) {
    body(c, static_cast<int>(channels - c < kStep ? channels - c : kStep));
  }
}

// The thread's channels of a row in shared memory, whose length is rounded up to whole steps.
__device__ __forceinline__ Values row_at(const float* row, int64_t c) {
  const float4 raw = *reinterpret_cast<const float4*>(row + c);
  return {{raw.x, raw.y, raw.z, raw.w}};
}

__device__ __forceinline__ void put_row(float* row, int64_t c, const Values& values) {
  *reinterpret_cast<float4*>(row + c) = make_float4(values.v[0], values.v[1], values.v[2], values.v[3]);
}

// Statistics of the row that the block's threads left in shared memory, zero beyond its end.
template <class T>
__device__ __forceinline__ RowStatistics<float> statistics(const Inputs<T>& in, const float* row) {
  float sum[1] = {0.f};
  if (in.centred) {
    for_each_step(in.channels, [&](int64_t c, int) {
      const Values h = row_at(row, c);
      sum[0] += (h.v[0] + h.v[1]) + (h.v[2] + h.v[3]);
    });
    sum_everywhere(sum);
  }
  const float mean = sum[0] / in.channels;
  float squares[1] = {0.f};
  for_each_step(in.channels, [&](int64_t c, int count) {
    const Values h = row_at(row, c);
#pragma unroll
    for (int i = 0; i < kStep; ++i) squares[0] += i < count ? (h.v[i] - mean) * (h.v[i] - mean) : 0.f;
  });
  sum_everywhere(squares);
  return {mean, rsqrtf(squares[0] / in.channels + in.eps)};
}

extern __shared__ float4 row_in_shared[];

template <class T>
__global__ void __launch_bounds__(kMostThreads, 1) modulate_kernel(Inputs<T> in, T* hidden_out, T* modulated_out) {
  float* row = reinterpret_cast<float*>(row_in_shared);
  const int64_t index = blockIdx.x, b = index / in.tokens, n = index % in.tokens, start = index * in.channels;
  for_each_step(in.channels, [&](int64_t c, int count) {
    const Values h = in.hidden(b, n, c, count);
    if (hidden_out != nullptr) store_values(hidden_out + start + c, count, h);
    put_row(row, c, h);
  });
  if (modulated_out == nullptr) return;
  const RowStatistics<float> stats = statistics(in, row);
  for_each_step(in.channels, [&](int64_t c, int count) {
    const Values weight = in.weight.at(b, n, c, count), scale = in.scale.at(b, n, c, count), shift = in.shift.at(b, n, c, count);
    Values y = row_at(row, c);
#pragma unroll
    for (int i = 0; i < kStep; ++i) y.v[i] = modulated(stats.normalise(y.v[i]), weight.v[i] * (1.f + scale.v[i]), shift.v[i]);
    store_values(modulated_out + start + c, count, y);
  });
}

// Where a gradient goes: one row for each row of x, or the block's sum over its rows in `partial` [blocks, C]; null where not wanted.
template <class T>
struct GradientOf {
  void* rows = nullptr;
  bool wide = true;
  float* partial = nullptr;

  __device__ __forceinline__ void put(int64_t start, int64_t block_start, int64_t c, int count, bool first, const Values& terms) const {
    if (rows != nullptr) {
      if (wide) {
        store_values(static_cast<float*>(rows) + start + c, count, terms);
      } else {
        store_values(static_cast<T*>(rows) + start + c, count, terms);
      }
    }
    if (partial == nullptr) return;
#pragma unroll
    for (int i = 0; i < kStep; ++i) {
      // In memory, not in registers: any width, and the threads' own channels need no barrier.
      float* sum = partial + block_start + c + i;
      if (i < count) *sum = first ? terms.v[i] : *sum + terms.v[i];
    }
  }
};

template <class T>
struct Gradients {
  Rows<T> of_hidden, of_modulated;
  T *x = nullptr, *branch = nullptr;
  GradientOf<T> gate, weight, shift, scale;
};

// Rows of one sample that a block sums over: a function of the sample's length, so that sums depend on the sample alone. Few where there
// are few, since a block takes its rows one after another.
inline int64_t rows_of_block(int64_t tokens) { return tokens <= 64 ? 2 : tokens <= 512 ? 4 : 8; }

template <class T>
__global__ void __launch_bounds__(kMostThreads, 1) modulate_backward_kernel(Inputs<T> in, Gradients<T> out, int64_t block_rows) {
  float* row = reinterpret_cast<float*>(row_in_shared);
  const int64_t per_sample = (in.tokens + block_rows - 1) / block_rows, b = blockIdx.x / per_sample;
  const int64_t begin = blockIdx.x % per_sample * block_rows, block_start = blockIdx.x * in.channels;
  const int64_t end = begin + block_rows < in.tokens ? begin + block_rows : in.tokens;
#pragma unroll 1
  for (int64_t n = begin; n < end; ++n) {
    const int64_t start = (b * in.tokens + n) * in.channels;
    const bool first = n == begin;
    RowStatistics<float> stats{0.f, 0.f};
    RowProjections<float> means{0.f, 0.f};
    if (out.of_modulated.present()) {
      for_each_step(in.channels, [&](int64_t c, int count) { put_row(row, c, in.hidden(b, n, c, count)); });
      stats = statistics(in, row);
      float projections[2] = {0.f, 0.f};
      for_each_step(in.channels, [&](int64_t c, int count) {
        const Values weight = in.weight.at(b, n, c, count), scale = in.scale.at(b, n, c, count), h = row_at(row, c);
        // Zero beyond the row's end, and with it all that is summed.
        const Values up = out.of_modulated.activation(b, n, c, count);
        Values normal, terms;
        out.shift.put(start, block_start, c, count, first, up);
#pragma unroll
        for (int i = 0; i < kStep; ++i) normal.v[i] = stats.normalise(h.v[i]);
#pragma unroll
        for (int i = 0; i < kStep; ++i) terms.v[i] = up.v[i] * normal.v[i] * weight.v[i];
        out.scale.put(start, block_start, c, count, first, terms);
#pragma unroll
        for (int i = 0; i < kStep; ++i) terms.v[i] = up.v[i] * normal.v[i] * (1.f + scale.v[i]);
        out.weight.put(start, block_start, c, count, first, terms);
#pragma unroll
        for (int i = 0; i < kStep; ++i) {
          projections[0] += up.v[i] * weight.v[i] * (1.f + scale.v[i]);
          projections[1] += terms.v[i] * weight.v[i];
        }
      });
      sum_everywhere(projections);
      means = {in.centred ? projections[0] / in.channels : 0.f, projections[1] / in.channels};
    } else {
      for_each_step(in.channels, [&](int64_t c, int count) {
        const Values zeros{};
        out.shift.put(start, block_start, c, count, first, zeros);
        out.scale.put(start, block_start, c, count, first, zeros);
      });
    }
    for_each_step(in.channels, [&](int64_t c, int count) {
      Values grad{}, terms;
      if (out.of_hidden.present()) grad = out.of_hidden.activation(b, n, c, count);
      if (out.of_modulated.present()) {
        const Values weight = in.weight.at(b, n, c, count), scale = in.scale.at(b, n, c, count), h = row_at(row, c);
        const Values up = out.of_modulated.activation(b, n, c, count);
#pragma unroll
        for (int i = 0; i < kStep; ++i) {
          grad.v[i] += norm_input_gradient(up.v[i] * weight.v[i] * (1.f + scale.v[i]), stats.normalise(h.v[i]), stats, means);
        }
      }
      if (out.x != nullptr) store_values(out.x + start + c, count, grad);
      if (!in.branch.present()) return;
      const Values gate = in.gate.at(b, n, c, count), branch = in.branch.activation(b, n, c, count);
#pragma unroll
      for (int i = 0; i < kStep; ++i) terms.v[i] = grad.v[i] * gate.v[i];
      if (out.branch != nullptr) store_values(out.branch + start + c, count, terms);
#pragma unroll
      for (int i = 0; i < kStep; ++i) terms.v[i] = grad.v[i] * branch.v[i];
      out.gate.put(start, block_start, c, count, first, terms);
    });
  }
}

// A sum over blocks' partial sums: of each group of `rows` of them, or of all.
struct Total {
  const float* partial;
  void* out;
  ScalarType dtype;
  int64_t groups, rows;
};

constexpr int kTotals = 8;

struct Totals {
  Total each[kTotals];
  int count = 0;
  int64_t channels = 0;
};

__global__ void __launch_bounds__(kThreads) add_blocks_kernel(Totals totals) {
  const Total total = totals.each[blockIdx.z];
  const int64_t c = int64_t{blockIdx.x} * 32 + threadIdx.x % 32, group = blockIdx.y;
  // Of the block's 8 warps each adds every eighth row, then they are added in their order.
  __shared__ float of_warp[kThreads / 32][32];
  float sum = 0;
  const bool inside = c < totals.channels && group < total.groups;
  for (int64_t r = threadIdx.x / 32; inside && r < total.rows; r += kThreads / 32) {
    sum += total.partial[(group * total.rows + r) * totals.channels + c];
  }
  of_warp[threadIdx.x / 32][threadIdx.x % 32] = sum;
  __syncthreads();
  if (threadIdx.x >= 32 || !inside) return;
  for (int w = 1; w < kThreads / 32; ++w) sum += of_warp[w][threadIdx.x];
  const int64_t at = group * totals.channels + c;
  if (total.dtype == ScalarType::Float) static_cast<float*>(total.out)[at] = sum;
  if (total.dtype == ScalarType::BFloat16) static_cast<BFloat16*>(total.out)[at] = store<BFloat16>(sum);
  if (total.dtype == ScalarType::Half) static_cast<Half*>(total.out)[at] = store<Half>(sum);
}

}  // namespace
}  // namespace fastdiff::FASTDIFF_VARIANT
