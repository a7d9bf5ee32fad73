"""Measured launch configurations reach the kernels, and change no more than how these are launched."""

from __future__ import annotations

import time

import pytest
import torch
from torch.nn.functional import layer_norm, rms_norm

from benchmarks import tune
from benchmarks.workloads import Case, Workload
from fastdiff_kernels import backend, ops
from fastdiff_kernels.triton import _common, _group_norm_tiles, _tuned, group_norm
from fastdiff_kernels.triton._attention_sizes import Sizes, sizes
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


def modulated(residual, branch, gate, shift, scale):
    hidden = residual + gate.unsqueeze(1) * branch
    return hidden, layer_norm(hidden, hidden.shape[-1:], eps=1e-6) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def normed(q, k):
    return tuple(rms_norm(x, x.shape[-1:], eps=1e-6) for x in (q, k))


WORKLOADS = {
    "modulate": Workload(
        "gate_residual_norm_modulate", "none", (2, 5, 72), lambda: [*torch.randn(2, 2, 5, 72), *torch.randn(3, 2, 72)],
        modulated, ops.gate_residual_norm_modulate, gradients=tuple(range(5)), factor=8.0,
    ),
    "rotary": Workload(
        "qk_norm_rope", "none", (2, 5, 3, 8), lambda: list(torch.randn(2, 2, 5, 3, 8)),
        normed, lambda q, k: ops.qk_norm_rope(q, k, norm="rms", eps=1e-6), gradients=(0, 1), factor=8.0,
    ),
}  # fmt: skip
# The kernels that ask, and the fields of their answers that are searched.
ASKED = {
    "modulate": {"modulate forward": {"rows", "chunk", "warps"}, "modulate backward": {"rows", "chunk", "warps"}},
    "rotary": {"rotary forward, heads": {"warps"}, "rotary backward, heads": {"warps"}},
}


@pytest.mark.executes
@pytest.mark.parametrize("family", WORKLOADS)
def test_every_configuration_that_a_search_tries_computes_the_same(family, device, folder):
    """Two steps away from the launcher's own answer as well."""
    found = list(tune.targets([Case(WORKLOADS[family], torch.float32, "fwd+bwd")], set(), device))
    assert {target.question.kernel: set(dict(target.own)) for target in found} == ASKED[family]
    for target in found:
        trials = tune.Trials(target, device, lambda runs: dict.fromkeys(runs, 1.0))
        near = set(tune.neighbours(target.own))
        further = {launch for other in near for launch in tune.neighbours(other)}
        assert set(trials(sorted(near | further))) == near | further


@pytest.mark.parametrize(
    ("kernel", "tokens", "asked"), [("forward", 256, "forward"), ("forward", 4096, "forward, long"), ("dual", 256, "dual")]
)
def test_attention_asks_by_its_width_padding_included(kernel, tokens, asked, folder):
    q = torch.empty(1, tokens, 16, 72, dtype=torch.bfloat16, device="meta")
    own = sizes(kernel, q, 90)
    _tuned.path_of(90, folder).write_text(
        f'kernel,dtype,size,launch,speedup,evidence\n"attention {asked}",bfloat16,80,queries=128 warps=8,1.1,invented\n'
    )
    _tuned.forget()
    assert sizes(kernel, q, 90) == Sizes(128, own.keys, 8, own.stages)
    assert sizes(kernel, q.to(torch.float16), 90) == sizes(kernel, q, 100), "a row is for its dtype and GPU"


@pytest.mark.executes
def test_without_a_table_launchers_keep_their_own_answer(device, folder, warps):
    x, weight, bias = (t.detach() for t in case(device).inputs(torch.float32, device))
    with backend("triton"):
        ops.group_norm_silu(x, GROUPS, weight, bias)
    own = _group_norm_tiles.tiles_of(_group_norm_tiles.layout_of(x, GROUPS), x.element_size(), 1)
    assert warps == [own.warps]


def test_in_the_interpreter():
    run_interpreted(__file__)
