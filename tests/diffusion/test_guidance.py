"""Guidance: the formula inside every solver, one doubled call, and what conditioning may look like."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastdiff_kernels.diffusion import AdaptiveSkip, Schedule, sample

from .oracles import Recorder, two_points

SOLVERS = ["euler", "ddim", "heun", "dpmpp_2m"]
SCHEDULE = Schedule.karras(8, 0.05, 20.0)


def places(batch: int) -> tuple[Tensor, Tensor]:
    return torch.linspace(0.5, 1.5, batch, dtype=torch.float64), torch.full((batch,), 0.2, dtype=torch.float64)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("guidance", [0.0, 0.5, 2.5])
@pytest.mark.parametrize("skip", [None, AdaptiveSkip(0.2, per_sample=True, reuse="extrapolate")])
def test_guided_sampling_is_sampling_of_the_guided_denoiser(solver: str, guidance: float, skip: AdaptiveSkip | None) -> None:
    noise = torch.randn(3, 16, dtype=torch.float64)
    conditional, unconditional = places(3)

    def guided(x: Tensor, sigma: Tensor, place: Tensor, other: Tensor) -> Tensor:
        uncond = two_points(x, sigma, other)
        return uncond + guidance * (two_points(x, sigma, place) - uncond)

    expected = sample(guided, noise, SCHEDULE, solver=solver, conditioning={"place": conditional, "other": unconditional}, skip=skip)
    result = sample(
        two_points,
        noise,
        SCHEDULE,
        solver=solver,
        conditioning={"place": conditional},
        unconditional={"place": unconditional},
        guidance=guidance,
        skip=skip,
    )
    torch.testing.assert_close(result.samples, expected.samples)
    assert result.nfe == expected.nfe


@pytest.mark.parametrize("solver", SOLVERS)
def test_guidance_of_one_is_no_guidance_and_costs_no_more(solver: str) -> None:
    noise = torch.randn(3, 16)
    conditional, unconditional = ({"place": place.float()} for place in places(3))
    recorder = Recorder(two_points)
    result = sample(recorder, noise, SCHEDULE, solver=solver, conditioning=conditional, unconditional=unconditional, guidance=1)
    assert torch.equal(result.samples, sample(two_points, noise, SCHEDULE, solver=solver, conditioning=conditional).samples)
    assert {len(x) for x, _, _ in recorder.calls} == {3}


def test_one_call_holds_the_conditional_samples_and_then_the_unconditional_ones() -> None:
    noise = torch.randn(2, 16)
    conditional, unconditional = (place.float() for place in places(2))
    recorder = Recorder(lambda x, sigma, place, mode, strength: two_points(x, sigma, place))
    shared = {"mode": "fine", "strength": 0.5}
    result = sample(
        recorder,
        noise,
        Schedule([2.0, 1.0, 0.5]),
        solver="euler",
        conditioning={"place": conditional, **shared},
        unconditional={"place": unconditional, **shared},
        guidance=3.0,
    )
    assert result.nfe == len(recorder.calls) == 2
    for x, sigma, given in recorder.calls:
        assert x.shape == (4, 16)
        assert torch.equal(x[:2], x[2:])
        assert sigma.shape == (4,)
        assert torch.equal(given["place"], torch.cat((conditional, unconditional)))
        assert given["mode"] == "fine"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"guidance": 2.0}, ValueError, "guidance 2.0 needs `unconditional`"),
        ({"guidance": math.nan, "unconditional": {}}, ValueError, "guidance must be finite"),
        ({"guidance": "2"}, TypeError, "guidance must be a number, got str"),
        ({"guidance": torch.tensor(2.0)}, TypeError, "guidance must be a number, got Tensor"),
        ({"conditioning": [1]}, TypeError, "conditioning must be a dict"),
        ({"conditioning": {"place": torch.ones(3)}}, ValueError, r"conditioning\['place'\] must have one row for each of the 2 samples"),
        ({"conditioning": {"place": torch.tensor(1.0)}}, ValueError, r"conditioning\['place'\] must have one row"),
        ({"conditioning": {"place": [1.0, 1.0]}}, TypeError, r"conditioning\['place'\] must be a tensor \[B, ...\] or a scalar, got list"),
        ({"unconditional": {"place": torch.ones(1)}, "guidance": 2.0}, ValueError, r"unconditional\['place'\] must have one row"),
        (
            {"conditioning": {"place": torch.ones(2)}, "unconditional": {}, "guidance": 2.0},
            ValueError,
            r"unconditional must have conditioning's keys \['place'\], got \[\]",
        ),
        (
            {"conditioning": {"place": torch.ones(2)}, "unconditional": {"place": torch.ones(2, 1)}, "guidance": 2.0},
            ValueError,
            r"unconditional\['place'\] must be like conditioning's, torch.float32 \[2\], got torch.float32 \[2, 1\]",
        ),
        (
            {"conditioning": {"place": torch.ones(2)}, "unconditional": {"place": None}, "guidance": 2.0},
            ValueError,
            r"unconditional\['place'\] can differ from conditioning's only where both are tensors",
        ),
        (
            {"conditioning": {"added": {"place": torch.ones(3)}}},
            ValueError,
            r"conditioning\['added'\]\['place'\] must have one row for each of the 2 samples",
        ),
        ({"conditioning": {"added": {"place": [1.0]}}}, TypeError, r"conditioning\['added'\]\['place'\] must be a tensor"),
        (
            {"conditioning": {"added": {"place": torch.ones(2)}}, "unconditional": {"added": {}}, "guidance": 2.0},
            ValueError,
            r"unconditional\['added'\] must have conditioning\['added'\]'s keys \['place'\], got \[\]",
        ),
        (
            {"conditioning": {"added": {"place": torch.ones(2)}}, "unconditional": {"added": None}, "guidance": 2.0},
            ValueError,
            r"unconditional\['added'\] can differ from conditioning's only where both are tensors",
        ),
        (
            {"conditioning": {"mode": "a"}, "unconditional": {"mode": "b"}, "guidance": 2.0},
            ValueError,
            r"unconditional\['mode'\] can differ",
        ),
    ],
)
def test_bad_guidance_and_conditioning_are_named(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sample(two_points, torch.ones(2, 16), SCHEDULE, **arguments)
