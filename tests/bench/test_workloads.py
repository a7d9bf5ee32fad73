"""What the benchmarks compare with, where it is more than a line."""

from __future__ import annotations

import pytest
import torch

from benchmarks import bench_attention, bench_end_to_end, shapes
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
