"""Group normalisation (Wu and He, arXiv 1803.08494) with the scale, shift and SiLU that follow it in a U-Net's residual block."""

from __future__ import annotations

from torch import Tensor

from .._dispatch import bind
from ._checks import check_choice, check_companion_dtype, check_count, check_device, check_positive, check_tensor

_group_norm_silu = bind("group_norm_silu")


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    eps: float = 1e-5,
    activation: str | None = "silu",
) -> Tensor:
    """silu(GN(x) (1 + scale) + shift) with GN(x) = (x - mean) / sqrt(variance + eps) * weight + bias over each sample's groups.

    A group is C / num_groups consecutive channels at all positions; its variance is the biased one. This is the modulated
    normalisation of diffusion U-Nets (Dhariwal and Nichol, arXiv 2105.05233, "adaptive group normalization").

    Args:
        x: [B, C, ...], float32, bfloat16, float16 or float64; contiguous, or channels_last (4-D) or channels_last_3d (5-D). Any
            other layout is copied once to contiguous.
        num_groups: groups, dividing C.
        weight, bias: [C], x's dtype or float32, any stride; None means ones and zeros.
        scale, shift: [B, C], x's dtype or float32, any strides (chunks of one projection are read in place); None means zeros.
        eps: greater than 0.
        activation: "silu", or None for none.

    Returns:
        [B, C, ...], x's dtype; channels_last where x is, otherwise contiguous. Differentiable in x, weight, bias, scale and shift.

    Raises:
        TypeError, ValueError: naming the argument that is wrong.
    """
    op = "group_norm_silu"
    check_tensor(op, "x", x, min_dims=2)
    groups = check_count(op, "num_groups", num_groups, 1)
    batch, channels = x.shape[:2]
    if channels < 1 or channels % groups:
        raise ValueError(f"{op}: num_groups must divide the channels of x, {channels}; got {groups}")
    for name, parameter, shape in (
        ("weight", weight, (channels,)),
        ("bias", bias, (channels,)),
        ("scale", scale, (batch, channels)),
        ("shift", shift, (batch, channels)),
    ):
        if parameter is not None:
            _check_parameter(name, parameter, shape, x)
    check_choice(op, "activation", activation, ("silu", None))
    return _group_norm_silu(x, groups, weight, bias, scale, shift, check_positive(op, "eps", eps), activation)[0]


def _check_parameter(name: str, parameter: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    op = "group_norm_silu"
    check_tensor(op, name, parameter)
    if parameter.shape != shape:
        raise ValueError(f"{op}: {name} must have shape {tuple(shape)} for x of shape {tuple(x.shape)}; got {tuple(parameter.shape)}")
    check_companion_dtype(op, name, parameter, "x", x)
    check_device(op, name, parameter, "x", x)
