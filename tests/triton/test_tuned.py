"""Measured launch configurations reach the kernels, and change no more than how these are launched."""

from __future__ import annotations

import time

import pytest
import torch

from benchmarks import tune
from benchmarks.workloads import Case, Workload
from fastdiff_kernels import backend, ops
from fastdiff_kernels.triton import _common, _group_norm_tiles, _tuned, group_norm
from tests.triton.running import run_interpreted

GROUPS = 4


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(_tuned, "FOLDER", tmp_path)
    _tuned.forget()
    yield tmp_path
    _tuned.forget()


@pytest.fixture
def warps(monkeypatch):
    """How many warps every launch took, in order."""
    taken: list[int] = []

    def launch(kernel, programs, *args, num_warps=4, **options):
        taken.append(num_warps)
        _common.launch(kernel, programs, *args, num_warps=num_warps, **options)

    monkeypatch.setattr(group_norm, "launch", launch)
    return taken


def standard(x, weight, bias):
    return torch.nn.functional.silu(torch.nn.functional.group_norm(x, GROUPS, weight, bias))


def case(device: str) -> Case:
    w = Workload(
        "group_norm_silu", "none", (2, 8, 16, 16), lambda: [torch.randn(2, 8, 16, 16), torch.randn(8), torch.randn(8)],
        standard, lambda x, weight, bias: ops.group_norm_silu(x, GROUPS, weight, bias), gradients=(0, 1, 2), factor=8.0,
    )  # fmt: skip
    return Case(w, torch.float32, "fwd+bwd")


@pytest.mark.executes
def test_a_search_over_kernels_writes_what_launchers_then_take(device, folder, warps):
    """With invented times, of which the least are those of the most warps."""

    def timer(runs):
        return {name: 1 / _tuned.parse(name)["warps"] for name in runs}

    gpu = _common.capability(torch.empty(0, device=device))
    path = _tuned.path_of(gpu, folder)
    assert tune.tune([case(device)], path, gpu, device, time.monotonic() + 600, lambda target: tune.Trials(target, device, timer)) == 0
    rows = _tuned.read(path)
    assert [row["kernel"] for row in rows] == ["group norm forward, whole groups of planes", "group norm backward, whole groups of planes"]
    assert {row["launch"] for row in rows} == {"warps=16"}
    x, weight, bias = (t.detach() for t in case(device).inputs(torch.float32, device))
    warps.clear()
    with backend("triton"):
        torch.testing.assert_close(ops.group_norm_silu(x, GROUPS, weight, bias), standard(x, weight, bias))
    assert warps == [16]


@pytest.mark.executes
def test_without_a_table_launchers_keep_their_own_answer(device, folder, warps):
    x, weight, bias = (t.detach() for t in case(device).inputs(torch.float32, device))
    with backend("triton"):
        ops.group_norm_silu(x, GROUPS, weight, bias)
    own = _group_norm_tiles.tiles_of(_group_norm_tiles.layout_of(x, GROUPS), x.element_size(), 1)
    assert warps == [own.warps]


def test_in_the_interpreter():
    run_interpreted(__file__)
