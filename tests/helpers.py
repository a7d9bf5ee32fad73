"""Comparisons that tests share. No tolerance here is tuned by hand: each comes from the dtype and from what eager PyTorch achieves."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def outputs_of(value: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """One or several outputs as a tuple."""
    return (value,) if isinstance(value, Tensor) else tuple(value)


def assert_within_eager(actual: Tensor, eager: Tensor, truth: Tensor, factor: float = 2.0) -> None:
    """actual's largest error against the float64 truth is at most factor times eager's, or one rounding of the largest value."""
    assert actual.shape == truth.shape, f"shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    if truth.numel() == 0:
        return
    error = (actual.double() - truth).abs().max().item()
    eager_error = (eager.double() - truth).abs().max().item()
    rounding = torch.finfo(actual.dtype).eps * truth.abs().max().item()
    assert error <= max(factor * eager_error, rounding), f"error {error:.3e}; eager {eager_error:.3e}, one rounding {rounding:.3e}"


def cast(args: Sequence, dtype: torch.dtype) -> list:
    """args with every floating tensor in dtype."""
    return [a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]


def assert_accurate(op: Callable, eager: Callable, args: Sequence, dtype: torch.dtype, factor: float = 2.0, gradients: bool = True) -> None:
    """The accuracy contract: op(*args in dtype) and its gradients are as near the float64 truth as eager's in the same dtype.

    `eager` is the composition a user would write, in the inputs' own dtype; in float64 it is the truth. Tensors among args that
    require grad are differentiated with random gradients at the outputs.
    """
    rounded = cast(args, dtype)
    wanted = [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.requires_grad] if gradients else []
    results = []
    for fn, inputs in ((op, rounded), (eager, rounded), (eager, cast(rounded, torch.float64))):
        leaves = [a.detach().requires_grad_(i in wanted) if isinstance(a, Tensor) else a for i, a in enumerate(inputs)]
        outputs = outputs_of(fn(*leaves))
        grads: tuple[Tensor, ...] = ()
        if wanted:
            generator = torch.Generator().manual_seed(1)
            upstream = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(dtype).to(o.dtype) for o in outputs]
            grads = torch.autograd.grad(outputs, [leaves[i] for i in wanted], upstream)
        results.append((*(o.detach() for o in outputs), *grads))
    for actual, plain, truth in zip(*results, strict=True):
        assert_within_eager(actual, plain, truth, factor)


def assert_bitwise(actual: Tensor | Sequence[Tensor], expected: Tensor | Sequence[Tensor]) -> None:
    """Equal in every bit of every output."""
    for a, e in zip(outputs_of(actual), outputs_of(expected), strict=True):
        assert a.dtype == e.dtype
        assert torch.equal(a, e), f"{(a != e).sum().item()} of {a.numel()} elements differ"


def assert_independent_of_batch(fn: Callable[..., Tensor | Sequence[Tensor]], *args: Tensor) -> None:
    """A sample's result, bit for bit, is the same whatever batch it came in. args have the batch in dimension 0; so have the outputs."""
    whole = outputs_of(fn(*args))
    for start, stop in ((0, 1), (1, args[0].shape[0])):
        assert_bitwise(fn(*[a[start:stop] for a in args]), [w[start:stop] for w in whole])


def assert_independent_of_threads(fn: Callable[[], Tensor | Sequence[Tensor]]) -> None:
    """The same bits with one and with three threads, and from two runs."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = outputs_of(fn())
        torch.set_num_threads(3)
        assert_bitwise(fn(), alone)
        assert_bitwise(fn(), alone)
    finally:
        torch.set_num_threads(threads)
