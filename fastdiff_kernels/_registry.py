"""The op table: for every op its schema, its definition, its kernels by backend, and what it owes to autograd and tracing.

Schemas are defined here, so that the package works with no compiled file; C++ and Triton only implement. Each differentiable op `f` owns a
second op `f_backward(grads, inputs, saved outputs, needs)`; `needs` says which gradients are wanted, and the others come back empty.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import _sdpa
from . import reference as definitions


@dataclass(frozen=True)
class Op:
    """One row of the table."""

    name: str
    family: str
    schema: str
    reference: Callable
    fake: Callable
    kernels: tuple[str, ...]
    """Backends that implement it beside the reference, in the order in which a CUDA tensor prefers them."""
    differentiable: tuple[str, ...] = ()
    """Arguments with a gradient."""
    traced: tuple[str, ...] = ()
    """Arguments whose gradient the kernels do not compute: asking for it runs the definition."""
    stopped: tuple[str, ...] = ()
    """Arguments behind a stop-gradient: they may require grad and get none. Any other tensor that requires grad is refused."""
    passes_through: tuple[str, ...] = ()
    """Arguments whose gradient is that of the first output, unchanged: no kernel writes it."""
    saved: tuple[int, ...] = ()
    """Outputs that f_backward takes after the inputs, so that it need not compute them again."""
    auxiliary: tuple[int, ...] = ()
    """Outputs that are there for f_backward alone: they have no derivative."""
    optional_grads: bool = False
    """Whether f_backward takes None for the gradient of an output that nobody used, instead of zeros."""
    recorded: bool = False
    """Whether a third op `f_recorded(inputs, needs) -> (output, gradients)` runs where gradients will be asked for: it also writes what the
    gradients are for an upstream gradient of ones, and all that is left for backward is to scale them."""
    dual: str | None = None
    """The op that computes outputs and tangents together in forward mode: f's arguments, then a tangent or None for each differentiable
    one -> f's outputs, then a tangent for each. Otherwise forward mode runs the definition."""
    composed: Callable | None = None
    """The same by another op, which forward mode runs instead of the definition."""
    keeps_channels_last: bool = False
    """Whether outputs and gradients have the layout of their argument; otherwise they are contiguous."""
    flops: Callable[..., int] | None = None
    """Floating-point operations of one call."""
    size: Callable[..., tuple[int, int]] | None = None
    """Rows and width of one call, by which `choices.csv` chooses a backend."""
    refuses: Callable[..., str | None] | None = None
    """(backend, *arguments) -> why that backend does not run this call; None where it does."""
    refuses_gradients: Callable[..., str | None] | None = None
    """(backend, *gradients of the primary outputs) -> the same for f_backward, which refuses the calls that f refuses besides."""
    backward_of: str | None = None
    recorded_of: str | None = None

    @property
    def companion_of(self) -> str | None:
        """Name of the op whose derivatives this one is there for."""
        return self.backward_of or self.recorded_of

    @property
    def arguments(self) -> tuple[str, ...]:
        """Names of the arguments, in order."""
        return tuple(a.name for a in overload(self).default._schema.arguments)

    @property
    def outputs(self) -> int:
        """How many tensors it returns."""
        return self.schema.rpartition(" -> ")[2].count("Tensor")

    @property
    def primary(self) -> tuple[int, ...]:
        """The outputs that have a derivative."""
        return tuple(i for i in range(self.outputs) if i not in self.auxiliary)

    def bytes(self, *args: Any) -> int:
        """Bytes moved by one read of every tensor argument and one write of every output."""
        outputs = self.fake(*args)
        tensors = [*args, *(outputs if isinstance(outputs, tuple) else (outputs,))]
        return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


def overload(op: Op) -> torch._ops.OpOverloadPacket:
    """torch.ops.fastdiff.<name>."""
    return getattr(torch.ops.fastdiff, op.name)


def _like_first(*args: Any) -> Tensor:
    first = next(a for a in args if isinstance(a, Tensor))
    return first.new_empty(first.shape)


def _like_two(x: Tensor, y: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), y.new_empty(y.shape)


def _like_three(x: Tensor, y: Tensor, z: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), y.new_empty(y.shape), z.new_empty(z.shape)


def _like_first_twice(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _batch(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape[:1], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def _sample_and_batch(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), _batch(x)


def _loss_and_two_doubles(x: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return _batch(x), *(x.new_empty(x.shape[:1], dtype=torch.float64) for _ in range(2))


def channels_last_aware_empty(x: Tensor) -> Tensor:
    """Empty, of x's shape; channels_last where x is, otherwise contiguous."""
    for dims, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if x.dim() == dims and not x.is_contiguous() and x.is_contiguous(memory_format=layout):
            return torch.empty_like(x, memory_format=layout)
    return x.new_empty(x.shape)


def _normalised_and_statistics(x: Tensor, num_groups: int, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    mean, inverse_deviation = (x.new_empty((x.shape[0], num_groups), dtype=dtype) for _ in range(2))
    return channels_last_aware_empty(x), mean, inverse_deviation


def _per_element(count: int, argument: int = 0) -> Callable[..., int]:
    return lambda *args: count * args[argument].numel()


def _attended(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, rows, heads = q.shape[:3]
    return q.new_empty(q.shape), q.new_empty((batch, heads, rows), dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)


def _attention_refuses(name: str, *args: Any) -> str | None:
    if name == "sdpa":
        return _sdpa.refusal(*args)
    if name == "triton" and args[0].dtype == torch.float64:
        return "its Triton kernels are for float32, bfloat16 and float16"
    if name == "triton" and max(3 * _padded_elements(x) for x in args[:2]) >= 2**31:
        return "its Triton kernels reach 2^31 elements of a sample, of a whole projection"
    return None


def _padded_elements(x: Tensor) -> int:
    return x.shape[1] * x.shape[2] * (x.shape[3] + 7)


def _attention_refuses_gradients(name: str, *grads: Tensor | None) -> str | None:
    return _sdpa.refusal_of_gradients(*grads) if name == "sdpa" else None


def _attention_dual_refuses(name: str, q: Tensor, *args: Any) -> str | None:
    if name == "triton" and q.dtype == torch.float32 and q.shape[3] > 128:
        return "its Triton kernel has room for float32 heads of a width up to 128"
    return _attention_refuses(name, q, *args)


def _packed_attention(call: Callable) -> Callable:
    """call, of q, k and v, as a function of the projection that they are the parts of."""
    return lambda qkv, *args: call(*qkv.unbind(2), *args)


def _attention_flops(q: Tensor, k: Tensor, *_: Any) -> int:
    batch, rows, heads, width = q.shape
    return 4 * batch * heads * rows * k.shape[1] * width


def _solver_step(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    state, keep = args[9], args[-2:]
    kept = tuple(x.new_empty(x.shape) if wanted else x.new_empty(0) for wanted in keep)
    return x.new_empty(x.shape), *kept, x.new_empty(0 if state is None else state.shape, dtype=torch.float64)


def _rows_and_channels(x: Tensor, *_: Any) -> tuple[int, int]:
    return x.shape[0] * x.shape[1], x.shape[2]


def _tokens_and_heads(q: Tensor, *_: Any) -> tuple[int, int]:
    return q.shape[0] * q.shape[1], q.shape[2] * q.shape[3]


def _positions_and_channels(x: Tensor, *_: Any) -> tuple[int, int]:
    return x.shape[0] * math.prod(x.shape[2:]), x.shape[1]


def _modulate_refuses(name: str, x: Tensor, *_: Any) -> str | None:
    if name == "cuda" and x.dtype == torch.float64:
        return "the CUDA kernels take float32, bfloat16 and float16"
    if name == "triton" and x.dtype == torch.float64 and x.shape[2] > 3072:
        return f"its Triton kernels have room for at most 3072 channels in float64; there are {x.shape[2]}"
    if name == "cuda" and x.shape[2] > 12032:
        return f"the CUDA kernels take at most 12032 channels; there are {x.shape[2]}"
    if name == "cuda" and x.shape[0] > 65535:
        return f"the CUDA kernels take at most 65535 samples; there are {x.shape[0]}"
    return None


def _rotary_refuses(name: str, q: Tensor, *args: Any) -> str | None:
    norm = args[5]
    if name != "triton" or q.dtype != torch.float64 or norm is None or not norm.endswith("_heads"):
        return None
    size = math.prod(1 << (n - 1).bit_length() for n in q.shape[2:])
    if size <= 4096:
        return None
    return f"its Triton kernels have room for at most 4096 channels, powers of two by heads, of a token in float64; there are {size}"


_R = definitions
_ALL = ("cpu", "cuda", "triton")

_TABLE = (
    Op(
        "layer_norm_modulate", "modulate", "(Tensor x, Tensor shift, Tensor scale, Tensor? table, float eps) -> Tensor",
        _R.modulate.layer_norm_modulate, _like_first, ("cpu", "triton", "cuda"),
        differentiable=("x", "shift", "scale", "table"), flops=_per_element(8), size=_rows_and_channels, refuses=_modulate_refuses,
    ),
    Op(
        "rms_norm_modulate", "modulate", "(Tensor x, Tensor? weight, Tensor? shift, Tensor? scale, Tensor? table, float eps) -> Tensor",
        _R.modulate.rms_norm_modulate, _like_first, ("cpu", "triton", "cuda"),
        differentiable=("x", "weight", "shift", "scale", "table"), flops=_per_element(7),
        size=_rows_and_channels, refuses=_modulate_refuses,
    ),
    Op(
        "gate_residual", "modulate", "(Tensor residual, Tensor branch, Tensor gate, Tensor? table) -> Tensor",
        _R.modulate.gate_residual, _like_first, ("cpu", "triton", "cuda"),
        differentiable=("residual", "branch", "gate", "table"), passes_through=("residual",), flops=_per_element(2),
        size=_rows_and_channels, refuses=_modulate_refuses,
    ),
    Op(
        "gate_residual_norm_modulate", "modulate",
        "(Tensor residual, Tensor branch, Tensor? gate, Tensor shift, Tensor scale, Tensor? table, str norm, float eps)"
        " -> (Tensor, Tensor)",
        _R.modulate.gate_residual_norm_modulate, _like_first_twice, ("cpu", "triton", "cuda"),
        differentiable=("residual", "branch", "gate", "shift", "scale", "table"), optional_grads=True, flops=_per_element(10),
        size=_rows_and_channels, refuses=_modulate_refuses,
    ),
    Op(
        "qk_norm_rope", "rotary",
        "(Tensor q, Tensor k, Tensor? q_weight, Tensor? k_weight, Tensor? cos, Tensor? sin, str? norm, str rope, float eps)"
        " -> (Tensor, Tensor)",
        _R.rotary.qk_norm_rope, _like_two, ("cpu", "triton"),
        differentiable=("q", "k", "q_weight", "k_weight", "cos", "sin"), traced=("cos", "sin"),
        flops=lambda q, k, *_: 10 * (q.numel() + k.numel()), size=_tokens_and_heads, refuses=_rotary_refuses,
    ),
    Op(
        "qkv_pixel_norm", "rotary", "(Tensor q, Tensor k, Tensor v, float eps) -> (Tensor, Tensor, Tensor)",
        _R.rotary.qkv_pixel_norm, _like_three, ("cpu", "triton"),
        differentiable=("q", "k", "v"), flops=lambda q, k, v, _: 4 * (q.numel() + k.numel() + v.numel()),
        size=_tokens_and_heads,
    ),
    Op(
        "pixel_norm", "rotary", "(Tensor x, float eps) -> Tensor", _R.rotary.pixel_norm, _like_first, ("cpu", "triton"),
        differentiable=("x",), flops=_per_element(4), size=_tokens_and_heads,
    ),
    Op(
        "attention", "attention", "(Tensor q, Tensor k, Tensor v, float scale, Tensor? key_lengths) -> (Tensor, Tensor)",
        _R.attention.attention, _attended, ("cpu", "triton", "sdpa"),
        differentiable=("q", "k", "v"), saved=(0, 1), optional_grads=True, dual="attention_dual",
        flops=_attention_flops, size=lambda q, *_: (q.shape[1], q.shape[3]),
        refuses=_attention_refuses, refuses_gradients=_attention_refuses_gradients,
    ),
    Op(
        "attention_packed", "attention", "(Tensor qkv, float scale, Tensor? key_lengths) -> (Tensor, Tensor)",
        _R.attention.attention_packed, _packed_attention(_attended), ("cpu", "triton", "sdpa"),
        differentiable=("qkv",), saved=(0, 1), optional_grads=True,
        composed=_packed_attention(lambda *args: torch.ops.fastdiff.attention.default(*args)),
        flops=_packed_attention(_attention_flops), size=lambda qkv, *_: (qkv.shape[1], qkv.shape[4]),
        refuses=lambda name, qkv, *args: _attention_refuses(name, *qkv.unbind(2), *args), refuses_gradients=_attention_refuses_gradients,
    ),
    Op(
        "attention_dual", "attention",
        "(Tensor q, Tensor k, Tensor v, float scale, Tensor? key_lengths, Tensor? t_q, Tensor? t_k, Tensor? t_v)"
        " -> (Tensor, Tensor, Tensor, Tensor)",
        _R.attention.attention_dual, lambda *args: (*_attended(*args), *_attended(*args)), ("cpu", "triton"),
        differentiable=("q", "k", "v", "t_q", "t_k", "t_v"), traced=("q", "k", "v", "t_q", "t_k", "t_v"),
        flops=lambda *args: 3 * _attention_flops(*args), size=lambda q, *_: (q.shape[1], q.shape[3]), refuses=_attention_dual_refuses,
    ),
    Op(
        "group_norm_silu", "group_norm",
        "(Tensor x, int num_groups, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, float eps, str? activation)"
        " -> (Tensor, Tensor, Tensor)",
        _R.group_norm.group_norm_silu, _normalised_and_statistics, ("cpu", "triton"),
        differentiable=("x", "weight", "bias", "scale", "shift"), saved=(1, 2), auxiliary=(1, 2), keeps_channels_last=True,
        flops=_per_element(14), size=_positions_and_channels,
    ),
    Op(
        "lcss_noise", "score_matching", "(Tensor x, Tensor seed, int offset) -> Tensor",
        _R.score_matching.lcss_noise, _like_first, _ALL, stopped=("x",), flops=_per_element(40),
    ),
    Op(
        "lcss_perturb", "score_matching", "(Tensor x, Tensor sigma, Tensor seed, int offset) -> Tensor",
        _R.score_matching.lcss_perturb, _like_first, _ALL,
        differentiable=("x",), passes_through=("x",), flops=_per_element(42),
    ),
    Op(
        "lcss_loss", "score_matching",
        "(Tensor score, Tensor noise, Tensor? mirrored, Tensor sigma, Tensor gamma, Tensor weight) -> Tensor",
        _R.score_matching.lcss_loss_stored, _batch, _ALL,
        differentiable=("score", "noise", "mirrored"), recorded=True, flops=_per_element(4),
    ),
    Op(
        "lcss_loss_seeded", "score_matching",
        "(Tensor score, Tensor seed, Tensor? mirrored, Tensor sigma, Tensor gamma, Tensor weight, int offset) -> Tensor",
        _R.score_matching.lcss_loss_seeded, _batch, _ALL,
        differentiable=("score", "mirrored"), recorded=True, flops=_per_element(44),
    ),
    Op(
        "denoising_loss", "score_matching", "(Tensor denoised, Tensor clean, Tensor weight) -> Tensor",
        _R.score_matching.denoising_loss, _batch, _ALL,
        differentiable=("denoised", "clean"), recorded=True, flops=_per_element(3),
    ),
    Op(
        "sim_loss", "distillation",
        "(Tensor fake, Tensor teacher, Tensor sample, Tensor? noisy, Tensor? c_skip, Tensor? c_out, Tensor weight, Tensor c, str distance)"
        " -> (Tensor, Tensor, Tensor)",
        _R.distillation.sim_loss, _loss_and_two_doubles, ("cpu", "triton"),
        differentiable=("fake", "teacher", "sample", "noisy"), saved=(1, 2), auxiliary=(1, 2), flops=_per_element(6),
    ),
    Op(
        "moment_matching_loss", "distillation", "(Tensor sample, Tensor auxiliary, Tensor teacher, Tensor weight) -> Tensor",
        _R.distillation.moment_matching_loss, _batch, ("cpu", "triton"),
        differentiable=("sample",), stopped=("auxiliary", "teacher"), recorded=True, flops=_per_element(3),
    ),
    Op(
        "moment_matching_auxiliary_loss", "distillation", "(Tensor sample, Tensor auxiliary, Tensor teacher, Tensor weight) -> Tensor",
        _R.distillation.moment_matching_auxiliary_loss, _batch, ("cpu", "triton"),
        differentiable=("auxiliary",), stopped=("sample", "teacher"), recorded=True, flops=_per_element(6),
    ),
    Op(
        "posterior_sample", "sampling",
        "(Tensor denoised, Tensor noisy, Tensor sigma_s, Tensor sigma_t, Tensor seed, int offset) -> Tensor",
        _R.sampling.posterior_sample, _like_first, ("cpu", "triton"), differentiable=("denoised", "noisy"), flops=_per_element(45),
    ),
    Op(
        "guided_step", "sampling",
        "(Tensor x, Tensor denoised, Tensor sigma, Tensor sigma_next, Tensor? uncond, Tensor guidance) -> (Tensor, Tensor)",
        _R.sampling.guided_step, _sample_and_batch, ("cpu", "triton"),
        differentiable=("x", "denoised", "uncond"), optional_grads=True, flops=_per_element(7),
    ),
    Op(
        "third_order_skip", "skipping", "(Tensor d0, Tensor d1, Tensor d2, Tensor threshold) -> Tensor",
        _R.skipping.third_order_skip, lambda d0, *_: d0.new_empty(d0.shape, dtype=torch.bool), _ALL, flops=_per_element(5),
    ),
    Op(
        "third_order_difference", "skipping", "(Tensor x0, Tensor x1, Tensor x2, Tensor x3) -> (Tensor, Tensor)",
        _R.skipping.third_order_difference, lambda x0, *_: (_batch(x0), _batch(x0)), _ALL, flops=_per_element(9),
    ),
    Op(
        "solver_step", "skipping",
        "(Tensor x, Tensor? denoised, Tensor? uncond, Tensor? rows, Tensor? newest, Tensor? older, Tensor? previous, Tensor? point,"
        " Tensor? before1, Tensor? before0, Tensor? state, float sigma, float sigma_next, float guidance, float at, float reuse_at,"
        " float previous_weight, float scale_next, float scale, float scale1, float scale0, str mode, float threshold, int max_skip,"
        " bool keep_noise, bool keep_denoised) -> (Tensor, Tensor, Tensor, Tensor)",
        _R.skipping.solver_step, _solver_step, _ALL, flops=_per_element(12),
        refuses=lambda backend, x, *_: "its scalars are float32" if backend == "triton" and x.dtype == torch.float64 else None,
    ),
    Op(
        "incremental_cost", "schedule",
        "(Tensor x, Tensor raw_low, Tensor raw_high, Tensor sigma_low, Tensor sigma_high, float sigma_data) -> Tensor",
        _R.schedule.incremental_cost, _batch, _ALL, flops=_per_element(7),
    ),
    Op(
        "integrate_schedule", "schedule", "(Tensor sigmas, Tensor costs, int num_steps, str interpolation) -> Tensor",
        _R.schedule.integrate_schedule, lambda sigmas, costs, num_steps, _: sigmas.new_empty((*sigmas.shape[:-1], num_steps + 1)), _ALL,
        flops=lambda sigmas, *_: int(sigmas.numel() * (20 + math.log2(max(sigmas.shape[-1], 2)))),
    ),
)  # fmt: skip

OPS: dict[str, Op] = {op.name: op for op in _TABLE}
