"""The checks that public functions share. Each error names the argument, what came and what was expected."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.philox import MAX_SAMPLE_ELEMENTS

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensor(op: str, name: str, x: object, *, dims: int | None = None, min_dims: int = 1) -> Tensor:
    """x, a floating tensor of a supported dtype with as many dimensions as asked for."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor; got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{op}: {name} must be float32, bfloat16, float16 or float64; got {x.dtype}")
    if dims is not None and x.dim() != dims:
        raise ValueError(f"{op}: {name} must have {dims} dimensions; got shape {tuple(x.shape)}")
    if x.dim() < min_dims:
        raise ValueError(f"{op}: {name} must have at least {min_dims} dimension{'s' * (min_dims > 1)}; got shape {tuple(x.shape)}")
    return x


def check_like(op: str, name: str, x: object, like_name: str, like: Tensor) -> Tensor:
    """x, a tensor of like's shape, dtype and device."""
    x = check_tensor(op, name, x, min_dims=0)
    if x.shape != like.shape:
        raise ValueError(f"{op}: {name} must have the shape of {like_name}, {tuple(like.shape)}; got {tuple(x.shape)}")
    if x.dtype != like.dtype:
        raise TypeError(f"{op}: {name} must have the dtype of {like_name}, {like.dtype}; got {x.dtype}")
    check_device(op, name, x, like_name, like)
    return x


def check_device(op: str, name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    """Raises unless x lies where like does."""
    if x.device != like.device:
        raise ValueError(f"{op}: {name} must be on the device of {like_name}, {like.device}; got {x.device}")


def check_companion_dtype(op: str, name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    """Raises unless x has like's dtype or is float32 beside a 16-bit like."""
    if x.dtype != like.dtype and not (x.dtype == torch.float32 and like.dtype in (torch.bfloat16, torch.float16)):
        allowed = f"{like.dtype} (that of {like_name})" + (" or torch.float32" if like.dtype in (torch.bfloat16, torch.float16) else "")
        raise TypeError(f"{op}: {name} must be {allowed}; got {x.dtype}")


def check_choice(op: str, name: str, value: object, choices: tuple) -> None:
    """Raises unless value is one of choices."""
    if value not in choices:
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(repr, choices))}; got {value!r}")


def check_positive(op: str, name: str, value: float) -> float:
    """value as a float that is finite and greater than 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} must be a number; got {type(value).__name__}")
    if not 0 < value < float("inf"):
        raise ValueError(f"{op}: {name} must be finite and greater than 0; got {value}")
    return float(value)


def check_count(op: str, name: str, value: int, minimum: int) -> int:
    """value, an int of at least minimum."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{op}: {name} must be an int; got {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"{op}: {name} must be at least {minimum}; got {value}")
    return value


def per_sample(
    op: str,
    name: str,
    value: float | Tensor,
    like: Tensor,
    *,
    above: float | None = None,
    at_least: float | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """A constant as the tensor [1] or [B] that ops take, in `dtype` or else in like's compute dtype.

    Finite always; greater than `above` or at least `at_least` where those are given. Values inside tensors are checked on CPU alone,
    since reading them on a GPU would wait for it.
    """
    if dtype is None:
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    if isinstance(value, Tensor):
        constant = _constant_tensor(op, name, value, like)
        if constant.numel() and readable(constant):
            _check_range(op, name, float(constant.min()), above, at_least)
            _check_range(op, name, float(constant.max()), above, at_least)
        return constant.to(dtype)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} must be a float or a tensor; got {type(value).__name__}")
    _check_range(op, name, float(value), above, at_least)
    return torch.full((1,), float(value), dtype=dtype, device=like.device)


def readable(value: Tensor) -> bool:
    """Whether numbers can be read without waiting for a GPU: from tensors on the CPU that hold some, while nothing is traced."""
    return (
        value.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and type(value) in (Tensor, torch.nn.Parameter)
        and not torch._C._functorch.is_functorch_wrapped_tensor(value)
        and torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is None
    )


def _constant_tensor(op: str, name: str, value: Tensor, like: Tensor) -> Tensor:
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{op}: {name} is a constant and must not require grad; pass {name}.detach()")
    if value.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{op}: {name} must be float32 or float64; got {value.dtype}")
    if value.dim() > 1 or (value.dim() == 1 and value.shape[0] != like.shape[0]):
        raise ValueError(f"{op}: {name} must be a float, a 0-d tensor or of shape ({like.shape[0]},); got shape {tuple(value.shape)}")
    if value.dim() == 1 or value.device != like.device:
        check_device(op, name, value, "the samples", like)
    return value.reshape(1) if value.dim() == 0 else value


def _check_range(op: str, name: str, value: float, above: float | None, at_least: float | None) -> None:
    if above is not None and not above < value < float("inf"):
        raise ValueError(f"{op}: {name} must be finite and greater than {above:g}; got {value}")
    if at_least is not None and not at_least <= value < float("inf"):
        raise ValueError(f"{op}: {name} must be finite and at least {at_least:g}; got {value}")
    if not -float("inf") < value < float("inf"):
        raise ValueError(f"{op}: {name} must be finite; got {value}")


def check_seed(op: str, seed: int | Tensor, like: Tensor, name: str = "seed", otherwise: str = "") -> Tensor:
    """The seed as a 0-d int64 tensor: an int in the range of int64, or such a tensor on the CPU or like's device. `otherwise` begins the
    list of what the argument called `name` may be."""
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.dim() != 0:
            raise TypeError(f"{op}: {name} must be {otherwise}an int or a 0-d int64 tensor; got shape {tuple(seed.shape)}, {seed.dtype}")
        if seed.device.type != "cpu":
            check_device(op, name, seed, "the samples", like)
        return seed
    if isinstance(seed, bool) or not isinstance(seed, (int, torch.SymInt)):
        raise TypeError(f"{op}: {name} must be {otherwise}an int or a 0-d int64 tensor; got {type(seed).__name__}")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"{op}: {name} must fit in 64 bits; got {seed}")
    return torch.tensor(seed, dtype=torch.int64)


def check_noise_size(op: str, name: str, x: Tensor) -> None:
    """Raises where a sample has more elements than the counter of the noise can number."""
    if x.numel() > MAX_SAMPLE_ELEMENTS * max(x.shape[0], 1):
        raise ValueError(f"{op}: a sample of {name} must have at most 2^34 elements; got shape {tuple(x.shape)}")
