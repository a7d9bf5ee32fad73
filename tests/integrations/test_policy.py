"""Patched models stay with the host's arithmetic where an op is slower."""

from __future__ import annotations

import contextvars

import pytest
import torch

from benchmarks import hosts
from fastdiff_kernels.integrations import _policy, edm


def measured(op: str, x: torch.Tensor) -> bool:
    """What the policy says outside of the fixture that lifts it."""
    return contextvars.Context().run(_policy.pays, op, x)


@pytest.mark.parametrize("op", ["norm", "gate", "group_norm_silu", "group_norm"])
def test_small_tensors_are_left_to_the_host_and_large_ones_are_not(op: str) -> None:
    for gradients in (False, True):
        least = _policy._FROM[op][gradients]
        assert not measured(op, torch.empty(least - 1, requires_grad=gradients))
        assert measured(op, torch.empty(least, requires_grad=gradients))
    with torch.no_grad():
        least = _policy._FROM[op][False]
        assert measured(op, torch.empty(least, requires_grad=True))


def test_elsewhere_than_on_a_cpu_size_does_not_matter() -> None:
    assert measured("group_norm", torch.empty(4, device="meta"))


def test_replacements_are_compared_at_sizes_that_do_not_pay() -> None:
    reports = [contextvars.Context().run(lambda: edm.patch(hosts.edm())), edm.patch(hosts.edm())]
    assert reports[0].counts == reports[1].counts
