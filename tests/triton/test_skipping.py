"""Triton kernels of the skipping family against their definitions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastdiff_kernels.reference import skipping as definition
from fastdiff_kernels.triton import _sums, skipping
from tests.helpers import FLOATS, assert_bitwise, assert_within_eager
from tests.samples import skipping as samples
from tests.triton.accuracy import check
from tests.triton.drawing import few_examples, laid_out, shapes
from tests.triton.running import check_budgets, run_interpreted

SHAPES = [(2, 3), (3, 4, 5, 7), (1, _sums.CHUNK + 1), (2, 5 * _sums.CHUNK - 3), (4,), (0, 5)]


def latents(shape, dtype, device):
    return [torch.randn(shape, device=device).to(dtype) for _ in range(4)]


@pytest.mark.executes
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_difference_is_as_accurate_as_the_definition(shape, dtype, device):
    inputs = latents(shape, dtype, device)
    truths = definition.third_order_difference(*[x.double() for x in inputs])
    eagers = definition.third_order_difference(*inputs)
    for mean, eager, truth in zip(skipping.third_order_difference(*inputs), eagers, truths, strict=True):
        assert mean.dtype == eager.dtype
        if dtype == torch.float64:
            torch.testing.assert_close(mean, eager, rtol=1e-12, atol=0)
        else:
            assert_within_eager(mean, eager, truth)


@pytest.mark.executes
def test_difference_does_not_depend_on_the_batch_or_the_layout(device):
    inputs = latents((3, 2 * _sums.CHUNK + 5), torch.float32, device)
    whole = skipping.third_order_difference(*inputs)
    assert_bitwise(skipping.third_order_difference(*[x[1:2] for x in inputs]), [w[1:2] for w in whole])
    assert_bitwise(skipping.third_order_difference(*[x.t().contiguous().t() for x in inputs]), whole)


@pytest.mark.executes
def test_difference_of_samples_without_elements_is_nan(device):
    for mean in skipping.third_order_difference(*latents((2, 0), torch.float32, device)):
        assert mean.shape == (2,)
        assert mean.isnan().all()


@pytest.mark.executes
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(), (5,), (3, 1000), (0,)])
def test_skip_decides_as_the_definition(shape, dtype, device):
    changes = [torch.rand(shape, device=device).to(dtype) for _ in range(3)]
    threshold = torch.full((1,), 0.3, dtype=torch.float64 if dtype == torch.float64 else torch.float32, device=device)
    decision = skipping.third_order_skip(*changes, threshold)
    assert_bitwise(decision, definition.third_order_skip(*changes, threshold))
    assert decision.shape == shape


SAMPLES = [(dtype, i) for dtype in (torch.float32, torch.bfloat16, torch.float16) for i in range(4)]


@pytest.mark.executes
@pytest.mark.parametrize(("dtype", "index"), SAMPLES)
@pytest.mark.parametrize("repeat", [1, 2 * _sums.CHUNK // 10 + 1])
def test_step_is_as_accurate_as_the_definition(dtype, index, repeat, device):
    """On the sample calls, small and with samples of more than a chunk."""

    def widened(value, dtype):
        if not isinstance(value, torch.Tensor) or value.dim() < 3:
            return value
        return value.repeat(1, 1, repeat).to(dtype) if value.is_floating_point() else value

    call = samples.SAMPLES["solver_step"](dtype, device)[index]
    args = [widened(a, dtype) for a in call]
    actual, eager = skipping.solver_step(*args), definition.solver_step(*args)
    truth = definition.solver_step(*[widened(a, torch.float64) for a in call])
    for a, e, t in zip(actual[:3], eager[:3], truth[:3], strict=True):
        assert a.dtype == e.dtype
        assert_within_eager(a, e, t)
    torch.testing.assert_close(actual[3], truth[3], rtol=1e-5, atol=0, equal_nan=True)


@pytest.mark.executes
def test_one_decision_about_no_samples_looks_at_no_row(device):
    x, rows = torch.empty(0, 4, device=device), torch.empty(0, dtype=torch.int64, device=device)
    state = torch.zeros(1, 9, dtype=torch.float64, device=device)
    numbers = (1.0, 0.5, 1.0, 1.0, 1.0, 0.0, *[1.0] * 4, "official", 0.25, 3, True, False)
    after = skipping.solver_step(x, x.new_empty(1, 4), None, rows, x, *(None,) * 5, state, *numbers)[3]
    assert after[0, 2] == 0


@pytest.mark.executes
@pytest.mark.parametrize("mode", ["official", "tensor"])
@pytest.mark.parametrize("decisions", [1, 3])
def test_trajectory_decides_as_the_definition(mode, decisions, device):
    """Latents of small integers: every mean is exact, so that ties are decided alike."""
    drift = torch.tensor([0, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1], device=device).cumsum(0).cumsum(0).float()
    latents = [torch.tensor([[1.0], [2.0], [-1.0]], device=device) * d + torch.zeros(3, 8, device=device) for d in drift]
    latents[9][2] += 4
    states = {module: torch.zeros(decisions, 9, dtype=torch.float64, device=device) for module in (skipping, definition)}
    reuses = 0
    for k in range(len(latents) - 1):
        before = (latents[k - 1], latents[k - 2]) if k >= 2 else (None, None)
        call = (latents[k], latents[k + 1], *(None,) * 6, *before)
        for module, state in states.items():
            numbers = (1.0, 0.0, 1.0, 1.0, 1.0, 0.0, *[1.0] * 4, mode, 0.25, 3, True, False)
            states[module] = module.solver_step(*call, state, *numbers)[3]
        assert_bitwise(states[skipping], states[definition])
        reuses += int(states[skipping][:, 2].sum())
    assert 0 < reuses < decisions * len(latents)


@pytest.mark.executes
def test_step_does_not_depend_on_the_batch(device):
    x, denoised, one, zero = latents((3, 2 * _sums.CHUNK + 5), torch.float32, device)
    state = torch.zeros(3, 9, dtype=torch.float64, device=device)

    def step(b):
        none = (None,) * 6
        return skipping.solver_step(
            x[b], denoised[b], *none, one[b], zero[b], state[b], 2.0, 1.0, 1.0, 1.0, 1.0, 0.0, *[1.0] * 4, "tensor", 0.1, 4, True, False
        )

    whole = step(slice(0, 3))
    assert_bitwise([t for t in step(slice(1, 2)) if t.numel()], [t[1:2] for t in whole if t.numel()])


@pytest.mark.executes
def test_step_of_nothing(device):
    x, state = torch.zeros(0, 5, device=device), torch.zeros(0, 9, dtype=torch.float64, device=device)
    none = (None,) * 8
    out = skipping.solver_step(x, x, *none, state, 2.0, 1.0, 1.0, 1.0, 1.0, 0.0, *[1.0] * 4, "official", 0.1, 4, True, False)
    assert [t.shape[0] for t in out] == [0, 0, 0, 0]


@pytest.mark.executes
@few_examples
@given(shape=shapes, permuted=st.booleans())
def test_difference_of_any_shape_and_layout(shape, permuted, device):
    check(skipping, "third_order_difference", [laid_out(x, permuted) for x in latents(shape, torch.float64, device)])


def test_in_the_interpreter():
    run_interpreted(__file__)


def test_compiles_within_its_budget(monkeypatch):
    short, long = torch.zeros(2, 64, dtype=torch.float64), torch.zeros(2, 3 * _sums.CHUNK, dtype=torch.bfloat16)
    changes, threshold = torch.zeros(64), torch.zeros(1)
    steps = samples.SAMPLES["solver_step"]
    guided, mixed, line, _ = steps(torch.bfloat16, "cpu")
    cases = {
        "skip": lambda: skipping.third_order_skip(changes, changes, changes, threshold),
        "difference float64": lambda: skipping.third_order_difference(*[short] * 4),
        "difference bfloat16": lambda: skipping.third_order_difference(*[long] * 4),
        "step guided, official": lambda: skipping.solver_step(*guided),
        "step of some samples, second half of Heun, tensor": lambda: skipping.solver_step(*mixed),
        "step on a line, multistep": lambda: skipping.solver_step(*line),
        "step plain float32": lambda: skipping.solver_step(*steps(torch.float32, "cpu")[3]),
    }
    check_budgets("skipping", cases, monkeypatch)
