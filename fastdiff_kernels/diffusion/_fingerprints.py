"""Checksums that tell whether an estimate goes on with the data and the network that it began with."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .guidance import leaves

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def of_tensor(value: Tensor, before: int = 0) -> int:
    """CRC-32 of shape, dtype and values, after `before`; copies the tensor to the CPU."""
    held = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return zlib.crc32(held.numpy().tobytes(), zlib.crc32(f"{list(value.shape)} {value.dtype}".encode(), before))


def of_batch(clean: Tensor, conditioning: Mapping[str, object]) -> str:
    """Of all samples and all conditioning, in whichever order its keys stand."""
    found = of_tensor(clean)
    for name, value in sorted(leaves(conditioning, "conditioning"), key=lambda leaf: leaf[0]):
        found = zlib.crc32(name.encode(), found)
        found = of_tensor(value, found) if isinstance(value, Tensor) else zlib.crc32(repr(value).encode(), found)
    return f"{found:08x}"


def of_weights(denoiser: object) -> str:
    """Of a module's parameters and persistent buffers, equal on every device and within any wrapper; of other objects nothing is known.

    Sums of bit patterns: exact in every order of summation, which sums of values are not, at the cost of reading the weights once.
    """
    found = 0
    if isinstance(denoiser, nn.Module):
        values = [value for value in denoiser.state_dict().values() if isinstance(value, Tensor)]
        for tensor in (part for value in values for part in _parts(value)):
            # Weights that are loaded for their call alone have no values to read now.
            total = None if tensor.is_meta else _bit_sum(tensor)
            found = zlib.crc32(f"{list(tensor.shape)} {tensor.dtype} {total}".encode(), found)
    return f"{found:08x}"


def _parts(value: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a quantised or otherwise wrapped one consists of."""
    if not is_traceable_wrapper_subclass(value):
        yield value
        return
    names, _ = value.__tensor_flatten__()
    for name in names:
        yield from _parts(getattr(value, name))


def _bit_sum(tensor: Tensor) -> int:
    real = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    return int(real.view(_INTEGERS[real.element_size()]).sum(dtype=torch.int64))
