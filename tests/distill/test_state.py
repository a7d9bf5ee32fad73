"""States of runs: what is copied and what is compared."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from fastdiff_kernels.distill import LogNormal
from fastdiff_kernels.distill._state import in_memory, plain


def test_a_copy_shares_no_tensor_and_keeps_the_versions_of_modules():
    network = nn.BatchNorm1d(2)
    state = {"network": network.state_dict(), "step": 3}
    copied = in_memory(state)
    with torch.no_grad():
        network.weight.fill_(7.0)
    assert copied["step"] == 3
    assert copied["network"]["weight"].tolist() == [1.0, 1.0]
    assert not copied["network"]["weight"].requires_grad
    assert copied["network"]._metadata == state["network"]._metadata
    assert state["network"]["weight"].tolist() == [7.0, 7.0]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        (True, True),
        ("lcss", "lcss"),
        (np.float64(0.5), 0.5),
        (np.int64(3), 3),
        ((0.0, 0.99), [0.0, 0.99]),
        (torch.bfloat16, "torch.bfloat16"),
        (LogNormal(0.0, 1.0), "LogNormal(mean=0.0, std=1.0)"),
        (partial(LogNormal, 0.0), "partial"),
    ],
)
def test_settings_are_compared_as_plain_values(value, expected):
    assert plain(value) == expected
    assert type(plain(value)) is type(expected)
