"""From the host to where the samples are."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(value: Tensor, device: torch.device) -> Tensor:
    """`value`, on the CPU, on `device`. A GPU reads it from pinned memory: from other memory even a non-blocking copy has the host wait."""
    if device.type == "cuda":
        value = value.pin_memory()
    return value.to(device, non_blocking=True)
