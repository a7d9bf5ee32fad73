"""What other libraries have for the parts of our ops, on a GPU: columns by name where a library can be imported, absent by name where not.

Each entry calls the library as its documentation does. What surrounds it in a workload (modulation, SiLU) is eager PyTorch, as a user of
that library would have it.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel


@dataclass(frozen=True)
class Rival:
    """One function of another library; call(module, *args) is what `kind` of it computes."""

    name: str
    module: str
    kind: str
    call: Callable[..., Tensor]
    differentiable: bool = True


@functools.cache
def _ones(width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.ones(width, dtype=dtype, device=device)


@functools.cache
def _zeros(width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros(width, dtype=dtype, device=device)


def _like(make: Callable[..., Tensor], x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return make(x.shape[-1], dtype or x.dtype, x.device)


def _liger_layer_norm(liger: Any, x: Tensor, eps: float) -> Tensor:
    return liger.liger_layer_norm(x, _like(_ones, x), _like(_zeros, x), eps)


def _liger_rms_norm(liger: Any, x: Tensor, eps: float, weight: Tensor | None = None) -> Tensor:
    # In place its backward would overwrite the gradient that it is given, which others read too.
    return liger.liger_rms_norm(x, _like(_ones, x) if weight is None else weight, eps, in_place=False)


def _apex_rms_norm(apex: Any, x: Tensor, eps: float, weight: Tensor | None = None) -> Tensor:
    if weight is None:
        return apex.fused_rms_norm(x, x.shape[-1:], eps)
    return apex.fused_rms_norm_affine(x, weight, x.shape[-1:], eps)


def _flashinfer_rms_norm(flashinfer: Any, x: Tensor, eps: float, weight: Tensor | None = None) -> Tensor:
    return flashinfer.rmsnorm(x.reshape(-1, x.shape[-1]), _like(_ones, x) if weight is None else weight, eps).view(x.shape)


def _liger_group_norm(liger: Any, x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return liger.liger_group_norm(x.contiguous(), weight, bias, x.shape[1], groups, eps)


def _apex_group_norm(apex: Any, x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    # Its own module takes two passes beyond 1024 positions, and PyTorch's kernel without a word for sizes that it does not know.
    run = apex.cuda_group_norm_nhwc_two_pass if x[0, 0].numel() > 1024 else apex.cuda_group_norm_nhwc_one_pass
    return run(x.contiguous(memory_format=torch.channels_last), groups, weight, bias, eps)


def _flashinfer_layer_norm(flashinfer: Any, x: Tensor, eps: float) -> Tensor:
    return flashinfer.layernorm(x.flatten(0, -2), _like(_ones, x, torch.float32), _like(_zeros, x, torch.float32), eps).view(x.shape)


def _flashinfer_attention(flashinfer: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if q.shape[0] > 1:
        raise RuntimeError(f"single_prefill_with_kv_cache takes one sample; got {q.shape[0]}")
    return flashinfer.single_prefill_with_kv_cache(q[0], k[0], v[0], causal=False).unsqueeze(0)


RIVALS = (
    Rival("liger", "liger_kernel.transformers.functional", "layer_norm", _liger_layer_norm),
    Rival("liger", "liger_kernel.transformers.functional", "rms_norm", _liger_rms_norm),
    Rival("liger", "liger_kernel.transformers.functional", "group_norm", _liger_group_norm),
    Rival("apex", "apex.normalization.fused_layer_norm", "layer_norm", lambda apex, x, eps: apex.fused_layer_norm(x, x.shape[-1:], eps)),
    Rival("apex", "apex.normalization.fused_layer_norm", "rms_norm", _apex_rms_norm),
    Rival("apex", "apex.contrib.group_norm.group_norm", "group_norm", _apex_group_norm),
    Rival("flashinfer", "flashinfer.norm", "layer_norm", _flashinfer_layer_norm, differentiable=False),
    Rival("flashinfer", "flashinfer.norm", "rms_norm", _flashinfer_rms_norm, differentiable=False),
    Rival("flashinfer", "flashinfer.prefill", "attention", _flashinfer_attention, differentiable=False),
    Rival("xformers", "xformers.ops", "attention", lambda xformers, q, k, v: xformers.memory_efficient_attention(q, k, v)),
    Rival("flash-attn", "flash_attn", "attention", lambda flash, q, k, v: flash.flash_attn_func(q, k, v)),
)  # fmt: skip


@functools.cache
def _module(name: str) -> ModuleType | str:
    """The module, or why it cannot be imported: a library built for another torch fails with an OSError or worse."""
    try:
        return importlib.import_module(name)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def absent() -> dict[str, str]:
    """The libraries that cannot be imported here, wholly or in part, and why."""
    return {rival.name: reason for rival in RIVALS if isinstance(reason := _module(rival.module), str)}


def of(kind: str, compose: Callable[[Callable[..., Tensor]], Callable], gpu: bool | None = None) -> dict[str, dict[str, Callable]]:
    """The fields `rivals` and `forward_rivals` of a workload: compose(part) for the part of this kind that each library has.

    Without a GPU there are none.
    """
    found: dict[str, dict[str, Callable]] = {"rivals": {}, "forward_rivals": {}}
    if torch.cuda.is_available() if gpu is None else gpu:
        for rival in RIVALS:
            if rival.kind == kind and not isinstance(module := _module(rival.module), str):
                into = found["rivals" if rival.differentiable else "forward_rivals"]
                into[rival.name] = compose(functools.partial(rival.call, module))
    return found


def attention(unpack: Callable[..., tuple[Tensor, Tensor, Tensor]], gpu: bool | None = None) -> dict[str, dict[str, Callable]]:
    """The same for attention between unpack(*args), q, k, v [B, N, H, D]; with PyTorch's own, and on a GPU each of its backends."""
    gpu = torch.cuda.is_available() if gpu is None else gpu
    found = of("attention", lambda part: lambda *args: part(*unpack(*args)), gpu)
    found["rivals"]["sdpa"] = lambda *args: sdpa(*unpack(*args))
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION) if gpu else ():
        name = f"sdpa-{backend.name.removesuffix('_ATTENTION').lower()}"
        found["rivals"][name] = functools.partial(_sdpa_by, backend, unpack)
    return found


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's attention, by the backend that it chooses, of q, k, v [B, N, H, D]."""
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


def _sdpa_by(backend: SDPBackend, unpack: Callable[..., tuple[Tensor, Tensor, Tensor]], *args: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return sdpa(*unpack(*args))
