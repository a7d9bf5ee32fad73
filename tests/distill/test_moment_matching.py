"""Moment matching: Gaussian fixed points in closed form, the two losses' gradients, the sampler."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff_kernels import ops
from fastdiff_kernels.diffusion import edm_weight
from fastdiff_kernels.distill import LearningRate, MomentMatchingDistiller

from ..ops.normals import orthonormal


def fixed_point(c, sigma_t, sigma_s):
    """The A for which x~ = A z_t has the teacher's E[x | z_s], data N(0, c^2)."""
    v, r = c**2 + sigma_t**2, (sigma_s / sigma_t) ** 2
    root = ((r * v + c**2 * (1 - r)) ** 2 + 4 * c**2 * (1 - r) ** 2 * sigma_t**2) ** 0.5
    return (-(r * v - c**2 * (1 - r)) + root) / (2 * (1 - r) * v)


def student_moment(a, c, sigma_t, sigma_s):
    """kappa_g of E_g[x~ | z_s] = kappa_g z_s."""
    v, r = c**2 + sigma_t**2, (sigma_s / sigma_t) ** 2
    m = (1 - r) * a + r
    return a * m * v / (m**2 * v + sigma_s**2 * (1 - r))


@pytest.mark.parametrize(("levels", "expected"), [((1, 3, 0.5), 0.3425247), ((0.5, 80, 1), 0.00619), ((0.5, 0.8, 0.75), 0.30760)])
def test_printed_fixed_points(levels, expected):
    assert fixed_point(*levels) == pytest.approx(expected, abs=5e-6)


@pytest.mark.parametrize(("c", "sigma_t"), [(1.0, 3.0), (0.5, 80.0)])
def test_limits_of_the_fixed_point(c, sigma_t):
    assert fixed_point(c, sigma_t, 0.9999 * sigma_t) == pytest.approx(c**2 / (c**2 + sigma_t**2), rel=1e-2)
    assert fixed_point(c, sigma_t, 1e-6) == pytest.approx((c**2 + (c**4 + 4 * c**2 * sigma_t**2) ** 0.5) / (2 * (c**2 + sigma_t**2)))


@pytest.mark.parametrize("levels", [(1.0, 3.0, 0.5), (0.5, 0.8, 0.6), (0.7, 5.0, 1.0), (2.0, 1.0, 0.3)])
def test_losses_vanish_in_gradient_exactly_at_the_fixed_point(levels):
    c, sigma_t, sigma_s = levels
    count = 200_000
    rng = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(count, 1, dtype=torch.float64, generator=rng) for _ in range(2))
    noisy = c * clean + sigma_t * noise
    kappa = c**2 / (c**2 + sigma_s**2)
    slopes = []
    for factor in (0.8, 1.0, 1.2):
        a = torch.tensor(factor * fixed_point(*levels), dtype=torch.float64, requires_grad=True)
        sample = a * noisy
        z = ops.posterior_sample(sample.detach(), noisy, sigma_s, sigma_t, 7)
        # the regularised auxiliary's optimum is half way between the student's expectation and the teacher's
        h = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
        (slope_0,) = torch.autograd.grad(ops.moment_matching_auxiliary_loss(sample.detach(), h * z, kappa * z).mean(), h)
        h = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
        (slope_1,) = torch.autograd.grad(ops.moment_matching_auxiliary_loss(sample.detach(), h * z, kappa * z).mean(), h)
        optimum = (-slope_0 / (slope_1 - slope_0)).item()
        assert optimum == pytest.approx((student_moment(a.item(), *levels) + kappa) / 2, rel=0.01)
        (slope,) = torch.autograd.grad(ops.moment_matching_loss(sample, optimum * z, kappa * z).mean(), a)
        slopes.append(slope.item())
    assert slopes[0] < 0 < slopes[2]
    assert abs(slopes[1]) < 0.05 * min(-slopes[0], slopes[2])


@settings(max_examples=25, deadline=None, derandomize=True)
@given(c=st.floats(0.2, 2.0), sigma_t=st.floats(0.1, 20.0), share=st.floats(0.05, 0.95))
def test_losses_of_any_gaussian_have_the_fixed_point_in_closed_form(c, sigma_t, share):
    """With exact moments instead of samples: data N(0, c^2), student x~ = A z_t, posterior noise of its own."""
    sigma_s, ratio = share * sigma_t, share**2
    variance, kappa = c**2 + sigma_t**2, c**2 / (c**2 + sigma_s**2)
    noisy, noise = orthonormal(16, 1, 1)
    noisy, noise = variance**0.5 * noisy, sigma_s * (1 - ratio) ** 0.5 * noise
    for factor in (0.5, 1.0, 2.0):
        a = torch.tensor(factor * fixed_point(c, sigma_t, sigma_s), dtype=torch.float64, requires_grad=True)
        sample = a * noisy
        z = (ratio * noisy + (1 - ratio) * sample + noise).detach()
        optimum = (student_moment(a.item(), c, sigma_t, sigma_s) + kappa) / 2
        h = torch.tensor(optimum, dtype=torch.float64, requires_grad=True)
        (at_optimum,) = torch.autograd.grad(ops.moment_matching_auxiliary_loss(sample.detach(), h * z, kappa * z).mean(), h)
        assert at_optimum.item() == pytest.approx(0, abs=1e-9 * z.square().mean().item())
        (slope,) = torch.autograd.grad(ops.moment_matching_loss(sample, optimum * z, kappa * z).mean(), a)
        gap = optimum - kappa
        assert slope.item() == pytest.approx(gap * (noisy * z).mean().item(), rel=1e-9, abs=1e-9)
        assert abs(gap) < 1e-6 * kappa if factor == 1 else gap * (factor - 1) > 0


@pytest.mark.parametrize("shared_batch", [False, True])
@pytest.mark.parametrize("levels", [(1.0, 3.0, 0.5), (0.5, 0.8, 0.6)])
def test_training_reaches_the_fixed_point(linear_denoiser, levels, shared_batch, monkeypatch):
    c, sigma_t, sigma_s = levels
    kappa = c**2 / (c**2 + sigma_s**2)
    steps = 120 if shared_batch else 240
    distiller = MomentMatchingDistiller(
        linear_denoiser(kappa), num_steps=2, learning_rate=LearningRate(0.05, "linear", steps), shared_batch=shared_batch
    )
    monkeypatch.setattr(distiller, "_draw_levels", lambda count: (torch.full((count,), sigma_s), torch.full((count,), sigma_t)))
    expected = fixed_point(*levels)
    with torch.no_grad():
        distiller.student.k.fill_(0.5 * expected)
    rng = torch.Generator().manual_seed(0)
    for _ in range(steps):
        distiller.step(c * torch.randn(4096, 1, dtype=torch.float64, generator=rng))
    assert distiller.generator.k.item() == pytest.approx(expected, rel=0.03)


def test_a_gaussian_student_keeps_the_data_law_over_its_steps(gaussian_denoiser):
    teacher = gaussian_denoiser(0.6, 0.5)
    distiller = MomentMatchingDistiller(teacher, num_steps=4, learning_rate=LearningRate(0.03, "linear", 200), shared_batch=True)
    rng = torch.Generator().manual_seed(0)
    before = MomentMatchingDistiller(teacher, num_steps=4, sample_shape=(1,)).sample(20_000)
    for _ in range(200):
        distiller.step(0.6 + 0.5 * torch.randn(1024, 1, dtype=torch.float64, generator=rng))
    samples = distiller.sample(20_000)
    assert samples.mean().item() == pytest.approx(0.6, abs=0.08)
    # the teacher's own posterior means are too narrow in four steps; the student's are not
    assert abs(samples.std().item() - 0.5) < 0.5 * abs(before.std().item() - 0.5)


@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
def test_time_map(tiny_denoiser, sigma_data):
    distiller = MomentMatchingDistiller(tiny_denoiser(), num_steps=4, sigma_data=sigma_data, sigma_min=0.02, sigma_max=80.0)
    sigma = distiller.sigma(torch.tensor([0.0, 0.25, 0.5, 1.0]))
    angle = torch.tensor(80.0 / sigma_data).atan()
    expected = torch.stack([torch.tensor(0.02), *(sigma_data * (t * angle).tan() for t in (0.25, 0.5)), torch.tensor(80.0)])
    torch.testing.assert_close(sigma, expected)
    assert sigma.dtype == torch.float32


@pytest.mark.parametrize("num_steps", [1, 3, 8])
def test_levels_of_a_training_pair(tiny_denoiser, num_steps):
    distiller = MomentMatchingDistiller(tiny_denoiser(), num_steps=num_steps, sigma_min=0.02)
    sigma_s, sigma_t = distiller._draw_levels(5000)
    assert (sigma_s >= 0.02).all()
    assert (sigma_s <= sigma_t).all()
    assert (sigma_t <= 80).all()
    time_s, time_t = ((sigma.double() / 0.5).atan() / torch.tensor(160.0).double().atan() for sigma in (sigma_s, sigma_t))
    assert (time_t - time_s).max() < 1 / num_steps + 1e-4
    inner = time_s > 0.05
    assert torch.histc(time_s[inner], 5, 0.05, 1).sub(inner.sum() / 5).abs().max() < 200


def test_turns_alternate(tiny_denoiser):
    distiller = MomentMatchingDistiller(tiny_denoiser(), num_steps=2)
    data = torch.randn(4, 1, 4, 4)
    for turn, (mover, other) in enumerate([("auxiliary", "student"), ("student", "auxiliary")] * 2):
        before = {name: [p.clone() for p in getattr(distiller, name).parameters()] for name in ("auxiliary", "student", "teacher")}
        metrics = distiller.step(data)
        still = {name: all(map(torch.equal, old, getattr(distiller, name).parameters())) for name, old in before.items()}
        assert still == {mover: False, other: True, "teacher": True}, turn
        assert ("loss" in metrics) == (mover == "student")
        assert ("auxiliary_loss" in metrics) == (mover == "auxiliary")


def test_posterior_noise_is_fresh_in_every_step(linear_denoiser, monkeypatch):
    distiller = MomentMatchingDistiller(linear_denoiser(0.0), num_steps=2, learning_rate=1e-9)
    monkeypatch.setattr(distiller, "_draw_levels", lambda count: (torch.full((count,), 0.5), torch.full((count,), 1.0)))
    monkeypatch.setattr(distiller, "_randn", lambda shape: torch.zeros(shape, dtype=torch.float64))
    seen = []
    distiller.teacher.register_forward_hook(lambda _, args, output: seen.append(args[0]))
    for _ in range(3):
        distiller.step(torch.zeros(100, 2, dtype=torch.float64))
    # with x~ and z_t zero, z_s is the posterior's noise alone: standard deviation sigma_s sqrt(1 - r)
    assert torch.cat(seen).std().item() == pytest.approx(0.5 * 0.75**0.5, rel=0.1)
    correlations = torch.corrcoef(torch.stack([z.flatten() for z in seen])) - torch.eye(3)
    assert correlations.abs().max() < 0.3


def test_auxiliary_that_is_the_teacher_gives_the_student_no_gradient(tiny_denoiser):
    distiller = MomentMatchingDistiller(tiny_denoiser(), num_steps=2)
    distiller.steps_done = 1
    metrics = distiller.step(torch.randn(4, 1, 4, 4))
    assert metrics["gap"] == metrics["gradient_norm"] == metrics["loss"] == 0.0


def test_student_direction_is_weight_times_gap_and_ignores_z(tiny_denoiser):
    distiller = MomentMatchingDistiller(tiny_denoiser(dtype=torch.float64), num_steps=2, clip=None, learning_rate=1e-6)
    distiller.auxiliary.load_state_dict(tiny_denoiser(1, dtype=torch.float64).state_dict())
    seen = {}
    for name in ("student", "teacher", "auxiliary"):
        getattr(distiller, name).register_forward_hook(lambda _, args, output, name=name: seen.update({name: (args, output)}))
    distiller.steps_done = 1
    distiller.step(torch.randn(3, 1, 4, 4, dtype=torch.float64))
    (noisy, sigma_t), _ = seen["student"]
    (_, sigma_s), teacher = seen["teacher"]
    direction = (seen["auxiliary"][1] - teacher) * edm_weight(sigma_s.double()).sqrt().view(-1, 1, 1, 1) / noisy.numel()
    student = tiny_denoiser(dtype=torch.float64)
    expected = torch.autograd.grad(student(noisy, sigma_t), list(student.parameters()), direction)
    for gradient, parameter in zip(expected, distiller.student.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_sampler_visits_its_levels_and_returns_the_last_prediction(tiny_denoiser, num_steps):
    distiller = MomentMatchingDistiller(tiny_denoiser(), num_steps=num_steps, sample_shape=(1, 4, 4), sigma_max=40.0)
    calls = []
    distiller.generator.register_forward_hook(lambda _, args, kwargs, output: calls.append((args[1], kwargs, output)), with_kwargs=True)
    labels = torch.tensor([0, 2])
    samples = distiller.sample(2, {"class_labels": labels})
    expected = distiller.sigma(torch.arange(num_steps, 0, -1) / num_steps)
    for level, (sigma, _, _) in zip(expected, calls, strict=True):
        torch.testing.assert_close(sigma, level.expand(2))
    assert calls[0][0].tolist() == pytest.approx([40.0, 40.0])
    assert all(kwargs["class_labels"] is labels for _, kwargs, _ in calls)
    assert torch.equal(samples, calls[-1][2])
    assert torch.equal(distiller.sample(2, {"class_labels": labels}), samples)
    assert distiller.sample(0).shape == (0, 1, 4, 4)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_steps": 0}, ValueError, "num_steps must be at least 1, got 0"),
        ({"num_steps": 2.0}, TypeError, "num_steps must be an int, got float"),
        ({"variant": "parameter"}, ValueError, "variant must be 'alternating' .*, is not implemented; got 'parameter'"),
        ({"shared_batch": "no"}, TypeError, "shared_batch must be a bool, got str"),
        ({"sigma_min": 0.0}, ValueError, "sigma_min must be finite and > 0"),
        ({"sigma_max": 0.001}, ValueError, "sigma_max must be finite and > 0.002"),
    ],
)
def test_bad_arguments(tiny_denoiser, options, error, message):
    with pytest.raises(error, match=message):
        MomentMatchingDistiller(tiny_denoiser(), **{"num_steps": 2, **options})


def test_bad_batches(tiny_denoiser):
    distiller = MomentMatchingDistiller(tiny_denoiser(), num_steps=2)
    with pytest.raises(ValueError, match="sample_shape must be given"):
        distiller.sample(2)
    with pytest.raises(TypeError, match="batch must be a tensor of clean data"):
        distiller.step(8)
    with pytest.raises(ValueError, match="batch must hold at least one sample"):
        distiller.step(torch.zeros(0, 1, 4, 4))
