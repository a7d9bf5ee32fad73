"""The losses that learn a score, and the noise they regenerate."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff_kernels import _scale, ops

from ..helpers import FLOATS, assert_accurate, assert_bitwise, assert_independent_of_batch, assert_independent_of_threads
from .normals import SEED, definition, noise, orthonormal, ulps

# In float64 the eager composition is itself the truth: test_any_shape_and_layout and the table's contract compare there.
NARROW = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(1, 1), (3, 5), (2, 4, 7, 3), (2, 16389)]


def eager_perturb(x, sigma, z):
    return (x + _like(sigma, x) * z).to(x.dtype)


def eager_lcss(score, z, sigma, gamma, weight):
    sigma, gamma, weight = (_wide(c, score) for c in (sigma, gamma, weight))
    return weight * (gamma / sigma * (score * z).flatten(1).sum(1) + 0.5 * score.square().flatten(1).sum(1))


def eager_denoising(denoised, clean, weight):
    return _wide(weight, denoised) * (denoised - clean).square().flatten(1).sum(1)


def _wide(constant, x):
    return constant.to(torch.float64 if x.dtype == torch.float64 else torch.float32)


def _like(constant, x):
    return _wide(constant, x).reshape(-1, *[1] * (x.dim() - 1))


def constants(batch, count=3):
    return [torch.rand(batch) + 0.5 for _ in range(count)]


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("shape", SHAPES)
def test_lcss_loss_is_as_accurate_as_eager(shape, dtype):
    score, z = (torch.randn(shape, dtype=torch.float64).requires_grad_() for _ in range(2))

    def ours(score, z, sigma, gamma, weight):
        sigma, gamma, weight = (_wide(c, score) for c in (sigma, gamma, weight))
        return ops.lcss_loss(score, z, sigma, gamma=gamma, weight=weight)

    assert_accurate(ours, eager_lcss, [score, z, *constants(shape[0])], dtype)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("shape", SHAPES)
def test_seeded_lcss_loss_is_as_accurate_as_eager(shape, dtype):
    """The truth has the noise as the kernel draws it, unrounded."""
    score, z = torch.randn(shape, dtype=torch.float64).requires_grad_(), noise(*shape)

    def ours(score, sigma, gamma, weight):
        sigma, gamma, weight = (_wide(c, score) for c in (sigma, gamma, weight))
        return ops.lcss_loss(score, SEED, sigma, gamma=gamma, weight=weight)

    def eager(score, sigma, gamma, weight):
        return eager_lcss(score, z.to(_wide(sigma, score).dtype), sigma, gamma, weight)

    assert_accurate(ours, eager, [score, *constants(shape[0])], dtype)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("shape", SHAPES)
def test_perturbation_is_as_accurate_as_eager(shape, dtype):
    x, z = torch.randn(shape, dtype=torch.float64).requires_grad_(), noise(*shape)

    def ours(x, sigma):
        return ops.lcss_perturb(x, _wide(sigma, x), SEED)

    assert_accurate(ours, lambda x, sigma: eager_perturb(x, sigma, z), [x, *constants(shape[0], 1)], dtype)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("shape", SHAPES)
def test_denoising_loss_is_as_accurate_as_eager(shape, dtype):
    clean = torch.randn(shape, dtype=torch.float64)
    denoised = clean + 0.1 * torch.randn(shape, dtype=torch.float64)

    def ours(denoised, clean, weight):
        return ops.denoising_loss(denoised, clean, weight=_wide(weight, denoised))

    assert_accurate(ours, eager_denoising, [denoised.requires_grad_(), clean.requires_grad_(), *constants(shape[0], 1)], dtype)


@settings(max_examples=25, deadline=None)
@given(batch=st.integers(0, 4), shape=st.lists(st.integers(1, 9), max_size=3), permuted=st.booleans(), scalars=st.booleans())
def test_any_shape_and_layout(batch, shape, permuted, scalars):
    a, b = (torch.randn(batch, *shape, dtype=torch.float64) for _ in range(2))
    if permuted:
        reverse = (0, *reversed(range(1, a.dim())))
        a, b = (t.permute(reverse).contiguous().permute(reverse) for t in (a, b))
    sigma, gamma, weight = (c.double()[0] if scalars else c.double()[:batch] for c in constants(max(batch, 1)))
    flat = [t.reshape(batch, math.prod(shape)) for t in (a, b)]
    torch.testing.assert_close(ops.lcss_loss(a, b, sigma, gamma=gamma, weight=weight), eager_lcss(*flat, sigma, gamma, weight))
    torch.testing.assert_close(ops.denoising_loss(a, b, weight=weight), eager_denoising(*flat, weight))
    z = noise(batch, *shape).double()
    perturbed = ops.lcss_perturb(a, sigma, SEED)
    assert perturbed.is_contiguous()
    torch.testing.assert_close(perturbed, eager_perturb(a, sigma, z))
    seeded = ops.lcss_loss(a, SEED, sigma, gamma=gamma, weight=weight)
    torch.testing.assert_close(seeded, eager_lcss(flat[0], z.reshape(flat[0].shape), sigma, gamma, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_seed_stands_for_its_noise(dtype):
    """Nothing is lost by not storing the noise: the loss and its gradient are those of the stored one."""
    score = torch.randn(3, 2000, dtype=dtype)
    z, leaves = noise(3, 2000, dtype=dtype), [score.clone().requires_grad_() for _ in range(3)]
    losses = [ops.lcss_loss(leaf, given, 0.3, gamma=0.7) for leaf, given in zip(leaves, (z, SEED, torch.tensor(SEED)), strict=True)]
    torch.testing.assert_close(losses[1], losses[0])
    assert_bitwise(losses[2], losses[1])
    grads = [torch.autograd.grad(loss.sum(), leaf)[0] for loss, leaf in zip(losses, leaves, strict=True)]
    torch.testing.assert_close(grads[1], grads[0])
    torch.testing.assert_close(ops.lcss_perturb(score, 0.3, SEED), score + 0.3 * z)


def test_the_loss_is_told_the_offset_of_its_perturbation():
    score = torch.randn(4, 50)
    whole = ops.lcss_loss(score, SEED, 0.5)
    assert_bitwise(ops.lcss_loss(score[1:], SEED, 0.5, offset=1), whole[1:])
    assert_bitwise(ops.lcss_perturb(score[1:], 0.5, SEED, offset=1), ops.lcss_perturb(score, 0.5, SEED)[1:])


@pytest.mark.parametrize("dtype", FLOATS)
def test_perturbing_by_nothing_copies(dtype):
    x = torch.randn(2, 50, dtype=dtype)
    assert_bitwise(ops.lcss_perturb(x, 0.0, SEED), x)


LEVELS, GAMMAS, DIMENSIONS = st.floats(0.05, 5.0), st.floats(0.2, 3.0), st.integers(1, 8)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(spread=LEVELS, centre=st.floats(-2, 2), sigma=LEVELS, dimension=DIMENSIONS, gamma=GAMMAS, k=st.floats(0.01, 3.0))
def test_lcss_on_a_gaussian(spread, centre, sigma, dimension, gamma, k):
    """Data N(mu, c^2 I_d), s = -k (x - m): J = -gamma k d + k^2 (d (c^2 + sigma^2) + |mu - m|^2) / 2, least at gamma times the score."""
    data, z = orthonormal(32, dimension, dimension)
    x, total = centre + spread * data + sigma * z, spread**2 + sigma**2

    def objective(k, m):
        return ops.lcss_loss(-k * (x - m), z, sigma, gamma=gamma).mean()

    m = 0.3
    expected = -gamma * k * dimension + 0.5 * k**2 * dimension * (total + (centre - m) ** 2)
    assert objective(k, m).item() == pytest.approx(expected, rel=1e-9, abs=1e-9 * (gamma * k + k**2))
    best = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (gamma / total, centre)]
    value = objective(*best)
    assert value.item() == pytest.approx(-(gamma**2) * dimension / (2 * total))
    for slope in torch.autograd.grad(value, best):
        assert slope.item() == pytest.approx(0, abs=1e-10 * dimension * (gamma + gamma**2 / total) * (1 + 1 / total))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(sigma=LEVELS, dimension=DIMENSIONS, gamma=GAMMAS, k=st.floats(0.01, 3.0), seed=st.integers(0, 2**40))
def test_an_antithetic_pair_on_a_gaussian_sample_by_sample(sigma, dimension, gamma, k, seed):
    """s = -k x: -gamma k |z|^2 + k^2 (|x|^2 + sigma^2 |z|^2) / 2 for every x and every seed's z; the products of x and z cancel."""
    x = torch.randn(5, dimension, dtype=torch.float64)
    plus, minus = (-k * ops.lcss_perturb(x, sigma, seed, mirrored=mirrored) for mirrored in (False, True))
    squares = [value.square().sum(1) for value in (x, noise(5, dimension, seed=seed, dtype=torch.float64))]
    expected = -gamma * k * squares[1] + 0.5 * k**2 * (squares[0] + sigma**2 * squares[1])
    scale = expected.abs() + k * (gamma + k) * (squares[0] + squares[1])
    found = ops.lcss_loss(plus, seed, sigma, gamma=gamma, mirrored=minus)
    assert ((found - expected).abs() <= 1e-12 * scale / min(sigma, 1)).all()


def test_lcss_on_a_gaussian_printed_values():
    data, z = orthonormal(64, 4, 4)
    x = 1.3 * data + 0.6 * z
    assert ops.lcss_loss(-0.4 * x, z, 0.6).mean().item() == pytest.approx(-0.944)
    assert ops.lcss_loss(-x / 2.05, z, 0.6).mean().item() == pytest.approx(-0.975610, abs=5e-7)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(sigma=LEVELS, dimension=DIMENSIONS)
def test_with_the_forward_noise_lcss_is_denoising_score_matching(sigma, dimension):
    """gamma = 1: the losses differ by |z|^2 / (2 sigma^2), so the gradients are equal, sample by sample, for any score."""
    score, z = (torch.randn(16, dimension, dtype=torch.float64) for _ in range(2))
    score.requires_grad_()
    lcss = ops.lcss_loss(score, z, sigma)
    # -z / sigma is the score of the noise: the denoising loss of denoised = x + sigma^2 s is sigma^4 times that of the scores.
    denoising = ops.denoising_loss(sigma**2 * score, -sigma * z, weight=0.5 / sigma**4)
    torch.testing.assert_close(denoising - lcss, 0.5 * z.square().sum(1) / sigma**2)
    torch.testing.assert_close(*(torch.autograd.grad(loss.sum(), score)[0] for loss in (lcss, denoising)))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(spread=LEVELS, level=LEVELS, sigma=LEVELS, dimension=st.integers(1, 4))
def test_local_smoothing_of_noisy_data_learns_the_total_level(spread, level, sigma, dimension):
    """Noise of level sigma_t first and a perturbation of its own after it: the minimiser is the score at sqrt(sigma_t^2 + sigma^2)."""
    data, forward, z = orthonormal(32, dimension, dimension, dimension)
    x, total = spread * data + level * forward + sigma * z, spread**2 + level**2 + sigma**2
    k = torch.tensor(1 / total, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(ops.lcss_loss(-k * x, z, sigma).mean(), k)
    assert slope.item() == pytest.approx(0, abs=1e-10 * dimension * total / sigma**2)


def stein(f, x, sigma):
    """E[f(x') (x' - x)] / sigma^2 over x' ~ N(x, sigma^2) from the loss, by Gauss-Hermite quadrature, and the nodes with their weights."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(120)
    z, weight = torch.from_numpy(nodes)[:, None], torch.from_numpy(weights / weights.sum())
    moved = x + sigma * z
    value = f(moved)
    return (ops.lcss_loss(value, z, sigma, weight=weight) - 0.5 * weight * value[:, 0].square()).sum().item(), moved, weight


@settings(max_examples=25, deadline=None, derandomize=True)
@given(x=st.floats(-3, 3), sigma=st.floats(0.05, 2.0), wave=st.floats(0.1, 3.0), bend=st.floats(-1, 1))
def test_stein_identity_in_closed_form(x, sigma, wave, bend):
    """E[f'(x')] = w cos(w x) exp(-w^2 sigma^2 / 2) + 2 a x for f = sin(w x) + a x^2, without a derivative taken."""
    found, _, _ = stein(lambda moved: (wave * moved).sin() + bend * moved.square(), x, sigma)
    expected = wave * math.cos(wave * x) * math.exp(-((wave * sigma) ** 2) / 2) + 2 * bend * x
    assert found == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("x", "sigma", "expected"), [(0.4, 0.7, 0.91890081), (-1.1, 0.3, None), (0.0, 1.0, None)])
def test_stein_identity_for_a_nonlinear_score(x, sigma, expected):
    """The same for f = tanh x + 0.3 x^2, against the quadrature of f'."""
    found, moved, weight = stein(lambda moved: moved.tanh() + 0.3 * moved.square(), x, sigma)
    trace = (weight * (1 / moved.cosh().square() + 0.6 * moved)[:, 0]).sum().item()
    assert found == pytest.approx(trace, abs=1e-8)
    assert expected is None or found == pytest.approx(expected, abs=5e-8)


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_sample_does_not_depend_on_its_batch_or_the_threads(dtype):
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def run(score, z, sigma, gamma, weight):
        leaves = [t.detach().requires_grad_() for t in (score, z)]
        losses = [ops.lcss_loss(*leaves, sigma, gamma=gamma, weight=weight), ops.denoising_loss(*leaves, weight=weight)]
        return [*[loss.detach() for loss in losses], *torch.autograd.grad(sum(loss.sum() for loss in losses), leaves)]

    def seeded(score, sigma):
        leaf = score.detach().requires_grad_()
        outputs = [ops.lcss_loss(leaf, SEED, sigma), ops.lcss_perturb(leaf, sigma, SEED)]
        return [*[o.detach() for o in outputs], torch.autograd.grad([o.sum() for o in outputs], leaf)[0]]

    score, z = (torch.randn(3, 33001).to(dtype) for _ in range(2))
    sigma, gamma, weight = (c.to(wide) for c in constants(3))
    assert_independent_of_batch(run, score, z, sigma, gamma, weight)
    assert_independent_of_threads(lambda: run(score, z, sigma, gamma, weight))
    assert_independent_of_threads(lambda: seeded(score, sigma))
    assert_bitwise(seeded(score[:1], sigma[:1]), [o[:1] for o in seeded(score, sigma)])


@pytest.mark.parametrize("shape", [(3, 2), (1, 3, 1024, 1024)])
def test_smallest_and_largest_samples(shape):
    """From two elements to a megapixel: the definition's noise to 2 ulp, and a loss that is the float64 one to float32's rounding."""
    z = noise(*shape)
    assert ulps(z, definition(*shape)) <= 2
    score = torch.randn(shape)
    wide = [t.double().flatten(1) for t in (score, z)]
    truth = 2 * (wide[0] * wide[1]).sum(1) + 0.5 * wide[0].square().sum(1)
    for found in (ops.lcss_loss(score, SEED, 0.5), ops.lcss_loss(score, z, 0.5)):
        torch.testing.assert_close(found.double(), truth, rtol=1e-6, atol=0)


def eager_pair(score, mirrored, z, sigma, gamma, weight):
    return 0.5 * (eager_lcss(score, z, sigma, gamma, weight) + eager_lcss(mirrored, -z, sigma, gamma, weight))


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("shape", SHAPES)
def test_an_antithetic_pair_is_as_accurate_as_eager(shape, dtype):
    score, mirrored, z = (torch.randn(shape, dtype=torch.float64).requires_grad_() for _ in range(3))

    def ours(score, mirrored, z, sigma, gamma, weight):
        sigma, gamma, weight = (_wide(c, score) for c in (sigma, gamma, weight))
        return ops.lcss_loss(score, z, sigma, gamma=gamma, weight=weight, mirrored=mirrored)

    assert_accurate(ours, eager_pair, [score, mirrored, z, *constants(shape[0])], dtype)


def test_an_antithetic_pair_is_the_mean_of_its_halves():
    plus, minus = torch.randn(2, 3, 2000, dtype=torch.float64)
    halves = ops.lcss_loss(plus, SEED, 0.3, gamma=0.7) + ops.lcss_loss(-minus, SEED, 0.3, gamma=0.7)
    torch.testing.assert_close(ops.lcss_loss(plus, SEED, 0.3, gamma=0.7, mirrored=minus), halves / 2)
    perturbed = ops.lcss_perturb(plus, 0.3, SEED) + ops.lcss_perturb(plus, 0.3, SEED, mirrored=True)
    torch.testing.assert_close(perturbed / 2, plus)


def test_antithetic_pairs_take_the_variance_out_of_small_noise():
    """A 2-d score with a known trace: both estimates are unbiased, and the pair's spread stays where the plain one's is 1 / sigma."""
    x, matrix = (
        torch.tensor([[0.4, -0.2]], dtype=torch.float64).expand(20000, 2),
        torch.tensor([[0.8, 0.3], [0.1, 0.35]], dtype=torch.float64),
    )

    def score(x):
        return (x @ matrix.T) + 0.1 * x.square()

    trace, spreads = matrix.trace() + 0.2 * x[0].sum(), {}
    for sigma in (0.1, 0.01):
        plus, minus = (score(ops.lcss_perturb(x, sigma, SEED, mirrored=mirrored)) for mirrored in (False, True))
        plain = ops.lcss_loss(plus, SEED, sigma) - 0.5 * plus.square().sum(1)
        pair = ops.lcss_loss(plus, SEED, sigma, mirrored=minus) - 0.25 * (plus.square() + minus.square()).sum(1)
        for estimate in (plain, pair):
            assert abs(estimate.mean() - trace) < 4.5 * estimate.std() / math.sqrt(len(estimate))
        spreads[sigma] = plain.std() / pair.std()
    assert spreads[0.01] > 8 * spreads[0.1] > 8


LOSSES = {
    "stored": lambda s, z: ops.lcss_loss(s, z, 0.5),
    "seeded": lambda s, z: ops.lcss_loss(s, SEED, 0.5),
    "pair": lambda s, z: ops.lcss_loss(s, SEED, 0.5, mirrored=z),
    "denoising": ops.denoising_loss,
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_second_backward_gives_what_the_first_gave(name, dtype):
    """The first one takes the gradient that forward wrote, with its memory."""
    leaf, other = torch.randn(2, 3, 2000).to(dtype)
    leaf.requires_grad_()
    loss = LOSSES[name](leaf, other)
    upstream = torch.randn_like(loss)
    first, second = (torch.autograd.grad(loss, leaf, upstream, retain_graph=True)[0] for _ in range(2))
    assert_bitwise(second, first)
    (third,) = torch.autograd.grad(loss, leaf, -upstream)
    assert_bitwise(third, -first)
    assert first.data_ptr() != second.data_ptr()


@pytest.mark.parametrize("name", LOSSES)
def test_backward_allocates_nothing(name):
    """Forward wrote the gradient where gradients were asked for; backward scales it where it is."""
    leaf, other = torch.randn(2, 64, 2048)
    loss = LOSSES[name](leaf.requires_grad_(), other)
    upstream = torch.randn_like(loss)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        torch.autograd.grad(loss, leaf, upstream)
    assert max(event.cpu_memory_usage for event in profile.events()) < leaf.numel()
    with torch.no_grad():
        assert not LOSSES[name](leaf, other).requires_grad


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_values_stay_in_their_sample(value):
    def run(x):
        z = noise(3, 6)
        return ops.lcss_loss(x, SEED, 1.0), ops.lcss_loss(x, z, 1.0), ops.denoising_loss(x, z), ops.lcss_perturb(x, 1.0, SEED)

    x = torch.randn(3, 6)
    clean = run(x)
    x[1, 3] = value
    for before, after in zip(clean, run(x), strict=True):
        assert not after[1].isfinite().all()
        assert_bitwise(after[::2], before[::2])
    assert_bitwise(ops.lcss_noise(x, SEED), noise(3, 6))


X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.lcss_noise(1.0, 0), TypeError, "lcss_noise: x must be a tensor; got float"),
        (lambda: ops.lcss_noise(X.long(), 0), TypeError, "x must be float32, bfloat16, float16 or float64; got torch.int64"),
        (lambda: ops.lcss_noise(torch.zeros(()), 0), ValueError, "x must have at least 1 dimension"),
        (lambda: ops.lcss_noise(X, 0.0), TypeError, "seed must be an int or a 0-d int64 tensor; got float"),
        (lambda: ops.lcss_noise(X, True), TypeError, "seed must be an int or a 0-d int64 tensor; got bool"),
        (lambda: ops.lcss_noise(X, 2**63), ValueError, "seed must fit in 64 bits; got 9223372036854775808"),
        (lambda: ops.lcss_noise(X, torch.tensor(1, dtype=torch.int32)), TypeError, "seed must be .* got shape .*, torch.int32"),
        (lambda: ops.lcss_noise(X, torch.tensor([1])), TypeError, r"seed must be .* got shape \(1,\)"),
        (lambda: ops.lcss_noise(X, 0, offset=-1), ValueError, "offset must be at least 0; got -1"),
        (lambda: ops.lcss_noise(X, 0, offset=0.5), TypeError, "offset must be an int; got float"),
        (lambda: ops.lcss_noise(torch.empty(1, 2**17, 2**17 + 1, device="meta"), 0), ValueError, "x must have at most 2\\^34 elements"),
        (lambda: ops.lcss_perturb(X, -0.1, 0), ValueError, "sigma must be finite and at least 0; got -0.1"),
        (lambda: ops.lcss_perturb(X, "1", 0), TypeError, "sigma must be a float or a tensor; got str"),
        (lambda: ops.lcss_perturb(X, torch.ones(2, requires_grad=True), 0), ValueError, "sigma is a constant and must not require grad"),
        (lambda: ops.lcss_perturb(X, torch.ones(3), 0), ValueError, r"sigma must be .* of shape \(2,\); got shape \(3,\)"),
        (lambda: ops.lcss_perturb(X, torch.ones(2).half(), 0), TypeError, "sigma must be float32 or float64; got torch.float16"),
        (lambda: ops.lcss_loss(X, X, 0.0), ValueError, "lcss_loss: sigma must be finite and greater than 0; got 0.0"),
        (lambda: ops.lcss_loss(X, X, torch.tensor([1.0, 0.0])), ValueError, "sigma must be finite and greater than 0; got 0.0"),
        (lambda: ops.lcss_loss(X, X[:1], 1.0), ValueError, r"noise must have the shape of score, \(2, 3\); got \(1, 3\)"),
        (lambda: ops.lcss_loss(X, X.double(), 1.0), TypeError, "noise must have the dtype of score, torch.float32; got torch.float64"),
        (lambda: ops.lcss_loss(X, X.to("meta"), 1.0), ValueError, "noise must be on the device of score, cpu; got meta"),
        (lambda: ops.lcss_loss(X, torch.tensor(1.0), 1.0), ValueError, r"noise must have the shape of score, \(2, 3\); got \(\)"),
        (lambda: ops.lcss_loss(X, X, 1.0, offset=1), ValueError, "offset belongs to a seed and must be 0 beside a noise tensor; got 1"),
        (lambda: ops.lcss_loss(X, 1.5, 1.0), TypeError, "noise must be a tensor like score, an int or a 0-d int64 tensor; got float"),
        (lambda: ops.lcss_loss(X, [1], 1.0), TypeError, "noise must be a tensor like score, an int or a 0-d int64 tensor; got list"),
        (lambda: ops.lcss_loss(X, 2**63, 1.0), ValueError, "noise must fit in 64 bits"),
        (lambda: ops.lcss_loss(X, X, 1.0, gamma=math.nan), ValueError, "gamma must be finite; got nan"),
        (lambda: ops.lcss_loss(X, X, 1.0, weight=torch.ones(2, 1)), ValueError, r"weight must be .* got shape \(2, 1\)"),
        (lambda: ops.lcss_loss(X, X, 1.0, mirrored=X[:1]), ValueError, r"mirrored must have the shape of score, \(2, 3\); got \(1, 3\)"),
        (lambda: ops.denoising_loss(X, X[:1]), ValueError, "clean must have the shape of denoised"),
        (lambda: ops.denoising_loss(X, X.half()), TypeError, "clean must have the dtype of denoised"),
        (lambda: ops.denoising_loss(X, [1.0]), TypeError, "clean must be a tensor; got list"),
        (lambda: ops.denoising_loss(X, X, weight=math.inf), ValueError, "weight must be finite; got inf"),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


compiled_or_not = pytest.mark.parametrize(
    "compiled", [pytest.param(True, marks=pytest.mark.skipif(not _scale._compiled(), reason="the compiled library is missing")), False]
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("elements", [3, 40_000])
@compiled_or_not
def test_recorded_gradients_are_scaled_in_their_own_memory(dtype, elements, compiled, monkeypatch):
    monkeypatch.setattr(_scale, "_compiled", lambda: compiled)
    gradient = torch.randn(4, elements, dtype=dtype)
    factor = torch.tensor([1.0, -0.3, 0.0, 7.0]).to(torch.float64 if dtype == torch.float64 else torch.float32)
    expected = gradient * factor[:, None] if dtype != torch.bfloat16 else (gradient.float() * factor[:, None]).bfloat16()
    assert _scale.scale_samples(gradient, factor) is gradient
    assert torch.equal(gradient, expected)


def test_one_factor_for_all_samples_may_be_expanded():
    gradient = torch.randn(3, 2, 5)
    expected = 0.25 * gradient
    _scale.scale_samples(gradient, torch.tensor(0.25).expand(3))
    assert torch.equal(gradient, expected)


@compiled_or_not
def test_recorded_gradients_are_left_alone_where_the_factor_is_one(compiled, monkeypatch):
    monkeypatch.setattr(_scale, "_compiled", lambda: compiled)
    signalling = torch.tensor([0x7F800001], dtype=torch.int32).view(torch.float32).expand(2, 3).contiguous()  # a product would quieten it
    _scale.scale_samples(signalling, torch.ones(2))
    assert (signalling.view(torch.int32) == 0x7F800001).all()
