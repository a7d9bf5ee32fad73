"""Counting the calls of an op, which shows that a patch does something."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class _Counter(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func is torch.ops.fastdiff.attention.default
        return func(*args, **(kwargs or {}))


@contextmanager
def attends(times: int) -> Iterator[None]:
    """Asserts that this package's attention is called so often within."""
    with _Counter() as counter:
        yield
    assert counter.calls == times
