"""AdaptiveSkip: the authors' rule index for index, the tensor rule, what is reused, and state."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from numbers import Real

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastdiff_kernels import ops
from fastdiff_kernels.diffusion import AdaptiveSkip, FixedSkip, Schedule, prediction, sample, trajectory
from fastdiff_kernels.diffusion._transfer import to_device
from fastdiff_kernels.reference.skipping import D2, REUSE, STATE_WIDTH

from .oracles import Recorder, given_noise, two_points


def official_by_lists(latents: list[Tensor], threshold: float, max_skip: int) -> list[bool]:
    """Which steps reuse, as the rule reads when everything is kept in lists."""
    mask: list[bool] = []  # True: compute
    d: dict[int, float] = {}
    reused = []
    for n in range(len(latents) - 1):
        reused.append(n > 3 and not mask[-1])
        if n >= 1:
            d[n + 1] = (latents[n + 1] - latents[n]).abs().mean().item()
        if n >= 3:
            if len(mask) > 4 and not any(mask[-max_skip:]):
                mask.append(True)
            else:
                mask.append(not abs((d[n + 1] + d[n - 1]) / 2 - d[n]) <= threshold * d[n])
    return reused


def tensor_by_lists(latents: list[Tensor], threshold: float, max_skip: int) -> list[bool]:
    reused = []
    for n in range(len(latents) - 1):
        if n < 3:
            reused.append(False)
            continue
        x0, x1, x2, x3 = latents[n - 3 : n + 1]
        straight = (x3 - 3 * x2 + 3 * x1 - x0).abs().mean() <= threshold * (x3 - x2).abs().mean()
        reused.append(bool(straight) and not (len(reused) >= max_skip and all(reused[-max_skip:])))
    return reused


def decisions(rule: AdaptiveSkip, latents: list[Tensor]) -> list[list[bool]]:
    """What the op decides along these latents. A step to sigma = 0 is one to `denoised`, exactly."""
    state = torch.zeros(latents[0].shape[0] if rule.per_sample else 1, STATE_WIDTH, dtype=torch.float64)
    reused = []
    for k, (x, x_next) in enumerate(pairwise(latents)):
        reused.append((state[:, REUSE] != 0).tolist())
        before = (latents[k - 1], latents[k - 2]) if k >= 2 else None
        settings = {"mode": rule.mode, "threshold": rule.threshold, "max_skip": rule.max_skip}
        state = ops.solver_step(x, 1.0, 0.0, denoised=x_next, state=state, before=before, **settings).state
    return reused


def walk(changes: list[int]) -> list[Tensor]:
    """Latents [1, 1] that move by these amounts, alternately forth and back so that only the amounts are telling."""
    latents = [torch.zeros(1, 1, dtype=torch.float64)]
    for k, change in enumerate(changes):
        latents.append(latents[-1] + (-1) ** k * change)
    return latents


# Small integers and thresholds of few bits: every difference is exact, so that ties are decided alike, and there are many of them.
@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=60), st.sampled_from([0.0, 0.125, 0.5, 2.0]), st.integers(1, 8))
def test_official_rule_agrees_with_whole_lists(changes: list[int], threshold: float, max_skip: int) -> None:
    latents = walk(changes)
    reused = decisions(AdaptiveSkip(threshold, max_skip), latents)
    assert [row[0] for row in reused] == official_by_lists(latents, threshold, max_skip)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(-6, 6), min_size=1, max_size=40), st.sampled_from([0.0, 0.5, 4.0, 16.0]), st.integers(1, 6))
def test_tensor_rule_agrees_with_whole_lists(changes: list[int], threshold: float, max_skip: int) -> None:
    latents = [torch.zeros(1, 2, dtype=torch.float64)]
    for change in changes:
        latents.append(latents[-1] + torch.tensor([[change, 1.0]], dtype=torch.float64))
    reused = decisions(AdaptiveSkip(threshold, max_skip, mode="tensor"), latents)
    assert [row[0] for row in reused] == tensor_by_lists(latents, threshold, max_skip)


@pytest.mark.parametrize(("mode", "by_lists"), [("official", official_by_lists), ("tensor", tensor_by_lists)])
@pytest.mark.parametrize("per_sample", [False, True])
def test_decisions_hold_for_the_batch_or_for_each_sample(mode: str, by_lists: Callable[..., list[bool]], per_sample: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    drift = torch.randn(3, 8, generator=generator, dtype=torch.float64)
    noise = torch.tensor([0.0, 0.05, 1.0], dtype=torch.float64)[:, None]
    latents = [drift * k + noise * torch.randn(3, 8, generator=generator, dtype=torch.float64) for k in range(40)]
    threshold = 0.05 if mode == "official" else 0.3
    reused = decisions(AdaptiveSkip(threshold, mode=mode, per_sample=per_sample), latents)
    if per_sample:
        expected = [by_lists([x[i : i + 1] for x in latents], threshold, 4) for i in range(3)]
        assert [list(row) for row in zip(*reused, strict=True)] == expected
        assert len({sum(row) for row in expected}) == 3
    else:
        assert [row[0] for row in reused] == by_lists(latents, threshold, 4)


@pytest.mark.parametrize(("mode", "by_lists"), [("official", official_by_lists), ("tensor", tensor_by_lists)])
def test_space_vp_looks_at_x_over_root_one_plus_sigma_squared(mode: str, by_lists: Callable[..., list[bool]]) -> None:
    schedule = Schedule.karras(30, 0.02, 80.0)
    levels = schedule.sigmas.tolist()
    recorder = Recorder(two_points)
    noise = torch.randn(2, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    threshold = 0.02 if mode == "official" else 0.2
    rule = AdaptiveSkip(threshold, mode=mode, space="vp")
    result = sample(recorder, noise, schedule, solver="euler", skip=rule)
    in_ve = sample(two_points, noise, schedule, solver="euler", skip=AdaptiveSkip(threshold, mode=mode))
    assert result.skipped.tolist() != in_ve.skipped.tolist()

    x, calls, latents = noise * levels[0], iter(recorder.calls), [noise * levels[0]]
    predicted = None
    for (sigma, sigma_next), skipped in zip(pairwise(levels), result.skipped.tolist(), strict=True):
        if not skipped:
            seen = next(calls)[0]
            torch.testing.assert_close(seen, x)
            predicted = (seen - two_points(seen, seen.new_full((2,), sigma))) / sigma
        x = x + (sigma_next - sigma) * predicted
        latents.append(x)
    scaled = [x / math.sqrt(1 + sigma**2) for x, sigma in zip(latents, levels, strict=True)]
    assert result.skipped.tolist() == by_lists(scaled, threshold, 4)


def computed(result: object) -> list[int]:
    return (~result.skipped).nonzero()[:, 0].tolist()


CONSTANT = given_noise(torch.ones_like)


@pytest.mark.parametrize(
    ("max_skip", "steps"),
    [
        (1, [0, 1, 2, 3, *range(9, 50, 2)]),
        (2, [0, 1, 2, 3, *range(9, 50, 3)]),
        (4, [0, 1, 2, 3, 9, 14, 19, 24, 29, 34, 39, 44, 49]),
        (6, [0, 1, 2, 3, 9, 16, 23, 30, 37, 44]),
    ],
)
def test_trajectory_that_always_passes_computes_these_steps(max_skip: int, steps: list[int]) -> None:
    """The cap sleeps until five decisions are taken: the first run of reuses is 5 long whatever it is."""
    schedule = Schedule([50.0 - k for k in range(51)])
    result = sample(CONSTANT, torch.randn(2, 8, dtype=torch.float64), schedule, solver="euler", skip=AdaptiveSkip(0.01, max_skip))
    assert computed(result) == steps
    assert result.nfe == len(steps)


@pytest.mark.parametrize("threshold", [0.004, 0.01, 0.05])
@pytest.mark.parametrize("side", [-1, 1])
def test_geometric_changes_pass_between_two_ratios(threshold: float, side: int) -> None:
    """d_k = r^k passes iff (1 - r)^2 / (2 r) <= threshold: 13 calls of 50 just inside, 50 just outside."""
    edge = 1 + threshold + side * math.sqrt(2 * threshold + threshold**2)
    if threshold == 0.01:
        assert edge == pytest.approx(1.151774 if side > 0 else 0.868226, abs=1e-6)
    for ratio, calls in ((edge * (1 - side * 1e-4), 13), (edge * (1 + side * 1e-4), 50)):
        changes = [ratio**k for k in range(1, 51)]
        levels = [sum(changes[k:]) for k in range(51)]
        result = sample(CONSTANT, torch.zeros(1, 4, dtype=torch.float64), Schedule(levels), solver="euler", skip=AdaptiveSkip(threshold))
        assert result.nfe == calls


@pytest.mark.parametrize("schedule", [Schedule.karras(40, 0.05, 40.0), Schedule.scaled_linear(40)], ids=["karras", "uniform"])
def test_space_noise_takes_the_grid_out_of_the_rule(schedule: Schedule) -> None:
    """A prediction that is constant, or on a line that is continued, passes on every grid; one that bends is judged by its mean."""
    levels, rule = schedule.sigmas.tolist(), AdaptiveSkip(1e-6, space="noise", reuse="extrapolate")
    noise = torch.randn(2, 8, dtype=torch.float64)
    assert sample(CONSTANT, noise, schedule, solver="euler", skip=rule).skipped.sum() == 40 - 11
    lengths = [high - low for high, low in pairwise(levels)]

    def bent(sigma: Tensor) -> Tensor:
        return 0.4 + 0.3 * torch.tanh(sigma.log())

    result = sample(given_noise(bent), noise, schedule, solver="euler", skip=AdaptiveSkip(2e-3, 2, space="noise"))
    n, mask, reused, cached = {}, [], [], 0.0
    for k, (sigma, h) in enumerate(zip(levels, lengths, strict=False)):
        reused.append(k > 3 and not mask[-1])
        n[k + 1] = cached = cached if reused[-1] else float(bent(torch.tensor(sigma, dtype=torch.float64)))
        if k >= 3:
            passes = h * abs((n[k + 1] + n[k - 1]) / 2 - n[k]) <= 2e-3 * n[k]
            mask.append((len(mask) > 4 and not any(mask[-2:])) or not passes)
    assert result.skipped.tolist() == reused
    assert 0 < sum(reused) < 36


def plainly(denoiser: Callable[..., Tensor], x: Tensor, levels: list[float], rule: AdaptiveSkip) -> list[bool]:
    """Which Euler steps reuse: the rule's index semantics with lists and plain tensors in x's dtype, differences taken before rounding."""
    latents, noises, mask, reused, d = [], [], [], [], {}
    for n, (sigma, sigma_next) in enumerate(pairwise(levels)):
        reused.append(n > (3 if rule.mode == "official" else 2) and not mask[-1])
        if reused[-1]:
            (last, noise), (at, older) = noises[-1], noises[0]
            if rule.reuse == "extrapolate" and len(noises) == 2:
                noise = older + (sigma - at) / (last - at) * (noise - older)
            error = sigma * noise
        else:
            error = x - denoiser(x, x.new_full((len(x),), sigma))
            noises = [*noises[-1:], (sigma, error / sigma)]
        move, latents = (sigma_next - sigma) / sigma * error, [*latents[-2:], x]
        x, d[n + 1] = x + move, move.abs().double().mean()
        if rule.mode == "official" and n >= 3:
            passes = abs((d[n + 1] + d[n - 1]) / 2 - d[n]) <= rule.threshold * d[n]
            capped = len(mask) > 4
        elif rule.mode == "tensor" and n >= 2:
            third = move - 2 * (latents[2] - latents[1]) + (latents[1] - latents[0])
            passes = third.abs().double().mean() <= rule.threshold * d[n + 1]
            capped = len(mask) >= rule.max_skip
        else:
            continue
        mask.append((capped and not any(mask[-rule.max_skip :])) or not passes)
    return reused


@pytest.mark.parametrize("grid", ["karras", "uniform"])
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("reuse", ["hold", "extrapolate"])
@pytest.mark.parametrize(("mode", "thresholds"), [("official", (1e-3, 1e-4)), ("tensor", (1e-2, 1e-3))])
@pytest.mark.parametrize(("batch", "dtype", "max_skip"), [(1, torch.float32, 4), (3, torch.float64, 7), (64, torch.float32, 4)])
def test_a_thousand_steps_decide_as_the_plain_rule(
    batch: int, dtype: torch.dtype, max_skip: int, mode: str, thresholds: tuple[float, float], reuse: str, per_sample: bool, grid: str
) -> None:
    """In float32 at thresholds above what rounding does to so short steps: 1e-5 of them."""
    schedule = Schedule.karras(1000, 0.01, 80.0) if grid == "karras" else Schedule([10.0 - 0.01 * k for k in range(1001)])
    rule = AdaptiveSkip(thresholds[dtype == torch.float64], max_skip, mode=mode, reuse=reuse, per_sample=per_sample)
    noise, levels = torch.randn(batch, 24, dtype=dtype), schedule.sigmas.tolist()
    skipped = sample(two_points, noise, schedule, solver="euler", skip=rule).skipped
    # Of 64 samples three: the plain rule takes them one at a time.
    for rows in [[i] for i in sorted({0, batch // 2, batch - 1})] if per_sample else [range(batch)]:
        expected = plainly(two_points, noise[rows] * levels[0], levels, rule)
        assert (skipped[:, rows[0]] if per_sample else skipped).tolist() == expected
        assert 100 < sum(expected) < 990


def test_with_constant_noise_the_changes_are_those_of_the_grid() -> None:
    levels = Schedule.karras(50, 0.002, 80.0).sigmas.tolist()
    x, noise, state = torch.zeros(1, 64, dtype=torch.float64), torch.full((1, 64), 0.3, dtype=torch.float64), None
    state = torch.zeros(1, STATE_WIDTH, dtype=torch.float64)
    for sigma, sigma_next in pairwise(levels):
        x, _, _, state = ops.solver_step(x, sigma, sigma_next, newest=noise, state=state, mode="official")
        assert state[0, D2].item() == pytest.approx(0.3 * (sigma - sigma_next), rel=1e-12)


@pytest.mark.parametrize("solver", ["euler", "heun", "dpmpp_2m"])
def test_a_threshold_never_met_changes_nothing(solver: str) -> None:
    noise, schedule = torch.randn(3, 16), Schedule.karras(20, 0.05, 80.0)
    plain = sample(two_points, noise, schedule, solver=solver)
    kept = sample(two_points, noise, schedule, solver=solver, skip=AdaptiveSkip(0.0, reuse="extrapolate"))
    assert not kept.skipped.any()
    assert kept.nfe == plain.nfe
    assert torch.equal(kept.samples, plain.samples)


def held_loop(x: Tensor, schedule: Schedule, skipped: list[bool], heun: bool) -> Tensor:
    def noise_at(x: Tensor, sigma: float) -> Tensor:
        return (x - two_points(x, x.new_full((len(x),), sigma))) / sigma

    last = None
    for (sigma, sigma_next), skip in zip(pairwise(schedule.sigmas.tolist()), skipped, strict=True):
        slope = last if skip else noise_at(x, sigma)
        last = slope
        if heun and sigma_next > 0 and not skip:
            last = noise_at(x + (sigma_next - sigma) * slope, sigma_next)
            slope = (slope + last) / 2
        x = x + (sigma_next - sigma) * slope
    return x


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("skip", [FixedSkip(3), AdaptiveSkip(0.05)])
def test_hold_repeats_the_last_noise_prediction_for_whole_steps(solver: str, skip: AdaptiveSkip | FixedSkip) -> None:
    noise, schedule = torch.randn(3, 16, dtype=torch.float64), Schedule.karras(20, 0.05, 80.0)
    result = sample(two_points, noise, schedule, solver=solver, skip=skip)
    skipped = result.skipped.tolist()
    assert any(skipped)
    torch.testing.assert_close(result.samples, held_loop(noise * 80.0, schedule, skipped, solver == "heun"))
    calls = sum(1 if solver == "euler" or k == 19 else 2 for k in range(20) if not skipped[k])
    assert result.nfe == calls


def in_sigma(sigma: Tensor) -> Tensor:
    return 0.4 + 0.02 * sigma


def in_log_sigma(sigma: Tensor) -> Tensor:
    return 0.4 - 0.1 * sigma.log()


@pytest.mark.parametrize(
    ("solver", "line", "skip"),
    [
        ("euler", in_sigma, AdaptiveSkip(0.5, reuse="extrapolate")),
        ("heun", in_sigma, AdaptiveSkip(0.5, reuse="extrapolate", per_sample=True)),
        ("heun", in_sigma, FixedSkip(4, reuse="extrapolate")),
        ("dpmpp_2m", in_log_sigma, AdaptiveSkip(0.5, reuse="extrapolate", mode="tensor", per_sample=True)),
    ],
)
def test_extrapolation_is_exact_for_noise_linear_in_the_solvers_variable(
    solver: str, line: Callable[[Tensor], Tensor], skip: AdaptiveSkip | FixedSkip
) -> None:
    noise, schedule, denoiser = torch.randn(3, 8, dtype=torch.float64), Schedule.karras(20, 0.05, 20.0), given_noise(line)
    plain = sample(denoiser, noise, schedule, solver=solver).samples
    result = sample(denoiser, noise, schedule, solver=solver, skip=skip)
    assert result.skipped.any()
    torch.testing.assert_close(result.samples, plain)
    held = sample(denoiser, noise, schedule, solver=solver, skip=replace(skip, reuse="hold"))
    assert (held.samples - plain).abs().max() > 1e-3


def test_one_value_to_go_by_is_held() -> None:
    noise, schedule, denoiser = torch.randn(3, 8, dtype=torch.float64), Schedule([3.0, 2.0, 1.0]), given_noise(in_sigma)
    extrapolated, held = (
        sample(denoiser, noise, schedule, solver="euler", skip=FixedSkip(2, reuse=reuse)).samples for reuse in ("extrapolate", "hold")
    )
    assert torch.equal(extrapolated, held)


@pytest.mark.parametrize("solver", ["euler", "heun", "dpmpp_2m"])
@pytest.mark.parametrize("mode", ["official", "tensor"])
@pytest.mark.parametrize("reuse", ["hold", "extrapolate"])
def test_per_sample_is_every_sample_alone(solver: str, mode: str, reuse: str) -> None:
    generator = torch.Generator().manual_seed(3)
    noise, place = torch.randn(4, 64, generator=generator), torch.tensor([0.05, 0.5, 1.0, 3.0])
    schedule = Schedule.karras(30, 0.05, 40.0)
    rule = AdaptiveSkip(0.03 if mode == "official" else 0.1, mode=mode, per_sample=True, reuse=reuse)
    recorder = Recorder(two_points)
    together = sample(recorder, noise, schedule, solver=solver, conditioning={"place": place}, skip=rule)
    assert together.skipped.shape == (30, 4)
    assert together.nfe == len(recorder.calls)
    assert together.nfe_per_sample.sum() == sum(len(x) for x, _, _ in recorder.calls)
    assert len(set(together.nfe_per_sample.tolist())) > 1
    for i in range(4):
        alone = sample(two_points, noise[i : i + 1], schedule, solver=solver, conditioning={"place": place[i : i + 1]}, skip=rule)
        assert torch.equal(together.samples[i : i + 1], alone.samples)
        assert torch.equal(together.skipped[:, i : i + 1], alone.skipped)
        assert together.nfe_per_sample[i] == alone.nfe


def test_per_sample_gathers_conditioning_under_guidance() -> None:
    noise, place = torch.randn(3, 64), torch.tensor([0.05, 1.0, 3.0])
    recorder = Recorder(two_points)
    sample(
        recorder,
        noise,
        Schedule.karras(30, 0.05, 40.0),
        solver="euler",
        conditioning={"place": place},
        unconditional={"place": -2 * place},
        guidance=2.0,
        skip=AdaptiveSkip(0.03, per_sample=True),
    )
    sizes = {len(x) for x, _, _ in recorder.calls}
    assert sizes - {6}
    for x, _, given_ in recorder.calls:
        conditional, unconditional = given_["place"].chunk(2)
        assert torch.equal(x[: len(x) // 2], x[len(x) // 2 :])
        assert torch.equal(unconditional, -2 * conditional)


class HostTensor:
    """A tensor on the CPU that notes how it is sent."""

    def __init__(self) -> None:
        self.done: list[str] = []

    def pin_memory(self) -> HostTensor:
        self.done.append("pinned")
        return self

    def to(self, device: torch.device, non_blocking: bool) -> HostTensor:
        self.done.append(f"sent to {device.type}, non_blocking={non_blocking}")
        return self


@pytest.mark.parametrize(("device", "before"), [("cpu", []), ("cuda", ["pinned"])])
def test_what_a_gpu_reads_is_pinned(device: str, before: list[str]) -> None:
    assert to_device(HostTensor(), torch.device(device)).done == [*before, f"sent to {device}, non_blocking=True"]


def test_per_sample_sends_its_rows_that_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice in a step that gathers, whatever the conditioning: which samples compute, and where each finds its row."""
    sent = []

    def spy(value: Tensor, device: torch.device) -> Tensor:
        sent.append(value.tolist())
        return to_device(value, device)

    for module in (trajectory, prediction):
        monkeypatch.setattr(module, "to_device", spy)
    place = torch.tensor([0.05, 1.0, 3.0])
    conditioning = {"conditioning": {"place": place}, "unconditional": {"place": -place}, "guidance": 2.0}
    schedule, rule = Schedule.karras(30, 0.05, 40.0), AdaptiveSkip(0.03, per_sample=True)
    skipped = sample(two_points, torch.randn(3, 64), schedule, solver="euler", **conditioning, skip=rule).skipped
    expected = []
    for step in skipped[skipped.any(1) & ~skipped.all(1)]:
        computed = (~step).nonzero()[:, 0].tolist()
        expected += [[computed.index(i) if i in computed else -1 for i in range(3)], computed]
    assert sent == expected != []


@pytest.mark.parametrize("mode", ["official", "tensor"])
def test_every_call_starts_afresh(mode: str) -> None:
    rule, schedule = AdaptiveSkip(0.05, mode=mode), Schedule.karras(25, 0.05, 40.0)
    first, other = torch.randn(2, 16), torch.randn(5, 3, 4)
    before = sample(two_points, first, schedule, skip=rule)
    sample(two_points, other, Schedule.karras(7, 0.05, 40.0), skip=rule, solver="dpmpp_2m")
    after = sample(two_points, first, schedule, skip=rule)
    assert before.skipped.any()
    assert torch.equal(before.skipped, after.skipped)
    assert torch.equal(before.samples, after.samples)


@pytest.mark.parametrize("solver", ["heun", "dpmpp_2m"])
@pytest.mark.parametrize("rule", [AdaptiveSkip(1e-9), AdaptiveSkip(1e-9, mode="tensor", per_sample=True, reuse="extrapolate", space="vp")])
def test_memory_does_not_grow_with_the_steps(solver: str, rule: AdaptiveSkip) -> None:
    def tensors_alive(steps: int) -> int:
        count = 0

        def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
            nonlocal count
            if sigma[0] < 0.09:
                gc.collect()
                count = sum(issubclass(type(item), Tensor) for item in gc.get_objects())
            return two_points(x, sigma)

        levels = [2.0 - 1.9 * k / (steps - 1) for k in range(steps)]
        sample(denoiser, torch.randn(2, 4), Schedule([*levels, 0.08, 0.0]), solver=solver, skip=rule)
        return count

    short = tensors_alive(12)
    assert tensors_alive(400) == short > 0


@pytest.mark.parametrize("every", [1, 2, 3, 7])
def test_fixed_skip_computes_every_so_many_steps(every: int) -> None:
    result = sample(two_points, torch.randn(2, 8), Schedule.karras(50, 0.02, 80.0), solver="euler", skip=FixedSkip(every))
    assert computed(result) == list(range(0, 50, every))


@pytest.mark.parametrize("rule", [AdaptiveSkip(0.1), AdaptiveSkip(2.0, mode="tensor", space="vp", per_sample=True, reuse="extrapolate")])
def test_sixteen_bit_trajectories_stay_sixteen_bit(rule: AdaptiveSkip) -> None:
    result = sample(two_points, torch.randn(4, 64).bfloat16(), Schedule.karras(30, 0.05, 20.0), skip=rule)
    assert result.samples.dtype == torch.bfloat16
    assert result.skipped.any()


@pytest.mark.parametrize("threshold", [np.float32(0.25), Fraction(1, 4)])
def test_any_real_number_is_a_threshold(threshold: Real) -> None:
    assert AdaptiveSkip(threshold) == AdaptiveSkip(0.25)
    results = [
        sample(two_points, torch.ones(2, 8), Schedule.karras(20, 0.05, 40.0), skip=AdaptiveSkip(t)).samples for t in (threshold, 0.25)
    ]
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"threshold": -0.1}, ValueError, "threshold must be finite and not negative, got -0.1"),
        ({"threshold": math.nan}, ValueError, "threshold must be finite"),
        ({"threshold": "0.1"}, TypeError, "threshold must be a number, got str"),
        ({"max_skip": 0}, ValueError, "max_skip must be at least 1, got 0"),
        ({"max_skip": 2.0}, TypeError, "max_skip must be an int, got float"),
        ({"mode": "exact"}, ValueError, "mode must be one of 'official', 'tensor', got 'exact'"),
        ({"per_sample": 1}, TypeError, "per_sample must be a bool, got int"),
        ({"reuse": "drop"}, ValueError, "reuse must be one of 'hold', 'extrapolate', got 'drop'"),
        ({"space": "vpx"}, ValueError, "space must be one of 've', 'vp', 'noise', got 'vpx'"),
        ({"space": "noise", "mode": "tensor"}, ValueError, "space 'noise' needs mode 'official', got 'tensor'"),
    ],
)
def test_bad_rules_are_named(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        AdaptiveSkip(**arguments)


def test_bad_fixed_rules_are_named() -> None:
    with pytest.raises(ValueError, match="every must be at least 1"):
        FixedSkip(0)
    with pytest.raises(ValueError, match="reuse must be one of"):
        FixedSkip(2, reuse="drop")
