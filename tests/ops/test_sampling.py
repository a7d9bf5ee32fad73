"""The steps samplers are made of."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff_kernels import ops
from fastdiff_kernels.reference.philox import normals as noise_of

from ..helpers import FLOATS, assert_accurate, assert_bitwise, assert_independent_of_batch, assert_independent_of_threads

# In float64 the eager composition is itself the truth: test_any_shape_layout_and_form_of_constants and the table's contract compare there.
NARROW = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(1, 1), (3, 5), (2, 4, 7, 3), (2, 16389)]
SEED = 7


def normals(*shape, count=2, dtype=torch.float64):
    return [torch.randn(*shape, dtype=torch.float64).to(dtype) for _ in range(count)]


def levels(batch, dtype=torch.float32):
    """(sigma_s, sigma_t) with sigma_s <= sigma_t, in the dtype of ops' constants."""
    sigma_t = 3 * torch.rand(batch, dtype=dtype) + 0.1
    return torch.rand(batch, dtype=dtype) * sigma_t, sigma_t


def broadcast(constant, x):
    return constant.reshape(-1, *[1] * (x.dim() - 1)) if isinstance(constant, torch.Tensor) else constant


def in_compute_dtype(constant, x):
    return constant.to(torch.float64 if x.dtype == torch.float64 else torch.float32)


def eager_posterior(denoised, noisy, sigma_s, sigma_t):
    sigma_s, sigma_t = (broadcast(in_compute_dtype(s, denoised), denoised) for s in (sigma_s, sigma_t))
    ratio = (sigma_s / sigma_t) ** 2
    spread = sigma_s * (1 - ratio).sqrt()
    noise = noise_of(denoised.shape, SEED, 0, "posterior", denoised.device)
    return (ratio * noisy + (1 - ratio) * denoised + spread * noise).to(denoised.dtype)


def posterior(denoised, noisy, sigma_s, sigma_t):
    return ops.posterior_sample(denoised, noisy, in_compute_dtype(sigma_s, denoised), in_compute_dtype(sigma_t, denoised), SEED)


def eager_step(x, denoised, uncond, sigma, sigma_next, guidance):
    sigma, sigma_next, guidance = (broadcast(in_compute_dtype(c, x), x) for c in (sigma, sigma_next, guidance))
    if uncond is not None:
        denoised = uncond + guidance * (denoised - uncond)
    following = x + (sigma_next - sigma) * ((x - denoised) / sigma)
    change = (following - x).abs().flatten(1).mean(1) if x.dim() > 1 else (following - x).abs()
    return following.to(x.dtype), change.to(torch.float64 if x.dtype == torch.float64 else torch.float32)


def step(x, denoised, uncond, sigma, sigma_next, guidance):
    sigma, sigma_next, guidance = (in_compute_dtype(c, x) for c in (sigma, sigma_next, guidance))
    return ops.guided_step(x, denoised, sigma, sigma_next, uncond=uncond, guidance=1.0 if uncond is None else guidance)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("shape", SHAPES)
def test_posterior_sample_is_as_accurate_as_eager(shape, dtype):
    inputs = [x.requires_grad_() for x in normals(*shape)]
    assert_accurate(posterior, eager_posterior, [*inputs, *levels(shape[0])], dtype)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_guided_step_is_as_accurate_as_eager(shape, guided, dtype):
    x, denoised, uncond = (t.requires_grad_() for t in normals(*shape, count=3))
    sigma_next, sigma = levels(shape[0])
    assert_accurate(step, eager_step, [x, denoised, uncond if guided else None, sigma, sigma_next, 3 * torch.rand(shape[0])], dtype)


@settings(max_examples=25, deadline=None)
@given(batch=st.integers(0, 4), shape=st.lists(st.integers(1, 9), max_size=3), permuted=st.booleans(), scalars=st.booleans())
def test_any_shape_layout_and_form_of_constants(batch, shape, permuted, scalars):
    x, denoised, uncond = normals(batch, *shape, count=3)
    if permuted:
        reverse = (0, *reversed(range(1, x.dim())))
        x, denoised = (t.permute(reverse).contiguous().permute(reverse) for t in (x, denoised))
    sigma_next, sigma = levels(1 if scalars else batch, torch.float64)
    sigma_next, sigma = (s[0] if scalars else s for s in (sigma_next, sigma))
    following, change = step(x, denoised, uncond, sigma, sigma_next, torch.tensor(2.5, dtype=torch.float64))
    expected, moved = eager_step(x, denoised, uncond, sigma, sigma_next, torch.tensor(2.5, dtype=torch.float64))
    torch.testing.assert_close(following, expected)
    torch.testing.assert_close(change, moved)
    found = posterior(denoised, x, sigma_next, sigma)
    assert found.is_contiguous()
    torch.testing.assert_close(found, eager_posterior(denoised, x, sigma_next, sigma), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", FLOATS)
def test_posterior_at_the_ends_copies(dtype):
    denoised, noisy = normals(3, 50, dtype=dtype)
    assert_bitwise(ops.posterior_sample(denoised, noisy, 0.0, 1.7, SEED), denoised)
    assert_bitwise(ops.posterior_sample(denoised, noisy, 0.3, 0.3, SEED), noisy)


def test_posterior_of_close_levels_keeps_its_spread():
    """sigma_s sqrt(1 - r) with 1 - r near 1e-6 is exact to rounding although r rounds to 1 within a tenth of 1 - r in float32."""
    sigma_s, sigma_t = torch.tensor([1.0]), torch.tensor([1.0 + 5 * 2**-23])
    zero = torch.zeros(1, 1000)
    found = ops.posterior_sample(zero, zero, sigma_s, sigma_t, SEED)
    lower, upper = sigma_s.double(), sigma_t.double()
    spread = lower * ((upper - lower) * (upper + lower)).sqrt() / upper
    truth = spread * noise_of(zero.shape, SEED, 0, "posterior", zero.device).double()
    torch.testing.assert_close(found.double(), truth, rtol=1e-6, atol=0)


COUNT = 20_000
LEVEL, SHARE = st.floats(0.05, 50.0), st.floats(0.05, 0.98)


def assert_moments(values, mean, variance):
    """Mean and variance of independent normal values [n], as far as their number tells."""
    assert abs(values.mean() - mean) < 5 * math.sqrt(variance / len(values))
    assert abs(values.var() / variance - 1) < 5 * math.sqrt(2 / len(values))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(sigma_t=LEVEL, share=SHARE, seed=st.integers(0, 2**40))
def test_posterior_mean_and_variance(sigma_t, share, seed):
    """z_s | z_t, D ~ N(r z_t + (1 - r) D, sigma_s^2 (1 - r)), r = (sigma_s / sigma_t)^2, whatever z_t and D."""
    sigma_s, ratio = share * sigma_t, share**2
    denoised, noisy = normals(1, COUNT)
    found = ops.posterior_sample(denoised, sigma_t * noisy, sigma_s, sigma_t, seed)
    mean = ratio * sigma_t * noisy + (1 - ratio) * denoised
    assert_moments((found - mean)[0], 0, sigma_s**2 * (1 - ratio))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(sigma_t=LEVEL, share=SHARE, centre=st.floats(-3, 3), spread=st.floats(0.1, 3.0), seed=st.integers(0, 2**40))
def test_noised_and_sampled_back_is_the_chain(sigma_t, share, centre, spread, seed):
    """Chapman-Kolmogorov for data N(m, c^2): given the true x0, z_s has the law of x0 noised to sigma_s, and z_t - z_s is new noise."""
    sigma_s = share * sigma_t
    clean, forward = normals(1, COUNT)
    clean = centre + spread * clean
    noisy = clean + sigma_t * forward
    found = ops.posterior_sample(clean, noisy, sigma_s, sigma_t, seed)
    assert_moments(found[0], centre, spread**2 + sigma_s**2)
    assert_moments((noisy - found)[0], 0, sigma_t**2 - sigma_s**2)
    correlation = torch.corrcoef(torch.cat((clean, found - clean, noisy - found))) - torch.eye(3)
    assert correlation.abs().max() < 5 / math.sqrt(COUNT)


def test_posterior_noise_has_a_stream_of_its_own():
    x = torch.zeros(2, 4096)
    normal, other = ops.lcss_noise(x, SEED), ops.posterior_sample(x, x, 1e-4, 1.0, SEED) / 1e-4
    assert other.std() == pytest.approx(1, abs=0.05)
    assert abs((normal * other).mean()) < 4 / math.sqrt(x.numel())
    assert (normal == other).sum() == 0


def test_posterior_noise_follows_seed_and_offset():
    denoised, noisy = normals(4, 30, dtype=torch.float32)
    whole = ops.posterior_sample(denoised, noisy, 0.5, 1.0, SEED)
    assert_bitwise(ops.posterior_sample(denoised, noisy, 0.5, 1.0, torch.tensor(SEED)), whole)
    assert_bitwise(ops.posterior_sample(denoised[2:], noisy[2:], 0.5, 1.0, SEED, offset=2), whole[2:])
    assert not torch.equal(ops.posterior_sample(denoised, noisy, 0.5, 1.0, SEED + 1), whole)


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_last_step_returns_the_denoised(dtype):
    """Also where x is so large that x + (D - x) would have lost D."""
    x, denoised = normals(3, 50, dtype=dtype)
    following, change = ops.guided_step(1e3 * x, denoised, 80.0, 0.0)
    assert_bitwise(following, denoised)
    torch.testing.assert_close(change.double(), (denoised.double() - (1e3 * x).double()).abs().mean(1), rtol=1e-5, atol=0)


def test_a_step_to_the_same_level_stays():
    x, denoised = normals(3, 50, dtype=torch.float32)
    following, change = ops.guided_step(x, denoised, 0.3, 0.3)
    assert_bitwise(following, x)
    assert_bitwise(change, torch.zeros(3))


def test_the_change_is_measured_before_rounding():
    """In float16 the step itself rounds away; its size does not."""
    x = torch.full((1, 100), 2.0, dtype=torch.float16)
    denoised = torch.full((1, 100), 1.0, dtype=torch.float16)
    following, change = ops.guided_step(x, denoised, 1.0, 1.0 - 1e-4)
    assert_bitwise(following, x)
    assert change.item() == pytest.approx(1e-4, rel=1e-3)


def test_guidance():
    x, denoised, uncond = normals(3, 50, count=3)
    plain = ops.guided_step(x, denoised, 1.0, 0.5)[0]
    for guidance, target in ((1.0, denoised), (0.0, uncond), (2.0, 2 * denoised - uncond)):
        torch.testing.assert_close(ops.guided_step(x, denoised, 1.0, 0.5, uncond=uncond, guidance=guidance)[0], 0.5 * (x + target))
    torch.testing.assert_close(ops.guided_step(x, denoised, 1.0, 0.5, uncond=denoised, guidance=7.5)[0], plain)


@pytest.mark.parametrize("sigmas", [(5.0, 1.3, 0.2, 0.0), (80.0, 3.0, 0.01, 0.0)])
def test_euler_steps_on_a_gaussian(sigmas):
    """Data N(0, c^2): D = x c^2 / (c^2 + sigma^2), so a step multiplies x by 1 + (sigma' - sigma) sigma / (c^2 + sigma^2)."""
    variance = 0.25
    (x,) = normals(2, 40, count=1)
    start, factor = x, 1.0
    for sigma, sigma_next in itertools.pairwise(sigmas):
        shrink = 1 + (sigma_next - sigma) * sigma / (variance + sigma**2)
        following, change = ops.guided_step(x, x * variance / (variance + sigma**2), sigma, sigma_next)
        torch.testing.assert_close(change, abs(shrink - 1) * x.abs().mean(1))
        x, factor = following, factor * shrink
    torch.testing.assert_close(x, factor * start)


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_sample_does_not_depend_on_its_batch_or_the_threads(dtype):
    x, denoised, uncond = normals(3, 33001, count=3, dtype=dtype)
    sigma_next, sigma = levels(3, torch.float64 if dtype == torch.float64 else torch.float32)

    def run(x, denoised, uncond, sigma_next, sigma):
        leaves = [t.detach().requires_grad_() for t in (x, denoised, uncond)]
        following, change = ops.guided_step(*leaves[:2], sigma, sigma_next, uncond=leaves[2], guidance=1.5)
        gradients = torch.autograd.grad((following.sum(), change.sum()), leaves)
        return [following.detach(), change.detach(), *gradients]

    def draw(denoised, x, sigma_next, sigma):
        return ops.posterior_sample(denoised, x, sigma_next, sigma, SEED)

    assert_independent_of_batch(run, x, denoised, uncond, sigma_next, sigma)
    assert_independent_of_threads(lambda: run(x, denoised, uncond, sigma_next, sigma))
    assert_independent_of_threads(lambda: draw(denoised, x, sigma_next, sigma))
    whole = draw(denoised, x, sigma_next, sigma)
    assert_bitwise(draw(denoised[:1], x[:1], sigma_next[:1], sigma[:1]), whole[:1])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_values_stay_where_they_are(value):
    x, denoised = normals(3, 6, dtype=torch.float32)
    clean, moved = ops.guided_step(x, denoised, 1.0, 0.5)
    drawn = ops.posterior_sample(denoised, x, 0.5, 1.0, SEED)
    denoised[1, 3] = value
    broken, broken_moved = ops.guided_step(x, denoised, 1.0, 0.5)
    broken_drawn = ops.posterior_sample(denoised, x, 0.5, 1.0, SEED)
    elsewhere = torch.ones(3, 6, dtype=torch.bool)
    elsewhere[1, 3] = False
    for before, after in ((clean, broken), (drawn, broken_drawn)):
        assert not after[1, 3].isfinite()
        assert_bitwise(after[elsewhere], before[elsewhere])
    assert not broken_moved[1].isfinite()
    assert_bitwise(broken_moved[::2], moved[::2])


X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.posterior_sample(1.0, X, 0.5, 1.0, 0), TypeError, "denoised must be a tensor; got float"),
        (lambda: ops.posterior_sample(X.int(), X, 0.5, 1.0, 0), TypeError, "denoised must be float32, .* got torch.int32"),
        (lambda: ops.posterior_sample(X, X[:, :2], 0.5, 1.0, 0), ValueError, r"noisy must have the shape of denoised, .*; got \(2, 2\)"),
        (lambda: ops.posterior_sample(X, X.half(), 0.5, 1.0, 0), TypeError, "noisy must have the dtype of denoised"),
        (lambda: ops.posterior_sample(X, X.to("meta"), 0.5, 1.0, 0), ValueError, "noisy must be on the device of denoised"),
        (lambda: ops.posterior_sample(X, X, -0.5, 1.0, 0), ValueError, "sigma_s must be finite and at least 0; got -0.5"),
        (lambda: ops.posterior_sample(X, X, 0.0, 0.0, 0), ValueError, "sigma_t must be finite and greater than 0; got 0.0"),
        (lambda: ops.posterior_sample(X, X, 2.0, 1.0, 0), ValueError, "sigma_s must be at most sigma_t; got sigma_s = 2.0, sigma_t = 1.0"),
        (lambda: ops.posterior_sample(X, X, torch.tensor([0.5, 1.5]), 1.0, 0), ValueError, "sigma_s must be at most sigma_t"),
        (lambda: ops.posterior_sample(X, X, torch.ones(3), 1.0, 0), ValueError, r"sigma_s must be .* of shape \(2,\); got shape \(3,\)"),
        (lambda: ops.posterior_sample(X, X, 0.5, torch.ones(2, requires_grad=True), 0), ValueError, "sigma_t is a constant"),
        (lambda: ops.posterior_sample(X, X, 0.5, 1.0, 0.5), TypeError, "seed must be an int or a 0-d int64 tensor; got float"),
        (lambda: ops.posterior_sample(X, X, 0.5, 1.0, 2**63), ValueError, "seed must fit in 64 bits"),
        (lambda: ops.posterior_sample(X, X, 0.5, 1.0, torch.zeros(1, dtype=torch.int64)), TypeError, "seed must be an int or a 0-d"),
        (lambda: ops.posterior_sample(X, X, 0.5, 1.0, 0, offset=-1), ValueError, "offset must be at least 0; got -1"),
        (lambda: ops.guided_step([1.0], X, 1.0, 0.5), TypeError, "x must be a tensor; got list"),
        (lambda: ops.guided_step(X, X[:1], 1.0, 0.5), ValueError, r"denoised must have the shape of x, \(2, 3\); got \(1, 3\)"),
        (lambda: ops.guided_step(X, X.double(), 1.0, 0.5), TypeError, "denoised must have the dtype of x, .*; got torch.float64"),
        (lambda: ops.guided_step(X, X, 1.0, 0.5, uncond=X[:1]), ValueError, "uncond must have the shape of x"),
        (lambda: ops.guided_step(X, X, 0.0, 0.0), ValueError, "sigma must be finite and greater than 0; got 0.0"),
        (lambda: ops.guided_step(X, X, torch.tensor([1.0, math.nan]), 0.5), ValueError, "sigma must be finite and greater than 0; got nan"),
        (lambda: ops.guided_step(X, X, 1.0, -1.0), ValueError, "sigma_next must be finite and at least 0; got -1.0"),
        (lambda: ops.guided_step(X, X, 1.0, 0.5, guidance=2.0), ValueError, "guidance needs uncond, which is None; got guidance = 2.0"),
        (lambda: ops.guided_step(X, X, 1.0, 0.5, guidance=torch.ones(2)), ValueError, "guidance needs uncond"),
        (lambda: ops.guided_step(X, X, 1.0, 0.5, uncond=X, guidance=float("inf")), ValueError, "guidance must be finite; got inf"),
        (lambda: ops.guided_step(X, X, 1.0, 0.5, uncond=X, guidance="2"), TypeError, "guidance must be a float or a tensor; got str"),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
