"""Attention by PyTorch's own libraries, where these are at their best: its registered signatures over ATen's entry points.

Forward is cuDNN's from Hopper on and FlashAttention's before; backward is FlashAttention's in its deterministic form, which begins from the
log-sum-exp of either. How many parts a library splits a sum into is its own affair: here a sample's last bits may depend on its batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

_aten = torch.ops.aten
_flash = _aten._scaled_dot_product_flash_attention.default
_flash_backward = _aten._scaled_dot_product_flash_attention_backward.default
_cudnn = _aten._scaled_dot_product_cudnn_attention.default


def refusal(q: Tensor, k: Tensor, v: Tensor, scale: float, key_lengths: Tensor | None) -> str | None:
    """Why the libraries do not run this call; None where they do."""
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"PyTorch's attention libraries take bfloat16 and float16; got {q.dtype}"
    if key_lengths is not None:
        return "PyTorch's attention libraries know no key_lengths"
    if scale <= 0:
        return f"PyTorch's attention libraries need a positive scale; got {scale}"
    if q.numel() == 0 or k.numel() == 0:
        return "there is nothing to attend to"
    if q.shape[3] % 8 or not all(_aligned(x) for x in (q, k, v)):
        return "PyTorch's attention libraries read rows of 8 adjacent elements, each beginning at a multiple of 16 bytes"
    return None


def refusal_of_gradients(grad: Tensor | None, grad_lse: Tensor | None) -> str | None:
    """Why the libraries do not run backward from these; None where they do."""
    if grad is None or grad_lse is not None:
        return "PyTorch's attention libraries have a gradient of the output alone, none of the log-sum-exp"
    return None


def _aligned(x: Tensor) -> bool:
    outer = (x.stride(i) for i in range(3) if x.shape[i] > 1)
    return x.stride(3) == 1 and x.storage_offset() % 8 == 0 and all(s % 8 == 0 for s in outer)


def _prefers_cudnn(device: torch.device, width: int) -> bool:
    if device.type != "cuda" or width > 128 or not torch.backends.cuda.cudnn_sdp_enabled():
        return False
    # Before 9.3 cuDNN's attention knew fewer shapes.
    return torch.cuda.get_device_capability(device)[0] >= 9 and (torch.backends.cudnn.version() or 0) >= 90300


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, key_lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]  # [B, H, N, D]
    if _prefers_cudnn(q.device, q.shape[3]):
        out, lse, *_ = _cudnn(*heads_first, None, True, 0.0, False, False, scale=scale)
    else:
        out, lse, *_ = _flash(*heads_first, 0.0, False, False, scale=scale)
    return out.transpose(1, 2).contiguous(), lse.reshape(q.shape[0], q.shape[2], q.shape[1])


def attention_backward(
    grad: Tensor, grad_lse: None, q: Tensor, k: Tensor, v: Tensor, scale: float, key_lengths: Tensor | None,
    output: Tensor, lse: Tensor, needs: Sequence[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    heads_first = [x.transpose(1, 2) for x in (grad if grad.stride(3) == 1 else grad.contiguous(), q, k, v, output)]
    # What a dropout would have drawn from.
    seed, offset = q.new_empty(2, dtype=torch.uint64), q.new_empty(0, dtype=torch.uint64)
    with _deterministic():
        found = _flash_backward(*heads_first, lse, None, None, q.shape[1], k.shape[1], 0.0, False, seed, offset, scale=scale)
    return tuple(g.transpose(1, 2).contiguous() if need else q.new_empty(0) for g, need in zip(found, needs, strict=True))


def attention_packed(qkv: Tensor, scale: float, key_lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    q, k, v = qkv.unbind(2)
    return attention(q, k, v, scale, key_lengths)


def attention_packed_backward(
    grad: Tensor, grad_lse: None, qkv: Tensor, scale: float, key_lengths: Tensor | None, output: Tensor, lse: Tensor,
    needs: Sequence[bool],
) -> Tensor:  # fmt: skip
    q, k, v = qkv.unbind(2)
    return torch.stack(attention_backward(grad, grad_lse, q, k, v, scale, key_lengths, output, lse, [True] * 3), 2)


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    """FlashAttention adds up gradients in any order unless PyTorch as a whole is told to be deterministic."""
    before, only_warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    if before and not only_warns:
        yield
        return
    memory: Any = torch.utils.deterministic
    fills, memory.fill_uninitialized_memory = memory.fill_uninitialized_memory, False
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=only_warns)
        memory.fill_uninitialized_memory = fills
