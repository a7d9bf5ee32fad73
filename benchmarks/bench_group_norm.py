"""Group normalisation, scale, shift and SiLU at the shapes of a small pixel U-Net and of Stable Diffusion's widest maps."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from benchmarks.harness import forward_backward
from fastdiff_kernels import ops

CASES = (((128, 64, 8, 8), 8), ((16, 256, 16, 16), 32), ((4, 320, 64, 64), 32))


def group_norm_silu(x, groups, weight, bias, scale, shift):
    return F.silu(F.group_norm(x, groups, weight, bias) * (1 + scale[:, :, None, None]) + shift[:, :, None, None])


def operands(shape: tuple[int, ...], channels_last: bool) -> list[torch.Tensor]:
    """x, weight and bias, and the two halves of one projection as scale and shift."""
    batch, channels = shape[:2]
    x = torch.randn(shape).contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    return [x, torch.randn(channels), torch.randn(channels), *torch.randn(batch, 2 * channels).chunk(2, dim=1)]


@pytest.mark.parametrize("mode", ["forward", "fwd+bwd"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(("shape", "groups"), CASES, ids=str)
def test_group_norm_silu(compare, shape, groups, channels_last, mode):
    args = operands(shape, channels_last)

    def eager(x, *parameters):
        return group_norm_silu(x, groups, *parameters)

    def ours(x, *parameters):
        return ops.group_norm_silu(x, groups, *parameters)

    fns = {"eager": eager, "compile": torch.compile(eager, dynamic=False), "ours": ours}
    exact = [a.double() for a in args]
    if mode == "forward":
        variants, truth = {name: lambda fn=fn: fn(*args) for name, fn in fns.items()}, (eager(*exact),)
    else:
        upstream = [torch.randn_like(args[0])]
        leaves, exact = ([a.requires_grad_() for a in tensors] for tensors in (args, exact))
        variants = {name: forward_backward(fn, leaves, upstream) for name, fn in fns.items()}
        truth = forward_backward(eager, exact, [u.double() for u in upstream])()
    layout = "channels_last" if channels_last else "contiguous"
    # Inductor sums the parameters' gradients over the positions less exactly than eager does.
    compare(f"group_norm_silu {shape} {layout}", mode, variants, truth, factor=8.0)
