"""Score implicit matching: the score-gradient theorem in closed form, and one-step generators found by it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff_kernels import ops
from fastdiff_kernels.distill import KarrasUniform, LearningRate, SIMDistiller

from .conftest import GaussianDenoiser

# generator x0 = a z + b, teacher N(mu, c0^2); the fake is exact, N(b, a^2)
CASES = [(0.8, 0.3, -0.5, 1.1, 0.7), (0.5, -0.2, 0.4, 0.9, 1.3), (1.6, 1.0, 0.2, 0.6, 0.4), (0.9, 0.0, 0.0, 1.2, 3.0)]


def gauss_hermite(points):
    """Nodes and weights of E f(z), z ~ N(0, 1)."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(points)
    return torch.from_numpy(nodes), torch.from_numpy(weights / weights.sum())


def expected_loss(gaussian_denoiser, case, distance, c, couple=True, points=80):
    """E[L_SIM] by quadrature over (z, eps), in score space with constant c and weight 1, and the parameters (a, b) it depends on."""
    a, b, mu, c0, sigma = case
    a, b = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (a, b))
    teacher, fake = gaussian_denoiser(mu, c0), gaussian_denoiser(b.detach(), a.detach())
    nodes, weights = gauss_hermite(points)
    z, noise = (grid.reshape(-1, 1) for grid in torch.meshgrid(nodes, nodes, indexing="ij"))
    clean = a * z + b
    noisy = clean + sigma * noise
    noisy = noisy if couple else noisy.detach()
    fake, teacher = (denoiser.requires_grad_(False)(noisy, sigma) for denoiser in (fake, teacher))
    # denoisers differ from scores by sigma^2: C = c sigma^2 and omega = 1/sigma^2, or 2/sigma^4 for |.|^2 with derivative 2 y
    scale = 2 / sigma**4 if distance == "l2" else 1 / sigma**2
    losses = ops.sim_loss(fake, teacher, clean, weight=scale, c=c * sigma**2, distance=distance)
    return (losses * torch.outer(weights, weights).flatten()).sum(), a, b


def theorem(case, distance, c):
    """d/da and d/db of the divergence with frozen sampling law: E_x[d'(y) 2a(x-b)/Vp^2] and E_x[d'(y)/Vp]."""
    a, b, mu, c0, sigma = case
    vp, vq = a**2 + sigma**2, c0**2 + sigma**2
    nodes, weights = gauss_hermite(200)
    x = b + vp**0.5 * nodes
    y = -(x - b) / vp + (x - mu) / vq
    derivative = 2 * y if distance == "l2" else y / (y**2 + c**2).sqrt()
    return (weights * derivative * 2 * a * (x - b) / vp**2).sum().item(), (weights * derivative / vp).sum().item()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("distance", "c"), [("l2", 0.0), ("pseudo_huber", 0.4), ("pseudo_huber", 1.5)])
def test_loss_is_zero_on_average_and_its_gradient_is_the_divergences(gaussian_denoiser, case, distance, c):
    loss, a, b = expected_loss(gaussian_denoiser, case, distance, c)
    found = [gradient.item() for gradient in torch.autograd.grad(loss, (a, b))]
    assert loss.item() == pytest.approx(0.0, abs=1e-5)
    assert found == pytest.approx(theorem(case, distance, c), rel=5e-3, abs=1e-6)
    assert max(map(abs, found)) > 1e-4


SPREAD, MEAN = st.floats(0.3, 3.0), st.floats(-2, 2)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(a=SPREAD, b=MEAN, mu=MEAN, c0=SPREAD, sigma=st.floats(0.3, 10.0))
def test_l2_gradients_of_any_gaussians_in_closed_form(a, b, mu, c0, sigma):
    """E[L] = 0, dE[L]/db = 2 (b - mu) / (Vp Vq), dE[L]/da = 4 a (1 / Vq - 1 / Vp) / Vp; four nodes are exact for its polynomials."""
    loss, *parameters = expected_loss(GaussianDenoiser, (a, b, mu, c0, sigma), "l2", 0.0, points=4)
    found = [gradient.item() for gradient in torch.autograd.grad(loss, parameters)]
    vp, vq = a**2 + sigma**2, c0**2 + sigma**2
    exact = [4 * a * (1 / vq - 1 / vp) / vp, 2 * (b - mu) / (vp * vq)]
    assert loss.item() == pytest.approx(0, abs=1e-9 / min(sigma, 1) ** 4)
    assert found == pytest.approx(exact, rel=1e-8, abs=1e-10 / min(sigma, 1) ** 4)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(a=SPREAD, b=MEAN, mu=MEAN, c0=SPREAD, sigma=st.floats(0.3, 10.0), width=st.floats(1.0, 5.0))
def test_pseudo_huber_gradients_of_any_gaussians_are_the_divergences(a, b, mu, c0, sigma, width):
    """The theorem's right-hand side by quadrature, a closed form being known for a mean shift alone; c such that the bend is resolved."""
    vp, vq = a**2 + sigma**2, c0**2 + sigma**2
    c = width * (vp**0.5 * abs(1 / vp - 1 / vq) + abs(b - mu) / vq + 1e-2)
    loss, *parameters = expected_loss(GaussianDenoiser, (a, b, mu, c0, sigma), "pseudo_huber", c)
    found = [gradient.item() for gradient in torch.autograd.grad(loss, parameters)]
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    assert found == pytest.approx(theorem((a, b, mu, c0, sigma), "pseudo_huber", c), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    ("distance", "c", "expected"), [("l2", 0.0, (-0.84027032, 0.83289953)), ("pseudo_huber", 0.4, (-0.39202783, 0.56500801))]
)
def test_printed_gradients(gaussian_denoiser, distance, c, expected):
    loss, a, b = expected_loss(gaussian_denoiser, CASES[0], distance, c)
    assert [gradient.item() for gradient in torch.autograd.grad(loss, (a, b))] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("distance", ["l2", "pseudo_huber"])
def test_without_the_networks_input_gradients_it_is_another_gradient(gaussian_denoiser, distance):
    whole, a, b = expected_loss(gaussian_denoiser, CASES[0], distance, 0.4)
    whole = torch.stack(torch.autograd.grad(whole, (a, b)))
    direct, a, b = expected_loss(gaussian_denoiser, CASES[0], distance, 0.4, couple=False)
    direct = torch.stack(torch.autograd.grad(direct, (a, b)))
    assert (whole - direct).norm() > 0.2 * whole.norm()


@pytest.mark.parametrize(
    ("dimension", "sigma", "c0", "c", "delta"), [(1, 0.7, 0.9, 0.4, 0.37), (5, 0.7, 0.9, 0.4, 0.37), (3, 2.0, 0.5, 0.1, -1.4)]
)
def test_distiller_on_a_pure_mean_shift(gaussian_denoiser, dimension, sigma, c0, c, delta):
    # d/db E[L] = Delta / (v sqrt(|Delta|^2 + c^2 v^2)), v = c0^2 + sigma^2; the loss is affine in the noise, so antithetic pairs are exact
    shift = delta * torch.linspace(1, 2, dimension, dtype=torch.float64)
    distiller = SIMDistiller(
        gaussian_denoiser(torch.zeros(dimension), c0), sample_shape=(dimension,), c=c * sigma**2, weight=lambda s: 1 / s.double() ** 2
    )
    distiller.fake = gaussian_denoiser(shift, c0)
    b = shift.clone().requires_grad_()
    z, noise = (torch.randn(1, dimension, dtype=torch.float64) for _ in range(2))
    clean = c0 * torch.cat([z, -z]) + b
    losses, _ = distiller.generator_losses(clean, torch.full((2,), sigma, dtype=torch.float64), torch.cat([noise, -noise]), {})
    (found,) = torch.autograd.grad(losses.mean(), b)
    v = c0**2 + sigma**2
    torch.testing.assert_close(found, shift / (v * (shift.square().sum() + (c * v) ** 2).sqrt()))
    if dimension == 1 and delta == 0.37:
        assert found.item() == pytest.approx(0.4459654, abs=1e-7)


def test_distiller_gradient_is_that_of_both_networks_inputs(tiny_denoiser):
    teacher = tiny_denoiser(0, dtype=torch.float64)
    distiller = SIMDistiller(teacher, sample_shape=(1, 4, 4), c=0.1, weight=lambda sigma: sigma)
    distiller.fake.load_state_dict(tiny_denoiser(1, dtype=torch.float64).state_dict())
    clean, noise = torch.randn(2, 1, 4, 4, dtype=torch.float64), torch.randn(2, 1, 4, 4, dtype=torch.float64)
    sigma, labels = torch.tensor([0.3, 1.2], dtype=torch.float64), {"class_labels": torch.tensor([0, 2])}

    def losses(x):
        return distiller.generator_losses(x, sigma, noise, labels)[0]

    (found,) = torch.autograd.grad(losses(clean.requires_grad_()).sum(), clean)
    direction = torch.randn_like(clean)
    with torch.no_grad():
        difference = (losses(clean + 1e-5 * direction) - losses(clean - 1e-5 * direction)).sum() / 2e-5
    assert (found * direction).sum().item() == pytest.approx(difference.item(), rel=1e-6)


def test_l2_weight_is_divided_by_the_deviation_from_the_teacher(tiny_denoiser):
    distiller = SIMDistiller(tiny_denoiser(0), sample_shape=(1, 4, 4), distance="l2", weight=lambda sigma: 3 * sigma)
    distiller.fake.load_state_dict(tiny_denoiser(1).state_dict())
    clean, noise, sigma = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4), torch.tensor([0.3, 1.2])
    losses, gap = distiller.generator_losses(clean, sigma, noise, {})
    noisy = clean + sigma.view(2, 1, 1, 1) * noise
    fake, teacher = distiller.fake(noisy, sigma), distiller.teacher(noisy, sigma)
    expected = -3 * sigma * ((fake - teacher) * (fake - clean)).sum((1, 2, 3)) / (clean - teacher).abs().mean((1, 2, 3))
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(gap, (fake - teacher).square().mean())


def test_generator_step_leaves_fake_and_teacher_without_gradients(tiny_denoiser):
    distiller = SIMDistiller(tiny_denoiser(), sample_shape=(1, 4, 4))
    clean = torch.randn(2, 1, 4, 4, requires_grad=True)
    losses, _ = distiller.generator_losses(clean, torch.ones(2), torch.randn(2, 1, 4, 4), {})
    losses.sum().backward()
    assert clean.grad.abs().max() > 0
    assert all(parameter.grad is None for network in (distiller.fake, distiller.teacher) for parameter in network.parameters())
    assert all(parameter.requires_grad for parameter in distiller.fake.parameters())


@pytest.mark.parametrize("options", [{}, {"distance": "l2"}, {"c": 0.1}, {"generator_law": KarrasUniform(u_max=0.6)}, {"fake_steps": 2}])
def test_a_gaussian_generator_reaches_the_teacher(gaussian_denoiser, options):
    distiller = SIMDistiller(gaussian_denoiser(0.0, 1.0), sample_shape=(1,), learning_rate=LearningRate(0.05, "linear", 200), **options)
    distiller.teacher.load_state_dict(gaussian_denoiser(0.6, 0.5).state_dict())
    for _ in range(200):
        metrics = distiller.step(256)
    samples = distiller.sample(20_000)
    assert samples.mean().item() == pytest.approx(0.6, abs=0.06)
    assert samples.std().item() == pytest.approx(0.5, abs=0.05)
    assert metrics["gap"] < 1e-2


def test_data_only_counts_samples(tiny_denoiser):
    runs = []
    for batch in (5, torch.randn(5, 1, 4, 4)):
        distiller = SIMDistiller(tiny_denoiser(), sample_shape=(1, 4, 4))
        distiller.step(batch, {"class_labels": torch.tensor([0, 1, 2, 3, 0])})
        runs.append(distiller.sample(2))
    assert torch.equal(*runs)


def test_generator_is_one_call_of_the_averaged_student(tiny_denoiser):
    distiller = SIMDistiller(tiny_denoiser(), sample_shape=(1, 4, 4), sigma_init=1.7)
    distiller.step(4)
    calls = []
    distiller.generator.register_forward_pre_hook(lambda _, args: calls.append(args))
    samples = distiller.sample(3, seed=5)
    ((noisy, sigma),) = calls
    torch.testing.assert_close(sigma, torch.full((3,), 1.7))
    assert samples.shape == noisy.shape == (3, 1, 4, 4)
    assert torch.equal(distiller.sample(3, seed=5), samples)
    assert not torch.equal(distiller.sample(3, seed=6), samples)
    assert distiller.sample(0).shape == (0, 1, 4, 4)


def test_every_network_moves_and_the_teacher_does_not(tiny_denoiser):
    distiller = SIMDistiller(tiny_denoiser(), sample_shape=(1, 4, 4))
    before = {name: [p.clone() for p in getattr(distiller, name).parameters()] for name in ("teacher", "student", "fake", "generator")}
    for _ in range(2):
        distiller.step(8, {"class_labels": torch.arange(8) % 4})
    moved = {name: not all(map(torch.equal, old, getattr(distiller, name).parameters())) for name, old in before.items()}
    assert moved == {"teacher": False, "student": True, "fake": True, "generator": True}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sigma_init": 0.0}, ValueError, "sigma_init must be finite and > 0"),
        ({"distance": "l1"}, ValueError, "distance must be one of 'pseudo_huber', 'l2', got 'l1'"),
        ({"c": -1.0}, ValueError, "c must be finite and >= 0"),
        ({"distance": "l2", "c": 0.1}, ValueError, "c belongs to distance=\"pseudo_huber\", got distance='l2'"),
        ({"fake_steps": 0}, ValueError, "fake_steps must be at least 1"),
        ({"sample_shape": 8}, ValueError, "sample_shape must be a sequence of positive ints, got 8"),
        ({"learning_rate": True}, TypeError, "learning_rate must be a number, got bool"),
    ],
)
def test_bad_arguments(tiny_denoiser, options, error, message):
    with pytest.raises(error, match=message):
        SIMDistiller(tiny_denoiser(), **{"sample_shape": (1, 4, 4), **options})


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        (0, ValueError, "batch must be at least 1, got 0"),
        (torch.zeros(2, 1, 8, 8), ValueError, r"batch must have shape \[B, 1, 4, 4\]"),
        ("8", TypeError, "batch must be a tensor"),
        (True, TypeError, "batch must be an int, got bool"),
    ],
)
def test_bad_batches(tiny_denoiser, batch, error, message):
    with pytest.raises(error, match=message):
        SIMDistiller(tiny_denoiser(), sample_shape=(1, 4, 4)).step(batch)
