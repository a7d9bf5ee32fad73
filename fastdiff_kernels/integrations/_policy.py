"""Where an op is slower on a CPU than what the host runs there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

# How many elements x has where the op begins to win: (without gradients, with them). Its call takes 10 us longer than PyTorch's, and 50 to
# 70 us longer with its backward.
_FROM: dict[str, tuple[int, int]] = {
    "norm": (1 << 16, 1 << 18),
    "gate": (1 << 19, 1 << 18),
    "group_norm_silu": (1 << 15, 1 << 19),
    "group_norm": (1 << 18, 1 << 20),
}
_everywhere: ContextVar[bool] = ContextVar("fastdiff_everywhere", default=False)


def pays(op: str, x: Tensor) -> bool:
    """Whether the op is worth its call for x; always so on a GPU."""
    if x.device.type != "cpu" or _everywhere.get():
        return True
    return x.numel() >= _FROM[op][x.requires_grad and torch.is_grad_enabled()]


@contextmanager
def everywhere() -> Iterator[None]:
    """Within it every op is used at every size, so that replacements can be compared on small modules."""
    token = _everywhere.set(True)
    try:
        yield
    finally:
        _everywhere.reset(token)
