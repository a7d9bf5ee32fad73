"""Query and key normalisation with rotary embedding on GPU: q, k (and v) in one launch, each read once and written once.

A row is one head of one token. A program takes a tile of rows that lie next to each other in memory: for tensors whose channels are
innermost the heads of a token and then those of the next ("heads"), or all heads of one token where the norm is over them ("whole"); for
those whose tokens are innermost, as in EDM's projections, tokens of one head ("tokens"), which the tile transposes on their way out. A row
is held as two halves: the first and the second members of the pairs that are rotated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import absent, capability, compute_dtype, launch, widen
from ._sums import add_rows
from ._tuned import tuned


@dataclass(frozen=True)
class _Plan:
    """What a kernel is compiled for."""

    norm: str | None
    """ "rms", "layer", "pixel" or None, over a row or, where order is "whole", over a token."""
    eps: float
    heads: int
    width: int
    order: str
    neighbours: bool
    """Whether a pair is (2i, 2i + 1); otherwise it is (i, split + i)."""
    split: int
    """Members of the first half."""
    block: int
    """The power of two that a half is padded to."""
    rows: int
    """The power of two of rows in a tile."""
    wide: bool
    """Whether arithmetic is in float64."""


@dataclass(frozen=True)
class _Layout:
    """Which dimension has stride 1 (-1: none that could be used), and a power of two that divides all other strides."""

    inner: int
    unit: int


@triton.jit
def _locate(tile, tokens, PLAN: tl.constexpr):
    """Sample, tokens and heads of a tile's rows, and which rows there are: each a number, [1, 1] or [rows, 1]."""
    row = tl.arange(0, PLAN.rows)[:, None].to(tl.int64)
    if PLAN.order == "whole":
        b = tile // tokens
        n = tile % tokens + tl.zeros([1, 1], tl.int64)
        h = row
        inside = row < PLAN.heads
    elif PLAN.order == "heads":
        tiles = tl.cdiv(tokens * PLAN.heads, PLAN.rows)
        first = tile % tiles * PLAN.rows
        b = tile // tiles
        # The remainder is small, and its 32-bit division by a constant a multiplication.
        place = (first % PLAN.heads + row).to(tl.int32)
        n = first // PLAN.heads + place // PLAN.heads
        h = (place % PLAN.heads).to(tl.int64)
        inside = n < tokens
    else:
        tiles = tl.cdiv(tokens, PLAN.rows)
        b = tile // (tiles * PLAN.heads)
        n = tile % tiles * PLAN.rows + row
        h = tile // tiles % PLAN.heads
        inside = n < tokens
    return b, n, h, inside


@triton.jit
def _along(strides, dim: tl.constexpr, LAYOUT: tl.constexpr):
    """The stride of a dimension. All but the innermost come divided by the unit: their product with it is seen to be aligned."""
    return strides[dim] if LAYOUT.inner == dim else strides[dim] * LAYOUT.unit


@triton.jit
def _load_halves(rows, stride, inside, PLAN: tl.constexpr):
    """The halves of the rows that begin at `rows`, widened; zero outside."""
    if PLAN.neighbours:
        channel = tl.arange(0, 2 * PLAN.block)[None, :]
        x = widen(tl.load(rows + channel.to(tl.int64) * stride, mask=(channel < PLAN.width) & inside, other=0.0))
        first, second = tl.split(tl.reshape(x, [x.shape[0], PLAN.block, 2]))
    else:
        i = tl.arange(0, PLAN.block)[None, :]
        first = widen(tl.load(rows + i.to(tl.int64) * stride, mask=(i < PLAN.split) & inside, other=0.0))
        second = widen(tl.load(rows + (PLAN.split + i).to(tl.int64) * stride, mask=(PLAN.split + i < PLAN.width) & inside, other=0.0))
    return first, second


@triton.jit
def _store_halves(rows, first, second, inside, PLAN: tl.constexpr):
    dtype: tl.constexpr = rows.dtype.element_ty
    if PLAN.neighbours:
        channel = tl.arange(0, 2 * PLAN.block)[None, :]
        both = tl.reshape(tl.join(first.to(dtype), second.to(dtype)), [first.shape[0], 2 * PLAN.block])
        tl.store(rows + channel, both, mask=(channel < PLAN.width) & inside)
    else:
        i = tl.arange(0, PLAN.block)[None, :]
        tl.store(rows + i, first.to(dtype), mask=(i < PLAN.split) & inside)
        tl.store(rows + PLAN.split + i, second.to(dtype), mask=(PLAN.split + i < PLAN.width) & inside)


@triton.jit
def _load_rows(x, strides, b, n, h, inside, PLAN: tl.constexpr, LAYOUT: tl.constexpr):
    rows = x + b * _along(strides, 0, LAYOUT) + h * _along(strides, 2, LAYOUT) + n * _along(strides, 1, LAYOUT)
    return _load_halves(rows, _along(strides, 3, LAYOUT), inside, PLAN)


@triton.jit
def _load_weight(weight, h, inside, PLAN: tl.constexpr):
    if PLAN.order == "whole":
        first, second = _load_halves(weight + h * PLAN.width, 1, inside, PLAN)
    else:
        first, second = _load_halves(weight, 1, True, PLAN)
    return first, second


@triton.jit
def _load_angles(table, strides, b, n, tokens, PLAN: tl.constexpr, LAYOUT: tl.constexpr):
    """The row of cos or sin at each token."""
    i = tl.arange(0, PLAN.block)[None, :]
    at = table + b * _along(strides, 0, LAYOUT) + n * _along(strides, 1, LAYOUT) + i * _along(strides, 2, LAYOUT)
    return widen(tl.load(at, mask=(i < PLAN.split) & (n < tokens), other=0.0))


@triton.jit
def _mean(x, PLAN: tl.constexpr):
    """Means over what the norm is over: each row, or all of them."""
    means = tl.sum(x, 1, keep_dims=True) / PLAN.width
    return tl.sum(means, 0, keep_dims=True) / PLAN.heads if PLAN.order == "whole" else means


@triton.jit
def _measure(first, second, inside, PLAN: tl.constexpr):
    """The halves, centred where the norm centres them, their mean square, and the factor that normalises them."""
    if PLAN.norm == "layer":
        mean = _mean(first + second, PLAN)
        i = tl.arange(0, PLAN.block)[None, :]
        first = tl.where((i < PLAN.split) & inside, first - mean, 0.0)
        second = tl.where((PLAN.split + i < PLAN.width) & inside, second - mean, 0.0)
    mean_square = _mean(first * first + second * second, PLAN)
    factor = 1.0 / (tl.sqrt(mean_square) + PLAN.eps) if PLAN.norm == "pixel" else tl.rsqrt(mean_square + PLAN.eps)
    return first, second, mean_square, factor


@triton.jit
def _out_rows(out, b, n, h, tokens, PLAN: tl.constexpr):
    return out + ((b * tokens + n) * PLAN.heads + h) * PLAN.width


@triton.jit
def _forward_tile(
    x, weight, cos, sin, out, strides, cos_strides, sin_strides, tokens, tile,
    PLAN: tl.constexpr, LAYOUT: tl.constexpr, ANGLES: tl.constexpr,
):  # fmt: skip
    b, n, h, inside = _locate(tile, tokens, PLAN)
    first, second = _load_rows(x, strides, b, n, h, inside, PLAN, LAYOUT)
    if PLAN.norm is not None:
        first, second, _, factor = _measure(first, second, inside, PLAN)
        first *= factor
        second *= factor
    if weight is not None:
        first_weight, second_weight = _load_weight(weight, h, inside, PLAN)
        first *= first_weight
        second *= second_weight
    if cos is not None:
        cosine = _load_angles(cos, cos_strides, b, n, tokens, PLAN, ANGLES)
        sine = _load_angles(sin, sin_strides, b, n, tokens, PLAN, ANGLES)
        first, second = first * cosine - second * sine, first * sine + second * cosine
    _store_halves(_out_rows(out, b, n, h, tokens, PLAN), first, second, inside, PLAN)


@triton.jit
def _forward_kernel(
    q, k, v, q_weight, k_weight, cos, sin, q_out, k_out, v_out, q_strides, k_strides, v_strides, cos_strides, sin_strides,
    q_tokens, k_tokens, q_programs, k_programs,
    PLAN: tl.constexpr, LAYOUT: tl.constexpr, ANGLES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    if program < q_programs:
        _forward_tile(
            q, q_weight, cos, sin, q_out, q_strides, cos_strides, sin_strides, q_tokens, program, PLAN, LAYOUT, ANGLES
        )  # fmt: skip
    elif program < q_programs + k_programs:
        program -= q_programs
        _forward_tile(
            k, k_weight, cos, sin, k_out, k_strides, cos_strides, sin_strides, k_tokens, program, PLAN, LAYOUT, ANGLES
        )  # fmt: skip
    elif v is not None:
        program -= q_programs + k_programs
        _forward_tile(v, None, None, None, v_out, v_strides, None, None, k_tokens, program, PLAN, LAYOUT, ANGLES)


@triton.jit
def _normalise_backward(first_grad, second_grad, first, second, mean_square, factor, PLAN: tl.constexpr):
    """The gradient of x from that of x normalised."""
    along = factor * factor * _mean(first_grad * first + second_grad * second, PLAN)
    if PLAN.norm == "pixel":
        # At 0 the norm is differentiable, and this term vanishes.
        root = tl.sqrt(mean_square)
        along = tl.where(root > 0, along / tl.where(root > 0, root, 1.0), 0.0)
    else:
        along *= factor
    if PLAN.norm == "layer":
        mean = _mean(first_grad + second_grad, PLAN)
        first_grad -= mean
        second_grad -= mean
    return factor * first_grad - first * along, factor * second_grad - second * along


@triton.jit
def _store_sums(grad_weight, first, second, program, PLAN: tl.constexpr):
    """A program's share of a weight's gradient."""
    if PLAN.order == "whole":
        h = tl.arange(0, PLAN.rows)[:, None]
        _store_halves(grad_weight + (program * PLAN.heads + h) * PLAN.width, first, second, h < PLAN.heads, PLAN)
    else:
        first, second = tl.sum(first, 0, keep_dims=True), tl.sum(second, 0, keep_dims=True)
        _store_halves(grad_weight + program * PLAN.width, first, second, True, PLAN)


@triton.jit
def _backward_tiles(
    grad, x, weight, cos, sin, grad_x, grad_weight, grad_strides, strides, cos_strides, sin_strides, tokens, tiles, tiles_each, program,
    PLAN: tl.constexpr, LAYOUT: tl.constexpr, GRADS: tl.constexpr, ANGLES: tl.constexpr,
):  # fmt: skip
    accumulator: tl.constexpr = tl.float64 if PLAN.wide else tl.float32
    rows: tl.constexpr = PLAN.rows
    block: tl.constexpr = PLAN.block
    first_sums = tl.zeros([rows, block], accumulator)
    second_sums = tl.zeros([rows, block], accumulator)
    for tile in range(program * tiles_each, tl.minimum((program + 1) * tiles_each, tiles)):
        b, n, h, inside = _locate(tile, tokens, PLAN)
        first_grad, second_grad = _load_rows(grad, grad_strides, b, n, h, inside, PLAN, GRADS)
        if PLAN.norm is not None:
            first, second = _load_rows(x, strides, b, n, h, inside, PLAN, LAYOUT)
        if cos is not None:
            cosine = _load_angles(cos, cos_strides, b, n, tokens, PLAN, ANGLES)
            sine = _load_angles(sin, sin_strides, b, n, tokens, PLAN, ANGLES)
            first_grad, second_grad = first_grad * cosine + second_grad * sine, second_grad * cosine - first_grad * sine
        if PLAN.norm is not None:
            first, second, mean_square, factor = _measure(first, second, inside, PLAN)
            if grad_weight is not None:
                first_sums += first_grad * (first * factor)
                second_sums += second_grad * (second * factor)
            if weight is not None:
                first_weight, second_weight = _load_weight(weight, h, inside, PLAN)
                first_grad *= first_weight
                second_grad *= second_weight
            first_grad, second_grad = _normalise_backward(first_grad, second_grad, first, second, mean_square, factor, PLAN)
        if grad_x is not None:
            _store_halves(_out_rows(grad_x, b, n, h, tokens, PLAN), first_grad, second_grad, inside, PLAN)
    if grad_weight is not None:
        _store_sums(grad_weight, first_sums, second_sums, program, PLAN)


@triton.jit
def _backward_kernel(
    q_grad, k_grad, v_grad, q, k, v, q_weight, k_weight, cos, sin, grad_q, grad_k, grad_v, grad_q_weight, grad_k_weight,
    q_grad_strides, k_grad_strides, v_grad_strides, q_strides, k_strides, v_strides, cos_strides, sin_strides,
    q_tokens, k_tokens, q_tiles, k_tiles, tiles_each, q_programs, k_programs,
    PLAN: tl.constexpr, LAYOUT: tl.constexpr, GRADS: tl.constexpr, ANGLES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    if program < q_programs:
        _backward_tiles(
            q_grad, q, q_weight, cos, sin, grad_q, grad_q_weight, q_grad_strides, q_strides, cos_strides, sin_strides,
            q_tokens, q_tiles, tiles_each, program, PLAN, LAYOUT, GRADS, ANGLES,
        )  # fmt: skip
    elif program < q_programs + k_programs:
        program -= q_programs
        _backward_tiles(
            k_grad, k, k_weight, cos, sin, grad_k, grad_k_weight, k_grad_strides, k_strides, cos_strides, sin_strides,
            k_tokens, k_tiles, tiles_each, program, PLAN, LAYOUT, GRADS, ANGLES,
        )  # fmt: skip
    elif v is not None:
        program -= q_programs + k_programs
        _backward_tiles(
            v_grad, v, None, None, None, grad_v, None, v_grad_strides, v_strides, None, None,
            k_tokens, k_tiles, tiles_each, program, PLAN, LAYOUT, GRADS, ANGLES,
        )  # fmt: skip


# Elements of a tile: with 16 a thread, four warps, and several such programs on a multiprocessor.
_TILE = 2048
# Tokens that a transposing tile has at least, and with the elements it may have at most the double: enough to fill the lines that it reads.
# Fewer only where the registers would not hold the tile.
_TOKENS, _TRANSPOSED, _LARGEST = 32, 4096, 8192
# Programs that a backward launch is cut down to where they leave partial sums, and tiles that one then takes at most.
_PROGRAMS = 2048
_TILES = 64


def _plan(q: Tensor, k: Tensor, norm: str | None, rope: str | None, eps: float) -> _Plan:
    heads, width = q.shape[2:]
    tokens = max(q.shape[1], k.shape[1])
    block = max(1, triton.next_power_of_2(width) // 2)
    whole = norm is not None and norm.endswith("_heads")
    order = "whole" if whole else "tokens" if q.stride(1) < q.stride(3) else "heads"
    if order == "whole":
        rows = triton.next_power_of_2(heads)
    elif order == "heads":
        rows = min(max(1, _TILE // (2 * block)), triton.next_power_of_2(max(1, tokens * heads)))
    else:
        filling = max(_TOKENS, min(2 * _TOKENS, _TRANSPOSED // (2 * block)))
        rows = min(filling, max(1, _LARGEST // (2 * block)), triton.next_power_of_2(max(1, tokens)))
    return _Plan(
        norm=norm.removesuffix("_heads") if norm else None, eps=eps, heads=heads, width=width, order=order,
        neighbours=rope == "interleaved", split=width // 2 if rope else block, block=block, rows=rows, wide=q.dtype == torch.float64,
    )  # fmt: skip


class Warps(NamedTuple):
    """Of a program."""

    warps: int


def _most_registers(plan: _Plan, warps: int) -> dict[str, Any]:
    """A limit that 16 warps fit, or one program where it is large: ptxas left to itself aims lower, and spills a little for it."""
    large = plan.order == "whole" or plan.wide
    return {"maxnreg": min(255, 2048 // warps) if large else 128}


def _warps(kernel: str, q: Tensor, plan: _Plan) -> int:
    size = plan.rows * plan.block
    return tuned(f"rotary {kernel}, {plan.order}", capability(q), q.dtype, size, Warps(max(1, min(16, size // 256)))).warps


def _tiles(x: Tensor, plan: _Plan) -> int:
    batch, tokens, heads, _ = x.shape
    if plan.order == "whole":
        return batch * tokens
    if plan.order == "heads":
        return batch * triton.cdiv(tokens * heads, plan.rows)
    return batch * heads * triton.cdiv(tokens, plan.rows)


def _described(tensors: Sequence[Tensor | None], inner: Sequence[int]) -> tuple[_Layout, list[tuple[int, ...] | None]]:
    """The layout that tensors of equally many dimensions share, and their strides as kernels take them; inner: where stride 1 may be."""
    given = [t for t in tensors if t is not None]
    innermost = next((i for i in inner if all(t.stride(i) == 1 for t in given)), -1)
    outer = [t.stride(i) for t in given for i in range(t.dim()) if i != innermost and t.shape[i] > 1]
    # A product with the unit has 32 bits, unless the argument itself needs 64.
    unit = 1 if any(s >= 2**31 for s in outer) else math.gcd(16, *outer)
    strides = [None if t is None else tuple(t.stride(i) // (1 if i == innermost else unit) for i in range(t.dim())) for t in tensors]
    return _Layout(innermost, unit), strides


def _describe_rows(tensors: Sequence[Tensor | None]) -> tuple[_Layout, list[tuple[int, ...] | None]]:
    return _described(tensors, (3, 1))


def _describe_angles(cos: Tensor | None, sin: Tensor | None) -> tuple[_Layout, list[tuple[int, ...] | None]]:
    if cos is None or sin is None:
        return _Layout(-1, 1), [None, None]
    return _described([t if t.dim() == 3 else t.expand(2, *t.shape) for t in (cos, sin)], (2,))


def _channels_inside(plan: _Plan, *tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors, copied where a tile of whole tokens would read them by single elements."""
    if plan.order != "whole":
        return list(tensors)
    return [t if t is None or t.stride(3) in (0, 1) else t.contiguous() for t in tensors]


def _forward(
    q: Tensor, k: Tensor, v: Tensor | None, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor | None, sin: Tensor | None,
    norm: str | None, rope: str, eps: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    plan = _plan(q, k, norm, None if cos is None else rope, eps)
    outputs = tuple(None if x is None else x.new_empty(x.shape) for x in (q, k, v))
    inputs = _channels_inside(plan, q, k, v)
    layout, strides = _describe_rows(inputs)
    angles, angle_strides = _describe_angles(cos, sin)
    q_programs, k_programs = _tiles(q, plan), _tiles(k, plan)
    warps = _warps("forward", q, plan)
    launch(
        _forward_kernel, q_programs + k_programs * (1 if v is None else 2),
        *inputs, *_dense(q_weight, k_weight), cos, sin, *outputs, *strides, *angle_strides, q.shape[1], k.shape[1], q_programs, k_programs,
        PLAN=plan, LAYOUT=layout, ANGLES=angles, num_warps=warps, **_most_registers(plan, warps),
    )  # fmt: skip
    return tuple(out for out in outputs if out is not None)


def _dense(*weights: Tensor | None) -> list[Tensor | None]:
    return [None if w is None else w.contiguous() for w in weights]


def _backward(
    grads: Sequence[Tensor], q: Tensor, k: Tensor, v: Tensor | None, q_weight: Tensor | None, k_weight: Tensor | None,
    cos: Tensor | None, sin: Tensor | None, norm: str | None, rope: str, eps: float, needs: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """Gradients of q, k, v and the two weights; needs in that order."""
    plan = _plan(q, k, norm, None if cos is None else rope, eps)
    inputs = _channels_inside(plan, q, k, v)
    upstream = _channels_inside(plan, *grads, *[None] * (3 - len(grads)))
    layout, strides = _describe_rows(inputs)
    grad_layout, grad_strides = _describe_rows(upstream)
    angles, angle_strides = _describe_angles(cos, sin)
    sums = needs[3] or needs[4]
    q_tiles = _tiles(q, plan) if needs[0] or needs[3] else 0
    k_tiles = _tiles(k, plan) if needs[1] or needs[2] or needs[4] else 0
    tiles_each = max(1, min(_TILES, (q_tiles + k_tiles) // _PROGRAMS)) if sums else 1
    q_programs, k_programs = triton.cdiv(q_tiles, tiles_each), triton.cdiv(k_tiles, tiles_each)
    found = [x.new_empty(x.shape) if x is not None and need else None for x, need in zip((q, k, v), needs, strict=False)]
    partial = [
        None if weight is None or not need else weight.new_empty((programs, weight.numel()), dtype=compute_dtype(q))
        for weight, programs, need in ((q_weight, q_programs, needs[3]), (k_weight, k_programs, needs[4]))
    ]
    warps = _warps("backward", q, plan)
    launch(
        _backward_kernel, q_programs + k_programs * (1 if v is None else 2),
        *upstream, *inputs, *_dense(q_weight, k_weight), cos, sin, *found, *partial,
        *grad_strides, *strides, *angle_strides, q.shape[1], k.shape[1], q_tiles, k_tiles, tiles_each, q_programs, k_programs,
        PLAN=plan, LAYOUT=layout, GRADS=grad_layout, ANGLES=angles, num_warps=warps,
        **_most_registers(plan, warps),
    )  # fmt: skip
    totals = [None if p is None or w is None else w.new_empty(w.shape) for p, w in zip(partial, (q_weight, k_weight), strict=True)]
    for p, total in zip(partial, totals, strict=True):
        if p is not None and total is not None:
            add_rows([p], 1, [total])
    return [absent(q) if grad is None else grad for grad in (*found, *totals)]


def qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor | None, sin: Tensor | None,
    norm: str | None, rope: str, eps: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    return _forward(q, k, None, q_weight, k_weight, cos, sin, norm, rope, eps)


def qk_norm_rope_backward(
    grad_q: Tensor, grad_k: Tensor, q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor | None,
    sin: Tensor | None, norm: str | None, rope: str, eps: float, needs: Sequence[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    if needs[4] or needs[5]:
        raise ValueError("qk_norm_rope: the gradients of cos and sin come from the definition")
    wanted = [needs[0], needs[1], False, needs[2], needs[3]]
    of_q, of_k, _, of_q_weight, of_k_weight = _backward((grad_q, grad_k), q, k, None, q_weight, k_weight, cos, sin, norm, rope, eps, wanted)
    return of_q, of_k, of_q_weight, of_k_weight, absent(q), absent(q)


def pixel_norm(x: Tensor, eps: float) -> Tensor:
    # As queries without keys.
    return _forward(x, x[:, :0], None, None, None, None, None, "pixel", "half", eps)[0]


def pixel_norm_backward(grad: Tensor, x: Tensor, eps: float, needs: Sequence[bool]) -> Tensor:
    wanted = [needs[0], False, False, False, False]
    return _backward((grad, grad[:, :0]), x, x[:, :0], None, None, None, None, None, "pixel", "half", eps, wanted)[0]


def qkv_pixel_norm(q: Tensor, k: Tensor, v: Tensor, eps: float) -> tuple[Tensor, ...]:
    return _forward(q, k, v, None, None, None, None, "pixel", "half", eps)


def qkv_pixel_norm_backward(
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, q: Tensor, k: Tensor, v: Tensor, eps: float, needs: Sequence[bool]
) -> tuple[Tensor, ...]:  # fmt: skip
    grads = (grad_q, grad_k, grad_v)
    return tuple(_backward(grads, q, k, v, None, None, None, None, "pixel", "half", eps, [*needs, False, False])[:3])
