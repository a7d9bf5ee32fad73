"""What the benchmarks compare with, where it is more than a line."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import bench_attention, bench_distillation, bench_end_to_end, bench_estimators, bench_score_matching, bench_skipping, shapes
from benchmarks.harness import Session, WrongResult
from benchmarks.workloads import Case, cases
from fastdiff_kernels.diffusion import AdaptiveSkip


def test_eager_attention_in_parts_is_eager_attention(monkeypatch):
    monkeypatch.setattr(bench_attention, "LONG", 3)
    packed = torch.randn(2, 7, 3, 4, 8)
    torch.testing.assert_close(bench_attention.eager_in_parts(packed), bench_attention.eager(packed))
    w = bench_attention.attention_workload("long", (1, 4, 1, 8))
    assert w.eager is bench_attention.eager_in_parts
    assert not w.gradients, "its scores would have to be kept"


def test_cross_attention_is_compared_at_equal_operations():
    w = bench_attention.cross_workload("captions", (2, 6, 4, 8), 5)
    q, packed = w.inputs()
    torch.testing.assert_close(w.ours(q, packed), w.eager(q, packed))
    torch.testing.assert_close(w.rivals["sdpa"](q, packed), w.eager(q, packed))
    assert w.flops(q, packed) == 2 * 2 * (2 * 4 * 6 * 5 * 8), "two matrix products"


def test_cross_attention_to_padded_captions_is_held_to_their_words():
    w = bench_attention.padded_workload("captions", (2, 6, 4, 8), 5)
    session, case = Session("cpu", 0.01), Case(w, torch.float32, "fwd+bwd")
    session.measure(case, {"eager": w.eager, **w.rivals, "ours": w.ours})
    assert [row.provider for row in session.rows] == ["eager", "sdpa", "ours"]
    with pytest.raises(WrongResult, match="ours: output 0"):
        session.measure(case, {"eager": w.eager, "ours": lambda q, packed, _: bench_attention.cross_ours(q, packed)})


@pytest.mark.parametrize("w", bench_attention.WORKLOADS, ids=lambda w: f"{w.op} {w.network}")
def test_rows_of_attention_have_the_name_of_the_op_that_they_time(w, monkeypatch):
    """Without launching any: the first op called at the workload's own sizes."""
    called = []

    class Called(Exception):
        pass

    def record(name):
        def call(*_, **__):
            called.append(name)
            raise Called

        return call

    for name in ("attention", "attention_packed", "attention_dual"):
        monkeypatch.setattr(bench_attention.ops, name, record(name))
    with pytest.raises(Called):
        w.ours(*w.inputs())
    assert called == [w.op]


def test_the_gpu_has_every_network():
    assert {name.split(",")[0] for name in shapes.ATTENTION_GPU} >= {
        "EDM-16",
        "ADM-32",
        "DiT-XL/2",
        "PixArt-1024",
        "SDXL-64",
        "Flux",
        "Wan-14B",
    }
    assert {width for *_, width in shapes.ATTENTION_GPU.values()} == {40, 64, 72, 80, 128, 160, 256}
    assert {channels for *_, channels in shapes.ROWS_GPU.values()} >= {1152, 1536, 2432, 3072, 5120, 6144}


@pytest.mark.parametrize("bench", [bench_score_matching, bench_distillation])
def test_the_gpu_has_losses_of_64_megabytes_and_more_in_bfloat16(bench):
    """Where caches no longer hold a tensor, and the time is that of the memory; and of a batch as it is trained with."""
    sizes = [2 * math.prod(shape) for shape in bench.SHAPES_GPU.values()]
    assert max(sizes) >= 64 << 20
    assert min(sizes) <= 8 << 20


@pytest.mark.parametrize("network", bench_skipping.SHAPES)
def test_what_a_criterion_costs_can_be_read_off(network):
    """The same steps with it and without, neither of which waits for the host."""
    pair = [w for w in bench_skipping.WORKLOADS if w.network == network and w.op in ("solver_step deciding", "solver_step undecided")]
    assert len({w.shape for w in pair}) == 1
    assert all(w.captured for w in pair)
    inputs = pair[0].inputs()
    (*deciding, decision), undecided = (w.ours(*inputs) for w in pair)
    for with_it, without in zip(deciding, undecided, strict=True):
        assert torch.equal(with_it, without)
    assert decision in (0, 1)


def test_each_way_to_learn_a_score_is_held_to_its_formula_and_measured():
    (w,) = bench_estimators.WORKLOADS
    few = dataclasses.replace(w, inputs=lambda: [torch.randn(2, 1, 8, 8)])
    session = Session("cpu", 0.01)
    session.measure(Case(few, torch.float32, "forward"), {"eager": w.eager, "ours": w.ours})
    rows = {row.provider: row for row in session.rows}
    assert list(rows) == ["eager", "ours", "ours, pairs", "exact trace", "SSM-VR", "FD-SSM", "DSM"]
    assert rows["exact trace"].peak_mb > 20 * rows["SSM-VR"].peak_mb > 20 * rows["ours"].peak_mb
    assert rows["ours"].peak_mb <= rows["eager"].peak_mb
    assert rows["exact trace"].p50_ms > 5 * rows["SSM-VR"].p50_ms, "64 backward passes for one"


def test_which_steps_are_reused_does_not_depend_on_the_samples():
    plan = bench_end_to_end.reused(12)
    assert plan == [False, False, False, *[True, False] * 4, True]
    assert bench_end_to_end.reused(12) == plan
    assert isinstance(bench_end_to_end.SKIP, AdaptiveSkip)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU measures whole networks")
def test_a_part_of_a_network_counts_for_the_whole_by_its_matrix_products():
    """28 blocks are somewhat less than 28 times one block with what stands around it; a call of 4 steps is 4 of 50."""
    name = "DiT-XL/2"
    ratio = bench_end_to_end.whole_over_measured(name)
    assert 27 < ratio < 28
    w = bench_end_to_end.workload(name)
    assert w.shape == "B=1, 4 of 50 steps, 1 of 28 blocks"
    assert w.per_thousand() == pytest.approx(1000 * 50 / 4 * ratio)
    factors = {name: variant.per_thousand() / (1000 * ratio) for name, variant in w.variants.items()}
    # 26 of 50 steps are computed, 3 of the 4 measured; 20 steps of which 2 are measured; one.
    assert factors == pytest.approx({"ours, 24 of 50 steps skipped": 26 / 3, "ours, schedule of 20 steps": 10, "ours, one step": 1})


class Traffic(TorchDispatchMode):
    """Counts the bytes of the tensors that our ops read and write; what one changes in place it reads and writes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **kwargs or {})
        # Where the factor is 1, the gradients that it belongs to are not touched.
        scaled_by_one = func is torch.ops.fastdiff.scale_samples_.default and bool((args[1] == 1).all())
        if func.namespace == "fastdiff" and not scaled_by_one:
            changed = [a for a, said in zip(args, func._schema.arguments, strict=True) if said.alias_info is not None]
            moved = tree_leaves((args, results, changed))
            self.bytes += sum(t.numel() * t.element_size() for t in moved if isinstance(t, torch.Tensor))
        return results


STREAMING = [w for bench in (bench_score_matching, bench_distillation) for w in bench.WORKLOADS if w.streams]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", ["forward", "fwd+bwd"])
@pytest.mark.parametrize("w", {w.op: w for w in reversed(STREAMING)}.values(), ids=lambda w: w.op)
def test_the_bytes_of_a_loss_are_those_that_its_kernels_move(w, mode, dtype):
    """What is recorded in forward is scaled in place; where it is not recorded, backward reads the inputs again."""
    if mode not in {case.mode for case in cases([w], [dtype])}:
        pytest.skip("a step has its gradient inside, and is not taken in float16")
    case = Case(dataclasses.replace(w, inputs=lambda: [torch.randn(4, *a.shape[1:]) for a in w.inputs()]), dtype, mode)
    args = case.inputs(dtype, "cpu")
    upstream = [torch.randn_like(o) for o in Case(w, dtype, "forward").bind(w.ours, args, [])()]
    with Traffic() as traffic:
        results = case.bind(w.ours, args, upstream)()
    assert case.bytes(args, results) == pytest.approx(traffic.bytes, rel=2e-3)
