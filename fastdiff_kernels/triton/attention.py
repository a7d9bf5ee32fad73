"""Attention on GPU: the launchers. Products are taken on tensor cores for 16-bit inputs, in float32 for float32; sums in float32.

Kernels read rows that begin and end at multiples of 16 bytes; others are copied first.

float64 is left to the definition: it has no use in a network, and a kernel of its own would only serve tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from ._attention_backward import key_kernel, query_kernel
from ._attention_dual import dual_kernel
from ._attention_forward import forward_kernel
from ._attention_sizes import INTERPRETER, Sizes, separate, sizes
from ._attention_tiles import aligned, arithmetic, interpreting, padded_width, pieces, strides, unit
from ._common import absent, capability, launch


def _constants(q: Tensor, s: Sizes, even: bool) -> dict[str, Any]:
    """What every kernel is compiled for; `even` where its loop has whole blocks alone."""
    head, tail = pieces(q.shape[3])
    return {
        "HEAD": head,
        "TAIL": tail,
        "WIDTH": q.shape[3],
        "UNIT": unit(q),
        "EVEN": even,
        "BLOCK_M": s.queries,
        "BLOCK_N": s.keys,
        "STAGES": s.stages,
        "num_warps": s.warps,
        "num_stages": s.stages,
        # With a limit of its own the assembler would rather spill than have one program less on a multiprocessor.
        "maxnreg": 255,
        **arithmetic(q),
    }


def _whole_blocks(k: Tensor, key_lengths: Tensor | None, s: Sizes) -> bool:
    return key_lengths is None and k.shape[1] % s.keys == 0


def _gpu(q: Tensor) -> int:
    return INTERPRETER if interpreting() else capability(q)


def _per_query(q: Tensor) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)


def _programs(x: Tensor, rows: int) -> int:
    return x.shape[0] * x.shape[2] * triton.cdiv(x.shape[1], rows)


def _adjacent(key_lengths: Tensor | None) -> Tensor | None:
    return None if key_lengths is None else key_lengths.contiguous()


def _result(x: Tensor | None, like: Tensor) -> Tensor:
    """x without the columns that `like` has been padded by."""
    return absent(like) if x is None else x[..., : like.shape[3]].contiguous()


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, key_lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    given, key_lengths = q, _adjacent(key_lengths)
    q, k, v = map(aligned, (q, k, v))
    out, lse = q.new_empty(q.shape), _per_query(q)
    s = sizes("forward", q, _gpu(q))
    launch(
        forward_kernel, _programs(q, s.queries), q, k, v, key_lengths, out, lse, *map(strides, (q, k, v, out)),
        scale, q.shape[1], k.shape[1], q.shape[2], NEGATIVE=scale < 0, **_constants(q, s, _whole_blocks(k, key_lengths, s)),
    )  # fmt: skip
    return _result(out, given), lse


def attention_backward(
    grad: Tensor | None, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, scale: float, key_lengths: Tensor | None,
    output: Tensor, lse: Tensor, needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    width = padded_width(q)
    results = [x.new_empty((*x.shape[:3], width)) if need else None for x, need in zip((q, k, v), needs, strict=True)]
    _write_gradients(grad, grad_lse, q, k, v, scale, key_lengths, output, lse, results)
    grad_q, grad_k, grad_v = (_result(g, q) for g in results)
    return grad_q, grad_k, grad_v


def attention_packed(qkv: Tensor, scale: float, key_lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    q, k, v = qkv.unbind(2)
    return attention(q, k, v, scale, key_lengths)


def attention_packed_backward(
    grad: Tensor | None, grad_lse: Tensor | None, qkv: Tensor, scale: float, key_lengths: Tensor | None, output: Tensor, lse: Tensor,
    needs: Sequence[bool],
) -> Tensor:  # fmt: skip
    q, k, v = qkv.unbind(2)
    result = qkv.new_empty((*qkv.shape[:4], padded_width(q)))
    _write_gradients(grad, grad_lse, q, k, v, scale, key_lengths, output, lse, result.unbind(2))
    return result[..., : qkv.shape[4]].contiguous()


def _write_gradients(
    grad: Tensor | None, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, scale: float, key_lengths: Tensor | None,
    output: Tensor, lse: Tensor, results: Sequence[Tensor | None],
) -> None:  # fmt: skip
    """Into `results`, of the padded width: the gradients of q, k and v, or None where nobody wants them."""
    grad_q, grad_k, grad_v = results
    q, k, v, output = map(aligned, (q, k, v, output))
    grad = torch.zeros_like(output) if grad is None else aligned(grad)
    lse, delta, key_lengths = lse.contiguous(), _per_query(q), _adjacent(key_lengths)
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    s, numbers = sizes("queries", q, _gpu(q)), (scale, q.shape[1], k.shape[1], q.shape[2])
    written = grad_q if grad_q is not None else output
    launch(
        query_kernel, _programs(q, s.queries), grad, grad_lse, q, k, v, key_lengths, output, lse, delta, grad_q,
        *map(strides, (grad, q, k, v, output, written)), *numbers, **_constants(q, s, _whole_blocks(k, key_lengths, s)),
    )  # fmt: skip
    s = sizes("keys", q, _gpu(q))
    for to_k, to_v in ((grad_k, None), (None, grad_v)) if separate(q, _gpu(q)) else ((grad_k, grad_v),):
        like = to_v if to_k is None else to_k
        if like is None:
            continue
        launch(
            key_kernel, _programs(k, s.keys), grad, q, k, v, key_lengths, lse, delta, to_k, to_v,
            *map(strides, (grad, q, k, v, like)), *numbers, **_constants(q, s, q.shape[1] % s.queries == 0),
        )  # fmt: skip


def attention_dual(
    q: Tensor, k: Tensor, v: Tensor, scale: float, key_lengths: Tensor | None, t_q: Tensor | None, t_k: Tensor | None, t_v: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    given, key_lengths = q, _adjacent(key_lengths)
    q, k, v = map(aligned, (q, k, v))
    t_q, t_k, t_v = (None if t is None else aligned(t) for t in (t_q, t_k, t_v))
    out, lse, t_out, t_lse = q.new_empty(q.shape), _per_query(q), q.new_empty(q.shape), _per_query(q)
    tangents = (x if t is None else t for t, x in ((t_q, q), (t_k, k), (t_v, v)))
    s = sizes("dual", q, _gpu(q))
    launch(
        dual_kernel, _programs(q, s.queries), q, k, v, key_lengths, t_q, t_k, t_v, out, lse, t_out, t_lse,
        *map(strides, (q, k, v, *tangents, out)), scale, q.shape[1], k.shape[1], q.shape[2],
        NEGATIVE=scale < 0, **_constants(q, s, _whole_blocks(k, key_lengths, s)),
    )  # fmt: skip
    return _result(out, given), lse, _result(t_out, given), t_lse
