"""Triton kernels of group normalisation against their definition, forward and backward, in both orders of the elements."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastdiff_kernels.reference import group_norm as definition
from fastdiff_kernels.triton import _group_norm_tiles as tiles
from fastdiff_kernels.triton import group_norm
from tests.helpers import assert_bitwise, assert_within_eager
from tests.shapes import MAPS
from tests.triton.drawing import few_examples
from tests.triton.running import check_budgets, run_interpreted

EPS = 1e-5
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


@pytest.fixture(params=[False, True], ids=["planes", "rows"])
def channels_last(request):
    return request.param


@pytest.fixture(params=[False, True], ids=["whole", "in parts"])
def in_parts(request, monkeypatch):
    """Treats every group as too large for one program, or takes it as it is."""
    if request.param:
        monkeypatch.setattr(tiles, "_WHOLE", 0)


def operands(shape, dtype, parameter_dtype, device, channels_last=False):
    """x, weight, bias, and scale and shift as chunks of one projection."""
    batch, channels = shape[:2]
    x = (2 * torch.randn(shape, device=device) + 1).to(dtype)
    if channels_last and x.dim() in CHANNELS_LAST:
        x = x.contiguous(memory_format=CHANNELS_LAST[x.dim()])
    weight, bias = torch.randn(2, channels, device=device).to(parameter_dtype)
    return [x, weight, bias, *torch.randn(batch, 2 * channels, device=device).to(parameter_dtype).chunk(2, dim=1)]


def launched(args, groups, upstream, activation="silu", needs=None):
    """Output, statistics and gradients of the kernels."""
    x, *vectors = args
    needs = [a is not None for a in args] if needs is None else needs
    outputs = group_norm.group_norm_silu(x, groups, *vectors, EPS, activation)
    grads = group_norm.group_norm_silu_backward(upstream, x, groups, *vectors, EPS, activation, *outputs[1:], needs)
    assert all(g.numel() == 0 for g, need in zip(grads, needs, strict=True) if not need)
    return [*outputs, *(g for g, need in zip(grads, needs, strict=True) if need)]


def defined(args, groups, upstream, activation="silu", dtype=None):
    """The same of the definition, with everything in dtype or, for None, as it is."""
    leaves = [None if a is None else a.detach().to(dtype or a.dtype).requires_grad_() for a in args]
    outputs = definition.group_norm_silu(leaves[0], groups, *leaves[1:], EPS, activation)
    grads = torch.autograd.grad(outputs[0], [leaf for leaf in leaves if leaf is not None], upstream.to(outputs[0].dtype))
    return [*(o.detach() for o in outputs), *grads]


def check(args, groups, activation="silu"):
    upstream = torch.randn_like(args[0])
    results = [
        launched(args, groups, upstream, activation),
        defined(args, groups, upstream, activation),
        defined(args, groups, upstream, activation, torch.float64),
    ]
    for actual, eager, truth in zip(*results, strict=True):
        assert actual.dtype == eager.dtype
        if args[0].dtype == torch.float64:
            torch.testing.assert_close(actual, truth, rtol=1e-12, atol=1e-12)
        else:
            assert_within_eager(actual, eager, truth, factor=4.0)
    if args[0].numel():
        assert results[0][0].stride() == results[0][3].stride() == args[0].stride()


@pytest.mark.executes
@pytest.mark.parametrize(
    ("shape", "groups", "dtypes"),
    [
        ((2, 32, 9, 7), 8, (torch.float32, torch.float32)),
        ((2, 24, 16, 16), 3, (torch.bfloat16, torch.float32)),
        ((1, 6, 3, 5, 7), 3, (torch.float16, torch.float16)),
        ((2, 6, 4, 4), 1, (torch.float64, torch.float64)),
        ((3, 40), 4, (torch.float32, torch.float32)),
        ((2, 3, 5), 3, (torch.bfloat16, torch.bfloat16)),
        ((1, 5, 4, 7), 5, (torch.bfloat16, torch.float32)),
    ],
)
def test_small_groups(shape, groups, dtypes, channels_last, device):
    check(operands(shape, *dtypes, device, channels_last), groups)


@pytest.mark.executes
@pytest.mark.parametrize(
    ("shape", "groups", "dtypes"),
    [
        ((1, 6, 90, 100), 3, (torch.float32, torch.float32)),
        ((1, 16, 48, 60), 2, (torch.bfloat16, torch.float32)),
        ((1, 3, 20, 1000), 3, (torch.float16, torch.float16)),
        ((1, 2, 150, 150), 1, (torch.float64, torch.float64)),
        ((1, 150, 12, 12), 1, (torch.float32, torch.float32)),
    ],
)
def test_groups_in_parts(shape, groups, dtypes, channels_last, device):
    args = operands(shape, *dtypes, device, channels_last)
    assert not tiles.tiles_of(tiles.layout_of(args[0], groups), args[0].element_size(), 1).whole
    check(args, groups)


@pytest.mark.executes
@pytest.mark.parametrize(("channels", "groups"), MAPS.values(), ids=MAPS)
def test_maps_of_networks(channels, groups, device):
    check(operands((1, channels, 2, 4), torch.bfloat16, torch.float32, device, channels // 64 % 2 == 0), groups)


@pytest.mark.executes
@pytest.mark.parametrize("width", sorted({channels // groups for channels, groups in MAPS.values()}))
def test_group_widths_of_networks_in_parts(width, device, monkeypatch):
    monkeypatch.setattr(tiles, "_WHOLE", 0)
    check(operands((1, 3 * width, 3, 4), torch.float32, torch.float32, device, width % 4 == 0), 3)


@pytest.mark.executes
def test_parameters_that_are_absent(in_parts, channels_last, device):
    x, weight, bias, scale, shift = operands((2, 8, 3, 5), torch.float32, torch.float32, device, channels_last)
    check([x, None, bias, scale, None], 4)
    check([x, weight, None, None, shift], 4, None)
    check([x, None, None, None, None], 4)


@pytest.mark.executes
def test_gradients_that_nobody_asked_for_change_nothing(in_parts, channels_last, device):
    args = operands((2, 8, 3, 5), torch.float32, torch.float32, device, channels_last)
    upstream = torch.randn_like(args[0])
    everything = launched(args, 4, upstream)[3:]
    for i, whole in enumerate(everything):
        assert_bitwise(launched(args, 4, upstream, needs=[i == j for j in range(5)])[3], whole)


@pytest.mark.executes
def test_a_samples_result_does_not_depend_on_its_batch(in_parts, channels_last, device):
    x, weight, bias, scale, shift = operands((3, 8, 3, 5), torch.float32, torch.float32, device, channels_last)
    upstream, needs = torch.randn_like(x), [True, False, False, True, True]
    whole = launched([x, weight, bias, scale, shift], 4, upstream, needs=needs)
    alone = launched([x[1:2], weight, bias, scale[1:2], shift[1:2]], 4, upstream[1:2], needs=needs)
    for one, three in zip(alone, whole, strict=True):
        assert_bitwise(one, three[1:2])
    assert_bitwise(launched([x, weight, bias, scale, shift], 4, upstream, needs=needs), whole)


@pytest.mark.executes
@pytest.mark.parametrize("shape", [(2, 16, 12, 12), (1, 2, 128, 136)])
def test_a_large_mean_costs_no_digits(shape, channels_last, device):
    args = operands(shape, torch.float32, torch.float32, device, channels_last)
    check([args[0] + 4096, *args[1:]], 2)


@pytest.mark.executes
def test_long_runs_of_positions(channels_last, device, monkeypatch):
    """Programs of the first pass that go through several tiles, and sums of more parts than are loaded at once."""
    for name, value in {"_WHOLE": 0, "_PART": 64, "PARTIAL": 8}.items():
        monkeypatch.setattr(tiles, name, value)
    args = operands((1, 4, 20, 41), torch.float32, torch.float32, device, channels_last)
    assert tiles.tiles_of(tiles.layout_of(args[0], 2), 4, 1).run > 1
    check(args, 2)
    check(operands((1, 40, 4, 8), torch.float32, torch.float32, device), 1)


@pytest.mark.executes
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_group(bad, in_parts, channels_last, device):
    args = operands((2, 8, 5, 5), torch.float32, torch.float32, device, channels_last)
    clean, *_ = group_norm.group_norm_silu(args[0], 4, *args[1:], EPS, "silu")
    args[0][1, 3, 2, 2] = bad
    result, *_ = group_norm.group_norm_silu(args[0], 4, *args[1:], EPS, "silu")
    assert result[1, 2:4].isnan().all()
    for index in ((0,), (1, slice(0, 2)), (1, slice(4, 8))):
        assert_bitwise(result[index], clean[index])


@pytest.mark.executes
@pytest.mark.parametrize("shape", [(0, 8, 5, 5), (2, 8, 0, 5), (0, 8)])
def test_nothing(shape, device):
    args = operands(shape, torch.float32, torch.float32, device)
    y, _, _, *grads = launched(args, 2, torch.randn_like(args[0]))
    assert y.shape == shape
    for grad, arg in zip(grads, args, strict=True):
        assert_bitwise(grad, torch.zeros_like(arg))


@pytest.mark.executes
def test_other_layouts_are_copied(device):
    x, *vectors = operands((2, 8, 6, 5), torch.float32, torch.float32, device)
    upstream = torch.randn_like(x)
    expected = launched([x, *vectors], 4, upstream)
    turned = x.transpose(2, 3).contiguous().transpose(2, 3)
    vectors = [torch.stack((v, v), dim=-1)[..., 0] for v in vectors]
    assert_bitwise(launched([turned, *vectors], 4, upstream.transpose(2, 3).contiguous().transpose(2, 3)), expected)


@pytest.mark.parametrize(("channels", "groups"), MAPS.values(), ids=MAPS)
@pytest.mark.parametrize("side", [8, 16, 32, 64])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_tiles_cover_every_group_and_are_mostly_full(channels, groups, side, itemsize, channels_last):
    strides = (1, channels) if channels_last else (side * side, 1)
    layout = tiles.Layout(torch.contiguous_format, channels, side * side, groups, *strides)
    for operand_count in (1, 2):
        t = tiles.tiles_of(layout, itemsize, operand_count)
        assert t.channels * t.positions * itemsize * operand_count <= 32768
        assert (t.channels & (t.channels - 1)) == (t.positions & (t.positions - 1)) == 0
        covered = (
            t.channel_blocks * t.group_count * layout.width
            if t.parts == 1
            else t.channel_blocks // groups // t.parts * groups * layout.width
        )
        assert covered >= channels
        assert t.parts * t.channels >= layout.width or t.group_count > 1
        assert t.position_blocks * t.positions >= side * side
        assert t.parts * t.runs <= 256
        assert t.per_sample * t.channels * t.positions <= 2 * channels * side * side


@pytest.mark.executes
@few_examples
@given(
    batch=st.integers(0, 2),
    groups=st.integers(1, 5),
    width=st.integers(1, 9),
    positions=st.lists(st.integers(1, 5), max_size=3),
    present=st.lists(st.booleans(), min_size=4, max_size=4),
    activation=st.sampled_from(["silu", None]),
    last=st.booleans(),
)
def test_any_shape_and_any_parameters(batch, groups, width, positions, present, activation, last, device):
    x, *parameters = operands((batch, groups * width, *positions), torch.float64, torch.float64, device, last)
    check([x, *(v if p else None for v, p in zip(parameters, present, strict=True))], groups, activation)


def test_in_the_interpreter():
    run_interpreted(__file__)


def test_launches_fit_their_budgets(monkeypatch):
    """Forward and backward of the shapes of EDM and Stable Diffusion, in both orders of the elements; none spills."""

    def case(shape, dtype, channels_last, needs):
        args = operands(shape, dtype, torch.float32, "cpu", channels_last)
        return lambda: launched(args, 32, args[0], needs=needs)

    cases = {
        "EDM planes": case((1, 256, 16, 16), torch.bfloat16, False, [True] * 5),
        "SD15 planes": case((1, 320, 64, 64), torch.float32, False, [True, False, False, False, False]),
        "SD15 rows": case((1, 320, 64, 64), torch.bfloat16, True, [True, False, False, True, True]),
    }
    check_budgets("group_norm", cases, monkeypatch)
