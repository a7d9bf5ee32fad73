"""Triton kernels of the losses of SIM and moment matching against their definitions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastdiff_kernels.triton import _sums, distillation
from tests.helpers import FLOATS, assert_bitwise
from tests.triton.accuracy import check, constants, normals
from tests.triton.drawing import few_examples, laid_out, shapes
from tests.triton.running import check_budgets, run_interpreted

# Every dtype once, every kind of shape once: the interpreter is slow.
CASES = [((2, 5, 6), dtype) for dtype in FLOATS] + [(shape, torch.bfloat16) for shape in ((1, _sums.CHUNK + 1), (4,), (0, 5))]
MOMENT_LOSSES = ("moment_matching_loss", "moment_matching_auxiliary_loss")


def sim_calls(shape, dtype, device):
    """Arguments of sim_loss: denoised outputs, raw ones, and raw 16-bit ones beside float32 samples."""
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    fake, teacher, sample, noisy = normals(shape, dtype, device, 4)
    c_skip, c_out, weight, c = constants(shape[0], dtype, device, [shape[0], 1, shape[0], 1])
    return [
        (fake, teacher, sample, None, None, None, weight, c, "pseudo_huber"),
        (fake, teacher, sample, None, None, None, weight, torch.zeros_like(c), "l2"),
        (fake, teacher, sample.to(wide), noisy.to(wide), c_skip, c_out, weight, c, "pseudo_huber"),
    ]


@pytest.mark.executes
@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_sim_loss_is_as_accurate_as_the_definition(shape, dtype, device):
    for call in sim_calls(shape, dtype, device):
        check(distillation, "sim_loss", call)


@pytest.mark.executes
@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_sim_gradients_are_as_accurate_as_the_definition(shape, dtype, device):
    for call in sim_calls(shape, dtype, device):
        _, gap, projection = distillation.sim_loss(*call)
        raw = call[3] is not None
        grad = torch.randn(shape[0], device=device, dtype=call[6].dtype)
        for needs in ([True, True, True, raw], [False, True, False, False]):
            check(distillation, "sim_loss_backward", (grad, *call, gap, projection, needs))


@pytest.mark.executes
def test_sim_loss_of_a_closed_gap_is_zero_with_zero_gradients(device):
    (fake, sample), zero = normals((2, 5), torch.float32, device, 2), torch.zeros(1, device=device)
    call = (fake, fake.clone(), sample, None, None, None, torch.ones(1, device=device), zero, "pseudo_huber")
    loss, *sums = distillation.sim_loss(*call)
    gradients = distillation.sim_loss_backward(torch.ones(2, device=device), *call, *sums, [True, True, True, False])[:3]
    assert not any(t.any() for t in (loss, *sums, *gradients))


@pytest.mark.executes
@pytest.mark.parametrize("name", MOMENT_LOSSES)
@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_moment_matching_is_as_accurate_as_the_definition(shape, dtype, name, device):
    (noise, auxiliary, teacher), (weight,) = normals(shape, dtype, device, 3), constants(shape[0], dtype, device, [shape[0]])
    # Along the gap, as in training: the terms of <sample, auxiliary - teacher> do not cancel.
    operands = [(auxiliary - teacher) * (1 + 0.1 * noise), auxiliary, teacher]
    check(distillation, name, (*operands, weight))
    check(distillation, f"{name}_recorded", (*operands, weight, [True]))
    check(distillation, f"{name}_backward", (torch.randn_like(weight), *operands, weight, [True]))


@pytest.mark.executes
def test_a_sample_does_not_depend_on_its_batch(device):
    operands, one = normals((2, _sums.CHUNK + 5), torch.float32, device, 3), torch.ones(1, device=device)
    of_second = [x[1:] for x in operands]
    whole = distillation.sim_loss(*operands, None, None, None, one, one, "pseudo_huber")
    assert_bitwise(distillation.sim_loss(*of_second, None, None, None, one, one, "pseudo_huber"), [o[1:] for o in whole])
    whole = distillation.moment_matching_auxiliary_loss_recorded(*operands, one, [True])
    assert_bitwise(distillation.moment_matching_auxiliary_loss_recorded(*of_second, one, [True]), [o[1:] for o in whole])


@pytest.mark.executes
@few_examples
@given(shape=shapes, permuted=st.booleans(), call=st.integers(0, 2), common=st.tuples(*[st.booleans()] * 2))
def test_any_shape_layout_and_form_of_constants(shape, permuted, call, common, device):
    *tensors, weight, c, distance = sim_calls(shape, torch.float64, device)[call]
    weight, c = (t[:1].expand(1 if one else shape[0]).contiguous() for t, one in zip((torch.ones_like(c), c), common, strict=True))
    operands = [t if t is None or t.dim() < 2 else laid_out(t, permuted) for t in tensors]
    check(distillation, "sim_loss", (*operands, weight, c, distance))
    for name in MOMENT_LOSSES:
        check(distillation, name, (*operands[:3], weight))


def test_in_the_interpreter():
    run_interpreted(__file__)


def test_budgets(monkeypatch):
    one, grad, sums = torch.ones(1), torch.ones(2), torch.ones(2, dtype=torch.float64)
    x = torch.zeros(2, 3 * _sums.CHUNK + 8, dtype=torch.bfloat16)
    short, wide = x[:, :64].contiguous(), x.float()
    all_four = [True, True, True, True]
    check_budgets(
        "distillation",
        {
            "sim_loss": lambda: distillation.sim_loss(x, x, x, None, None, None, one, one, "pseudo_huber"),
            "sim_loss short raw": lambda: distillation.sim_loss(short, short, short, short, one, one, one, one, "pseudo_huber"),
            "sim_loss_backward": lambda: distillation.sim_loss_backward(
                grad, x, x, x, None, None, None, one, one, "pseudo_huber", sums, sums, [True, True, True, False]
            ),
            "sim_loss_backward raw": lambda: distillation.sim_loss_backward(
                grad, x, x, wide, wide, one, one, one, one, "pseudo_huber", sums, sums, all_four
            ),
            "moment_matching_auxiliary_loss_recorded": lambda: distillation.moment_matching_auxiliary_loss_recorded(x, x, x, one, [True]),
            "moment_matching_auxiliary_loss_backward": lambda: distillation.moment_matching_auxiliary_loss_backward(
                grad, x, x, x, one, [True]
            ),
        },
        monkeypatch,
    )
