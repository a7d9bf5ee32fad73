"""Sample calls of attention, for the contract that every op is tested against."""

from __future__ import annotations

import torch


def _operands(dtype, device):
    generator = torch.Generator().manual_seed(13)
    return [torch.randn(2, rows, 2, 3, generator=generator, dtype=torch.float64).to(device, dtype) for rows in (4, 5, 5, 4, 5, 5)]


def _attention(dtype, device):
    q, k, v, *_ = _operands(dtype, device)
    return [
        (q, k, v, 0.6, None),
        (q, k, v, 0.6, torch.tensor([3, 7], device=device)),
    ]


def _attention_packed(dtype, device):
    _, k, v, _, t_k, _ = _operands(dtype, device)
    qkv = torch.stack([k, v, t_k], 2)
    return [
        (qkv, 0.6, None),
        (qkv, 0.6, torch.tensor([3, 7], device=device)),
    ]


def _attention_dual(dtype, device):
    q, k, v, t_q, t_k, t_v = _operands(dtype, device)
    return [
        (q, k, v, 0.6, None, t_q, t_k, t_v),
        (q, k, v, 0.6, torch.tensor([3, 7], device=device), None, t_k, t_v),
        (q, k, v, 0.6, None, t_q, None, None),
    ]


SAMPLES = {"attention": _attention, "attention_packed": _attention_packed, "attention_dual": _attention_dual}
