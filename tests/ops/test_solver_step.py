"""The solver step that decides about the next one: its update, what it reuses, and its state."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fastdiff_kernels import backend, ops
from fastdiff_kernels.reference.skipping import D0, D2, NEWEST_AT, OLDER_AT, REUSE, RUN, STATE_WIDTH, STEPS, STORED
from tests.samples import skipping as samples

from ..helpers import FLOATS, assert_accurate, assert_bitwise, assert_independent_of_threads, assert_within_eager

# A chunk of the kernel has 16384 elements and is worked on in blocks of 1024.
SHAPES = [(1, 1), (3, 5), (2, 4, 7, 3), (2, 16385), (6,)]
NARROW = (torch.float32, torch.bfloat16, torch.float16)


def tensors(count: int, *shape: int) -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float64) for _ in range(count)]


def fresh(decisions: int) -> Tensor:
    return torch.zeros(decisions, STATE_WIDTH, dtype=torch.float64)


def remembering(decisions: int, newest_at: float, older_at: float) -> Tensor:
    state = fresh(decisions)
    state[:, STORED], state[:, NEWEST_AT], state[:, OLDER_AT] = 2, newest_at, older_at
    return state


def columns(like: Tensor, values: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (like.dim() - 1)).to(like.dtype)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("shape", SHAPES)
def test_guided_euler_step_is_as_accurate_as_eager(shape, dtype):
    def eager(x, denoised, uncond):
        guided = uncond + 2.5 * (denoised - uncond)
        error = x - guided
        return x - 0.25 * error, error / 2.0, guided

    def ours(x, denoised, uncond):
        return ops.solver_step(x, 2.0, 1.5, denoised=denoised, uncond=uncond, guidance=2.5, keep_noise=True, keep_denoised=True)[:3]

    assert_accurate(ours, eager, tensors(3, *shape), dtype)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("shape", SHAPES)
def test_multistep_step_is_as_accurate_as_eager(shape, dtype):
    def eager(x, denoised, previous):
        return 0.25 * x + 0.75 * (denoised + 0.4 * (denoised - previous))

    def ours(x, denoised, previous):
        return ops.solver_step(x, 2.0, 0.5, denoised=denoised, previous=previous, previous_weight=0.4).x_next

    assert_accurate(ours, eager, tensors(3, *shape), dtype)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("shape", SHAPES)
def test_second_half_of_heun_is_as_accurate_as_eager(shape, dtype):
    def eager(x, denoised, point):
        noise = (point - denoised) / 0.5
        return x + 0.5 * (point - x) - 0.75 * noise, noise

    def ours(x, denoised, point):
        return ops.solver_step(x, 2.0, 0.5, denoised=denoised, point=point, keep_noise=True)[:2]

    assert_accurate(ours, eager, tensors(3, *shape), dtype)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("shape", SHAPES)
def test_reused_step_is_as_accurate_as_eager(shape, dtype):
    """On the line through (3, older) and (2.5, newest), at 1.5: thrice as far."""

    def eager(x, newest, older):
        noise = older + 3 * (newest - older)
        return x - 0.5 * noise, x - 2 * noise

    def ours(x, newest, older):
        step = ops.solver_step(x, 2.0, 1.5, newest=newest, older=older, state=remembering(1, 2.5, 3.0), reuse_at=1.5, keep_denoised=True)
        return step.x_next, step.denoised

    assert_accurate(ours, eager, tensors(3, *shape), dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scales", [(1.0, 1.0, 1.0, 1.0), (0.9, 0.5, 0.3, 0.2)])
@pytest.mark.parametrize("shape", [(3, 5), (2, 16385)])
def test_means_are_those_of_the_scaled_differences(shape, scales, dtype):
    """Formed before x_next is rounded: nearer to the truth than differences of stored latents."""
    x, denoised, one, zero = (t.to(dtype) for t in tensors(4, *shape))
    step = {"denoised": denoised, "before": (one, zero), "scales": scales, "mode": "tensor"}
    state = ops.solver_step(x, 2.0, 1.5, state=fresh(len(x)), threshold=1e3, **step).state

    def differences(x, denoised, one, zero):
        latents = [s * t for s, t in zip(scales, (x - 0.25 * (x - denoised), x, one, zero), strict=True)]
        last, third = latents[0] - latents[1], latents[0] - 3 * latents[1] + 3 * latents[2] - latents[3]
        return third.abs().flatten(1).mean(1), last.abs().flatten(1).mean(1)

    third, last = differences(*(t.double() for t in (x, denoised, one, zero)))
    if dtype == torch.float64:
        torch.testing.assert_close(state[:, D2], last, rtol=1e-12, atol=0)
    else:
        assert_within_eager(state[:, D2].float(), differences(x, denoised, one, zero)[1], last)
    for b in range(len(x)):
        at = (third[b] / last[b]).item()
        decisions = [
            ops.solver_step(x, 2.0, 1.5, state=fresh(len(x)), threshold=at * f, **step).state[b, REUSE] for f in (1 - 1e-5, 1 + 1e-5)
        ]
        assert decisions == [0, 1]


def test_batch_pools_the_mean_and_samples_keep_their_own():
    x, denoised = tensors(2, 4, 30)
    pooled = ops.solver_step(x, 1.0, 0.5, denoised=denoised, state=fresh(1), mode="official").state
    own = ops.solver_step(x, 1.0, 0.5, denoised=denoised, state=fresh(4), mode="official").state
    assert pooled[0, D2].item() == pytest.approx(own[:, D2].mean().item(), rel=1e-14)
    assert_bitwise(ops.solver_step(x[2:3], 1.0, 0.5, denoised=denoised[2:3], state=fresh(1), mode="official").state, own[2:3])


def test_samples_compute_or_reuse_by_their_rows_as_each_would_alone():
    x, newest, older, one, zero, point = tensors(6, 5, 40)
    denoised, uncond = tensors(2, 2, 40)
    rows = torch.tensor([-1, 1, -1, -1, 0])
    state = remembering(5, 2.5, 3.0)
    state[3, STORED] = 1
    common = {"guidance": 3.0, "keep_denoised": True, "mode": "tensor", "threshold": 0.3, "at": 2.0, "reuse_at": 1.5}
    for heun in ({}, {"point": point}):
        together = ops.solver_step(
            x, 2.0, 1.5, denoised=denoised, uncond=uncond, rows=rows, newest=newest, older=older, before=(one, zero), state=state,
            keep_noise=True, **common, **heun,
        )  # fmt: skip
        for b in range(5):
            own = {"before": (one[b : b + 1], zero[b : b + 1]), "state": state[b : b + 1], **common}
            row = int(rows[b])
            if row >= 0:
                predictions = {"denoised": denoised[row : row + 1], "uncond": uncond[row : row + 1], "keep_noise": True}
                predictions |= {name: t[b : b + 1] for name, t in heun.items()}
            else:
                predictions = {"newest": newest[b : b + 1], "older": older[b : b + 1], "guidance": 1.0}
            alone = ops.solver_step(x[b : b + 1], 2.0, 1.5, **{**own, **predictions})
            for name in ("x_next", "denoised", "state"):
                assert_bitwise(getattr(together, name)[b : b + 1], getattr(alone, name))
            assert_bitwise(together.noise[b : b + 1], alone.noise if row >= 0 else newest[b : b + 1])


def test_state_notes_steps_and_predictions():
    x, denoised = tensors(2, 2, 8)
    state = ops.solver_step(x, 3.0, 2.0, denoised=denoised, state=fresh(1), at=-1.5, keep_noise=True).state
    assert state[0, [STEPS, STORED, NEWEST_AT]].tolist() == [0, 1, -1.5]
    state = ops.solver_step(x, 3.0, 2.0, denoised=denoised, state=state, keep_noise=True, mode="official").state
    assert state[0, [STEPS, RUN, REUSE, STORED, NEWEST_AT, OLDER_AT]].tolist() == [1, 0, 0, 2, 3, -1.5]
    before = state.clone()
    after = ops.solver_step(x, 3.0, 2.0, newest=x, state=state, mode="official").state
    assert after[0, [STEPS, STORED, NEWEST_AT, OLDER_AT]].tolist() == [2, 2, 3, -1.5]
    assert after[0, D0 + 1 : D2].tolist() == before[0, D2:].tolist()
    assert_bitwise(state, before)


@pytest.mark.parametrize("mode", ["official", "tensor"])
def test_nan_computes(mode):
    x = torch.ones(2, 4)
    state = fresh(2)
    state[:, STEPS] = 9
    step = {"denoised": torch.tensor([[math.nan], [1.0]]).expand(2, 4), "mode": mode, "before": (x, x)}
    assert ops.solver_step(x, 1.0, 0.5, state=state, **step).state[:, REUSE].tolist() == [0, 1]


def test_step_to_zero_is_the_denoised_sample_and_a_short_one_loses_nothing():
    x, denoised = (t.float() for t in tensors(2, 3, 20))
    assert_bitwise(ops.solver_step(80 * x, 80.0, 0.0, denoised=denoised).x_next, denoised)
    assert_bitwise(ops.solver_step(x, 0.3, 0.3, denoised=denoised).x_next, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reproducible_and_independent_of_layout(dtype):
    x, denoised, uncond, one, zero = (t.to(dtype) for t in tensors(5, 3, 50_001))

    def run(*inputs):
        x, denoised, uncond, one, zero = inputs
        step = ops.solver_step(
            x, 2.0, 1.0, denoised=denoised, uncond=uncond, guidance=2.0, before=(one, zero), state=fresh(1), mode="tensor", keep_noise=True
        )
        return step.x_next, step.noise, step.state

    assert_independent_of_threads(lambda: run(x, denoised, uncond, one, zero))
    assert_bitwise(run(*(t.t().contiguous().t() for t in (x, denoised, uncond, one, zero))), run(x, denoised, uncond, one, zero))


@pytest.mark.parametrize("decisions", [0, 1])
def test_empty_batches(decisions):
    x = torch.ones(0, 3)
    step = ops.solver_step(x, 1.0, 0.5, denoised=x, state=fresh(decisions), mode="official", keep_noise=True)
    assert step.x_next.shape == step.noise.shape == (0, 3)
    assert step.state.shape == (decisions, STATE_WIDTH)
    assert not step.state[:, REUSE].any()


def test_compiles_into_one_graph_also_with_levels_that_change():
    x, denoised = (t.float() for t in tensors(2, 2, 9))

    def step(x, denoised, state, sigma, guidance):
        return tuple(
            ops.solver_step(
                x, sigma, 1.0, denoised=denoised, uncond=x, guidance=guidance, at=-sigma, state=state, mode="official", keep_noise=True
            )
        )

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for sigma in (2.0, 3.0, 4.0):
        assert_bitwise(compiled(x, denoised, fresh(1), sigma, 2 * sigma), step(x, denoised, fresh(1), sigma, 2 * sigma))


ONES = torch.ones(2, 3)
ROWS = torch.tensor([0, -1])


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"x": 1.0}, TypeError, "x must be a tensor; got float"),
        ({"sigma": 0.0}, ValueError, "sigma must be finite and greater than 0; got 0.0"),
        ({"sigma_next": -1.0}, ValueError, "sigma_next must be finite and at least 0; got -1.0"),
        ({"denoised": None}, ValueError, "needs denoised, or newest to reuse; got neither"),
        ({"denoised": torch.ones(2, 4)}, ValueError, r"denoised must have the shape of x, \(2, 3\); got \(2, 4\)"),
        ({"denoised": ONES.half()}, TypeError, "denoised must have the dtype of x"),
        ({"denoised": None, "newest": ONES, "uncond": ONES}, ValueError, "uncond needs denoised"),
        ({"denoised": None, "newest": ONES, "keep_noise": True}, ValueError, "keep_noise needs denoised"),
        ({"uncond": torch.ones(2)}, ValueError, "uncond must have the shape of denoised"),
        ({"guidance": 2.0}, ValueError, "guidance needs uncond, which is None; got guidance = 2.0"),
        ({"uncond": ONES, "guidance": math.inf}, ValueError, "guidance must be finite; got inf"),
        ({"rows": ROWS}, ValueError, "rows needs newest, which is None"),
        ({"rows": ROWS.int(), "newest": ONES}, ValueError, "rows must be int64 of shape"),
        ({"rows": ROWS + 2, "newest": ONES}, ValueError, "rows must be below the 2 rows of denoised; got 2"),
        ({"rows": ROWS, "newest": ONES, "denoised": torch.ones(1, 4)}, ValueError, r"denoised must have samples of shape \(3,\)"),
        ({"older": ONES}, ValueError, "older needs newest"),
        ({"previous": torch.ones(2)}, ValueError, "previous must have the shape of x"),
        ({"point": ONES, "previous": ONES}, ValueError, "point needs denoised and sigma_next > 0, and excludes previous"),
        ({"point": ONES, "sigma_next": 0.0}, ValueError, "point needs denoised and sigma_next > 0"),
        ({"mode": "exact"}, ValueError, "mode must be one of 'official', 'tensor', 'none'; got 'exact'"),
        ({"mode": "tensor"}, ValueError, "mode 'tensor' needs state, which is None"),
        ({"state": torch.zeros(1, 9)}, TypeError, "state must be float64; got torch.float32"),
        ({"state": fresh(3)}, ValueError, r"state must have shape \(1, 9\) or \(2, 9\); got \(3, 9\)"),
        ({"threshold": -1.0}, ValueError, "threshold must be finite and at least 0; got -1.0"),
        ({"max_skip": 0}, ValueError, "max_skip must be at least 1; got 0"),
        ({"scales": (1.0, 1.0)}, ValueError, "scales must be 4 numbers; got 2"),
        ({"before": (ONES, torch.ones(2))}, ValueError, r"before\[1\] must have the shape of x"),
        ({"before": (ONES,)}, TypeError, r"before must be two tensors; got \['Tensor'\]"),
        ({"before": (ONES, None)}, TypeError, r"before must be two tensors; got \['Tensor', 'NoneType'\]"),
        ({"before": ONES}, TypeError, "before must be two tensors; got Tensor"),
        ({"sigma": "1"}, TypeError, "sigma must be a number; got str"),
        ({"sigma": math.nan}, ValueError, "sigma must be finite; got nan"),
        ({"sigma_next": "1"}, TypeError, "sigma_next must be a number; got str"),
        ({"sigma_next": torch.tensor(0.5)}, TypeError, "sigma_next must be a number; got Tensor"),
        ({"sigma_next": math.inf}, ValueError, "sigma_next must be finite; got inf"),
        ({"guidance": "2"}, TypeError, "guidance must be a number; got str"),
        ({"guidance": True}, TypeError, "guidance must be a number; got bool"),
        ({"at": torch.ones(())}, TypeError, "at must be a number; got Tensor"),
        ({"at": math.nan}, ValueError, "at must be finite; got nan"),
        ({"reuse_at": math.inf}, ValueError, "reuse_at must be finite; got inf"),
        ({"previous": ONES, "previous_weight": "1"}, TypeError, "previous_weight must be a number; got str"),
        ({"previous": ONES, "previous_weight": math.nan}, ValueError, "previous_weight must be finite; got nan"),
        ({"previous_weight": 0.5}, ValueError, "previous_weight needs previous, which is None; got previous_weight = 0.5"),
        ({"scales": 5}, TypeError, "scales must be 4 numbers; got int"),
        ({"scales": "1111"}, TypeError, r"scales\[0\] must be a number; got str"),
        ({"scales": (1.0, 1.0, 1.0, -math.inf)}, ValueError, r"scales\[3\] must be finite; got -inf"),
        ({"threshold": "a"}, TypeError, "threshold must be a number; got str"),
        ({"threshold": torch.tensor(0.1)}, TypeError, "threshold must be a number; got Tensor"),
        ({"threshold": math.nan}, ValueError, "threshold must be finite; got nan"),
        ({"max_skip": 2.0}, TypeError, "max_skip must be an int; got float"),
        ({"keep_noise": 1}, TypeError, "keep_noise must be a bool; got int"),
        ({"keep_denoised": "no"}, TypeError, "keep_denoised must be a bool; got str"),
        ({"rows": [0, 1], "newest": ONES}, TypeError, "rows must be a tensor; got list"),
        ({"state": [0.0] * 9}, TypeError, "state must be a tensor; got list"),
        ({"x": torch.ones(2, 3, requires_grad=True)}, ValueError, "x must not require grad"),
    ],
)
def test_errors_name_the_argument(change, error, text):
    arguments = {"x": ONES, "sigma": 1.0, "sigma_next": 0.5, "denoised": ONES, **change}
    with pytest.raises(error, match=f"solver_step: {text}"):
        ops.solver_step(arguments.pop("x"), arguments.pop("sigma"), arguments.pop("sigma_next"), **arguments)


def test_numbers_may_be_ints_or_numpys_and_as_large_as_floats_are():
    x, denoised = (t.float() for t in tensors(2, 2, 9))
    expected = ops.solver_step(x, 2.0, 1.0, denoised=denoised).x_next
    assert_bitwise(ops.solver_step(x, np.float64(2), 1, denoised=denoised).x_next, expected)
    assert_bitwise(ops.solver_step(x, 2.0, 1.0, denoised=denoised, at=1.7e308, reuse_at=1.7e308).x_next, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cuda", "triton"])
@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("dtype", NARROW)
def test_gpu_kernels_agree_with_the_definition(dtype, index, name):
    call = samples.SAMPLES["solver_step"](dtype, "cuda")[index]
    results = []
    for chosen in (name, "reference"):
        with backend(chosen):
            results.append(torch.ops.fastdiff.solver_step.default(*call))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, equal_nan=True)


@pytest.mark.gpu
def test_decisions_travel_without_a_blocking_call():
    from fastdiff_kernels.diffusion import AdaptiveSkip, Schedule, sample

    noise, schedule = torch.randn(2, 64, device="cuda"), Schedule.karras(20, 0.05, 40.0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = sample(lambda x, sigma: x / (1 + sigma[:, None]), noise, schedule, solver="euler", skip=AdaptiveSkip(0.1))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert result.skipped.any()
