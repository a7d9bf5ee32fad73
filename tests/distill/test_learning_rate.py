from __future__ import annotations

import math

import pytest

from fastdiff_kernels.distill import LearningRate


def test_constant_after_warm_up():
    rate = LearningRate(0.4, warmup_steps=3)
    assert [rate(step) for step in (0, 1, 2, 3, 1000)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4])


def test_linear_decay_ends_at_final_and_stays():
    rate = LearningRate(1.0, "linear", total_steps=12, warmup_steps=2, final=0.5)
    assert rate(2) == 1.0
    assert rate(7) == pytest.approx(0.75)
    assert rate(12) == rate(100) == 0.5


@pytest.mark.parametrize("peak", [1e-3, 2.0])
def test_cosine_decay(peak):
    rate = LearningRate(peak, "cosine", total_steps=10)
    assert [rate(step) for step in (0, 5, 10)] == pytest.approx([peak, peak / 2, 0.0], abs=1e-12)
    assert rate(3) == pytest.approx(peak * (1 + math.cos(0.3 * math.pi)) / 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"peak": 0.0}, "peak must be finite and > 0"),
        ({"peak": float("nan")}, "peak must be finite"),
        ({"peak": 1.0, "decay": "exponential"}, "decay must be one of 'constant', 'linear', 'cosine', got 'exponential'"),
        ({"peak": 1.0, "decay": "linear"}, "total_steps must be given"),
        ({"peak": 1.0, "decay": "linear", "total_steps": 5, "warmup_steps": 5}, "total_steps must exceed warmup_steps=5"),
        ({"peak": 1.0, "warmup_steps": -1}, "warmup_steps must be at least 0"),
        ({"peak": 1.0, "final": -1.0}, "final must be finite and >= 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        LearningRate(**arguments)


def test_a_string_is_no_learning_rate():
    with pytest.raises(TypeError, match="peak must be a number, got str"):
        LearningRate("1e-3")
