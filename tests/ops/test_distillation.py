"""The losses of SIM and of moment matching distillation."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff_kernels import ops

from ..helpers import FLOATS, assert_accurate, assert_bitwise, assert_independent_of_batch, assert_independent_of_threads

# In float64 the eager composition is itself the truth: test_any_shape_and_layout and the table's contract compare there.
NARROW = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(1, 1), (3, 5), (2, 4, 7, 3), (2, 16389), (1, 40000)]


def normals(*shape, count=3, dtype=torch.float64):
    """Tensors whose differences are far smaller than they are, as two denoisers' are."""
    base = torch.randn(*shape, dtype=torch.float64)
    return [(base + 0.1 * torch.randn(*shape, dtype=torch.float64)).to(dtype) for _ in range(count)]


def constants(batch):
    return torch.rand(batch, dtype=torch.float32) + 0.5


def eager_sim(fake, teacher, sample, weight, c, distance):
    gap, error = fake - teacher, fake - sample
    product = (gap * error).flatten(1).sum(1)
    norm = ((gap**2).flatten(1).sum(1) + c**2).sqrt() if distance == "pseudo_huber" else 1.0
    return -weight * product / norm


def eager_moment(sample, auxiliary, teacher, weight):
    return weight * (sample * (auxiliary - teacher).detach()).flatten(1).sum(1)


def eager_auxiliary(sample, auxiliary, teacher, weight):
    return weight * ((sample - auxiliary) ** 2 + (teacher - auxiliary) ** 2).flatten(1).sum(1)


def sim(fake, teacher, sample, weight, c, distance):
    return ops.sim_loss(fake, teacher, sample, weight=weight, c=c, distance=distance)


MOMENT_LOSSES = [(ops.moment_matching_loss, eager_moment, 0), (ops.moment_matching_auxiliary_loss, eager_auxiliary, 1)]
BOTH_MOMENT_LOSSES = pytest.mark.parametrize(("loss", "eager", "differentiated"), MOMENT_LOSSES)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("distance", ["pseudo_huber", "l2"])
@pytest.mark.parametrize("shape", SHAPES)
def test_sim_loss_is_as_accurate_as_eager(shape, distance, dtype):
    inputs = [x.requires_grad_() for x in normals(*shape)]
    assert_accurate(_wide_constants(sim), _wide_constants(eager_sim), [*inputs, constants(shape[0]), constants(shape[0]), distance], dtype)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("shape", SHAPES)
@BOTH_MOMENT_LOSSES
def test_moment_matching_losses_are_as_accurate_as_eager(loss, eager, differentiated, shape, dtype):
    inputs = normals(*shape)
    inputs[differentiated].requires_grad_()

    def ours(*args):
        return loss(*args[:3], weight=args[3])

    assert_accurate(_wide_constants(ours), _wide_constants(eager), [*inputs, constants(shape[0])], dtype)


def _wide_constants(fn):
    """fn with the constants [B] in float32 or float64 whatever the inputs' dtype."""

    def call(*args):
        wide = torch.float64 if args[0].dtype == torch.float64 else torch.float32
        return fn(*args[:3], *[a.to(wide) if isinstance(a, torch.Tensor) else a for a in args[3:]])

    return call


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 4), st.lists(st.integers(1, 9), max_size=3), st.booleans(), st.sampled_from(["pseudo_huber", "l2"]))
def test_any_shape_and_layout(batch, shape, permuted, distance):
    inputs = [torch.randn(batch, *shape, dtype=torch.float64) for _ in range(3)]
    if permuted:
        inputs = [x.permute(0, *reversed(range(1, x.dim()))) for x in inputs]
    weight, c = torch.rand(batch, dtype=torch.float64), torch.rand(batch, dtype=torch.float64)
    torch.testing.assert_close(sim(*inputs, weight, c, distance), _flat(eager_sim, inputs, weight, c, distance))
    for loss, eager, _ in MOMENT_LOSSES:
        torch.testing.assert_close(loss(*inputs, weight=weight), _flat(eager, inputs, weight))


def _flat(eager, inputs, *rest):
    return eager(*[x.reshape(x.shape[0], math.prod(x.shape[1:])) for x in inputs], *rest)


@pytest.mark.parametrize("distance", ["pseudo_huber", "l2"])
def test_sim_gradients_are_the_formulas_of_the_docstring(distance):
    fake, teacher, sample = (x.requires_grad_() for x in normals(3, 6))
    upstream = torch.randn(3, dtype=torch.float64)
    loss = ops.sim_loss(fake, teacher, sample, weight=1.5, c=0.2, distance=distance)
    found = torch.autograd.grad(loss, (fake, teacher, sample), upstream)
    y, e = (fake - teacher).detach(), (fake - sample).detach()
    n = (y.square().sum(1, keepdim=True) + 0.04).sqrt() if distance == "pseudo_huber" else torch.ones(3, 1, dtype=torch.float64)
    radial = (y * e).sum(1, keepdim=True) * y / n**3 if distance == "pseudo_huber" else 0 * y
    scale = 1.5 * upstream[:, None]
    to_sample, to_teacher = scale * y / n, scale * (e / n - radial)
    for actual, expected in zip(found, (-(to_sample + to_teacher), to_teacher, to_sample), strict=True):
        torch.testing.assert_close(actual, expected)


def raw_outputs(*shape, dtype=torch.float64, spread=0.1):
    """Two raw outputs that differ by `spread`, clean and noisy samples, and EDM's c_skip and c_out [B] at levels from 0.02 to 5."""
    base, gap, clean, noise = torch.randn(4, *shape, dtype=torch.float64)
    sigma = torch.logspace(-1.7, 0.7, shape[0], dtype=torch.float64)
    variance = sigma**2 + 0.25
    noisy = clean + sigma.reshape(-1, *[1] * (len(shape) - 1)) * noise
    return [base.to(dtype), (base + spread * gap).to(dtype), clean, noisy, 0.25 / variance, 0.5 * sigma / variance.sqrt()]


def eager_raw(fake, teacher, sample, noisy, c_skip, c_out, distance):
    c_skip, c_out = (c.reshape(-1, *[1] * (sample.dim() - 1)) for c in (c_skip, c_out))
    return eager_sim(c_skip * noisy + c_out * fake, c_skip * noisy + c_out * teacher, sample, 1.5, 0.2, distance)


def sim_raw(fake, teacher, sample, noisy, c_skip, c_out, distance, **options):
    return ops.sim_loss(
        fake, teacher, sample, weight=1.5, c=0.2, distance=distance, raw=True, noisy=noisy, c_skip=c_skip, c_out=c_out, **options
    )


@pytest.mark.parametrize("distance", ["pseudo_huber", "l2"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 4, 7, 3), (2, 16389)])
def test_raw_outputs_give_the_loss_and_gradients_of_their_denoisers(shape, distance):
    *tensors, c_skip, c_out = raw_outputs(*shape)
    leaves = [t.requires_grad_() for t in tensors]
    losses = [loss(*leaves, c_skip, c_out, distance) for loss in (sim_raw, eager_raw)]
    torch.testing.assert_close(*losses)
    for ours, eager in zip(*(torch.autograd.grad(loss.sum(), leaves) for loss in losses), strict=True):
        torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_raw_outputs_of_16_bits_stand_beside_float32_samples(dtype):
    fake, teacher, sample, noisy, c_skip, c_out = raw_outputs(4, 300, dtype=dtype)
    call = [fake, teacher, sample.float(), noisy.float(), c_skip.float(), c_out.float()]
    leaves = [t.requires_grad_() for t in call[:4]]
    loss = sim_raw(*leaves, *call[4:], "pseudo_huber")
    grads = torch.autograd.grad(loss.sum(), leaves)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    truth = eager_raw(*wide, *(c.double() for c in call[4:]), "pseudo_huber")
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-5)
    for grad, leaf, expected in zip(grads, leaves, torch.autograd.grad(truth.sum(), wide), strict=True):
        assert grad.dtype == leaf.dtype
        rounding = torch.finfo(grad.dtype).eps * expected.abs().max()
        assert (grad.double() - expected).abs().max() <= 2 * rounding


def relative_error(found, truth):
    return ((found - truth).norm(dim=1) / truth.norm(dim=1)).mean().item()


@pytest.mark.parametrize("sigma", [0.02, 0.2])
def test_raw_outputs_lose_less_to_16_bits_than_denoised_ones(sigma):
    """At small noise c_out = sigma: what a denoised sample loses to its last place is a far larger part of the difference."""
    torch.manual_seed(0)
    fake, clean, noise = torch.randn(3, 8, 3072, dtype=torch.float64)
    teacher = fake + 0.1 * torch.randn(8, 3072, dtype=torch.float64)
    variance = sigma**2 + 0.25
    c_skip, c_out = 0.25 / variance, 0.5 * sigma / variance**0.5
    noisy = 0.5 * clean + sigma * noise
    truth = c_out * (fake - teacher)
    denoised = [(c_skip * noisy + c_out * f).bfloat16() for f in (fake, teacher)]
    stored = denoised[0].double() - denoised[1].double()
    raw = c_out * (fake.bfloat16().double() - teacher.bfloat16().double())
    assert relative_error(stored, truth) > 0.3 / sigma * relative_error(raw, truth)
    # The op forms the second, not the first.
    options = {"raw": True, "noisy": noisy.float(), "c_skip": c_skip, "c_out": c_out, "return_gap": True}
    _, gap = ops.sim_loss(fake.bfloat16(), teacher.bfloat16(), 0.5 * clean.float(), **options)
    torch.testing.assert_close(gap.double(), raw.norm(dim=1), rtol=1e-6, atol=0)


def test_the_gap_is_the_norm_of_the_difference():
    fake, teacher, sample = normals(3, 4, 9)
    loss, gap = ops.sim_loss(fake.requires_grad_(), teacher, sample, return_gap=True)
    assert_bitwise(loss, ops.sim_loss(fake, teacher, sample))
    torch.testing.assert_close(gap, (fake - teacher).detach().flatten(1).norm(dim=1))
    assert loss.requires_grad
    assert not gap.requires_grad


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"raw": True}, ValueError, "raw=True needs noisy, which is None"),
        ({"raw": True, "noisy": torch.zeros(2, 3), "c_skip": 1.0}, ValueError, "raw=True needs c_out, which is None"),
        ({"c_out": 1.0}, ValueError, "c_out belongs to raw=True and must be None beside denoised outputs"),
        ({"raw": True, "noisy": torch.zeros(1, 3), "c_skip": 1.0, "c_out": 1.0}, ValueError, "noisy must have the shape of sample"),
        ({"raw": True, "noisy": torch.zeros(2, 3), "c_skip": math.nan, "c_out": 1.0}, ValueError, "c_skip must be finite; got nan"),
    ],
)
def test_bad_preconditioning_is_named(options, error, message):
    with pytest.raises(error, match=message):
        ops.sim_loss(*[torch.zeros(2, 3)] * 3, **options)


@BOTH_MOMENT_LOSSES
def test_a_second_backward_gives_what_the_first_gave(loss, eager, differentiated):
    inputs = normals(3, 2000, dtype=torch.float32)
    leaf = inputs[differentiated].requires_grad_()
    value = loss(*inputs, weight=0.7)
    upstream = torch.randn_like(value)
    first, second = (torch.autograd.grad(value, leaf, upstream, retain_graph=True)[0] for _ in range(2))
    assert_bitwise(second, first)


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_sim_gradient_to_the_sample_is_bounded_by_the_weight(size):
    """However far the two denoisers are apart: the robustness that the pseudo-Huber distance is for."""
    fake, teacher, sample = normals(4, 30)
    sample.requires_grad_()
    ops.sim_loss(fake * size, teacher * size, sample, weight=0.7, c=1e-3).sum().backward()
    assert sample.grad.norm(dim=1).max() <= 0.7


def test_sim_loss_without_a_gap_is_zero_with_zero_gradients():
    fake, _, sample = normals(3, 6, dtype=torch.float32)
    leaves = [x.clone().requires_grad_() for x in (fake, fake, sample)]
    loss = ops.sim_loss(*leaves)
    loss.sum().backward()
    assert_bitwise(loss.abs(), torch.zeros(3))
    for leaf in leaves:
        assert_bitwise(leaf.grad.abs(), torch.zeros(3, 6))


def test_sim_loss_without_a_gap_but_with_c_pushes_along_the_error():
    fake, _, sample = normals(3, 6)
    teacher = fake.clone().requires_grad_()
    loss = ops.sim_loss(fake, teacher, sample, c=0.5)
    (grad,) = torch.autograd.grad(loss.sum(), teacher)
    assert_bitwise(loss.abs(), torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(grad, (fake - sample) / 0.5)


def test_sim_loss_of_a_large_constant_tends_to_l2():
    inputs, c = normals(3, 6), 1e6
    torch.testing.assert_close(c * sim(*inputs, 1.0, c, "pseudo_huber"), sim(*inputs, 1.0, 0.0, "l2"))


def test_sim_loss_does_not_change_when_everything_is_moved_or_scaled():
    inputs, shift = normals(3, 6), torch.randn(6, dtype=torch.float64)
    plain = ops.sim_loss(*inputs, c=0.3)
    torch.testing.assert_close(ops.sim_loss(*[x + shift for x in inputs], c=0.3), plain)
    torch.testing.assert_close(ops.sim_loss(*[4 * x for x in inputs], c=1.2), 4 * plain)


def mean_shift(spread, sigma, shift, c):
    """Data N(mu, c0^2), generator N(b, c0^2): the mean loss's gradient in b, and Delta / (v sqrt(|Delta|^2 + C^2 v^2)), which it is."""
    shift = torch.as_tensor(shift, dtype=torch.float64)  # Delta = b - mu, [d]; mu = 0
    variance = spread**2 + sigma**2
    b = shift.clone().requires_grad_()
    z, noise = torch.randn(2, 5, len(shift), dtype=torch.float64)
    # Antithetic pairs make the estimate exact, the loss being linear in z and the noise.
    z, noise = torch.cat((z, -z)), torch.cat((noise, -noise))
    sample = b + spread * z
    noisy = sample + sigma * noise
    kept = spread**2 / variance
    fake, teacher = kept * noisy + (1 - kept) * b.detach(), kept * noisy
    # Scores are (D - x) / sigma^2: a distance of scores with constant C is one of denoisers with C sigma^2.
    loss = ops.sim_loss(fake, teacher, sample, weight=1 / sigma**2, c=c * sigma**2).mean()
    (found,) = torch.autograd.grad(loss, b)
    assert loss.item() == pytest.approx(0, abs=1e-12 / sigma**2)
    return found, shift / (variance * (shift.square().sum() + (c * variance) ** 2).sqrt())


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    spread=st.floats(0.1, 3.0),
    sigma=st.floats(0.1, 10.0),
    shift=st.lists(st.floats(-3, 3).filter(lambda value: abs(value) > 1e-2), min_size=1, max_size=6),
    c=st.one_of(st.just(0.0), st.floats(1e-3, 3.0)),
)
def test_sim_gradient_of_a_mean_shift(spread, sigma, shift, c):
    torch.testing.assert_close(*mean_shift(spread, sigma, shift, c), rtol=1e-8, atol=1e-12)


def test_sim_gradient_of_a_mean_shift_printed_value():
    assert mean_shift(0.9, 0.7, [0.37], 0.4)[0].item() == pytest.approx(0.4459654, abs=5e-8)


def test_moment_matching_gradients_go_where_the_names_say():
    inputs = [x.requires_grad_() for x in normals(3, 6)]
    sample, auxiliary, teacher = inputs
    grads = torch.autograd.grad(ops.moment_matching_loss(*inputs, weight=0.5).sum(), inputs, allow_unused=True)
    torch.testing.assert_close(grads[0], 0.5 * (auxiliary - teacher).detach())
    assert grads[1:] == (None, None)
    grads = torch.autograd.grad(ops.moment_matching_auxiliary_loss(*inputs, weight=0.5).sum(), inputs, allow_unused=True)
    torch.testing.assert_close(grads[1], (2 * auxiliary - sample - teacher).detach())
    assert grads[::2] == (None, None)


def test_the_auxiliary_loss_is_least_halfway_between_sample_and_teacher():
    sample, _, teacher = normals(3, 6)
    halfway = (0.5 * (sample + teacher)).requires_grad_()
    loss = ops.moment_matching_auxiliary_loss(sample, halfway, teacher)
    (grad,) = torch.autograd.grad(loss.sum(), halfway)
    torch.testing.assert_close(grad, torch.zeros_like(grad))
    torch.testing.assert_close(loss.detach(), 0.5 * (sample - teacher).square().sum(1))


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_sample_does_not_depend_on_its_batch_or_the_threads(dtype):
    def run(fake, teacher, sample, weight):
        leaves = [x.detach().requires_grad_() for x in (fake, teacher, sample)]
        losses = [
            ops.sim_loss(*leaves, weight=weight, c=0.1),
            ops.moment_matching_loss(*leaves, weight=weight),
            ops.moment_matching_auxiliary_loss(*leaves, weight=weight),
        ]
        return [*[x.detach() for x in losses], *torch.autograd.grad(sum(x.sum() for x in losses), leaves)]

    inputs = [*normals(3, 33001, dtype=dtype), torch.rand(3, dtype=torch.float64 if dtype == torch.float64 else torch.float32)]
    assert_independent_of_batch(run, *inputs)
    assert_independent_of_threads(lambda: run(*inputs))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_values_stay_in_their_sample(value):
    inputs = normals(3, 6, dtype=torch.float32)
    clean = [sim(*inputs, 1.0, 0.1, "pseudo_huber"), *[loss(*inputs) for loss, _, _ in MOMENT_LOSSES]]
    inputs[2][1, 3] = value
    broken = [sim(*inputs, 1.0, 0.1, "pseudo_huber"), *[loss(*inputs) for loss, _, _ in MOMENT_LOSSES]]
    for before, after in zip(clean, broken, strict=True):
        assert not after[1].isfinite()
        assert_bitwise(after[::2], before[::2])


@pytest.mark.parametrize("loss", [ops.sim_loss, ops.moment_matching_loss, ops.moment_matching_auxiliary_loss])
def test_bad_tensors_are_named(loss):
    x = torch.zeros(2, 3)
    names = ["fake", "teacher", "sample"] if loss is ops.sim_loss else ["sample", "auxiliary", "teacher"]
    with pytest.raises(TypeError, match=f"{names[0]} must be a tensor; got float"):
        loss(1.0, x, x)
    with pytest.raises(TypeError, match=f"{names[0]} must be float32, .*; got torch.int64"):
        loss(x.long(), x, x)
    with pytest.raises(ValueError, match=f"{names[0]} must have at least 1 dimension"):
        loss(torch.zeros(()), x, x)
    for i in (1, 2):
        with pytest.raises(ValueError, match=rf"{names[i]} must have the shape of {names[0]}, \(2, 3\); got \(2, 4\)"):
            loss(*[torch.zeros(2, 4) if j == i else x for j in range(3)])
        with pytest.raises(TypeError, match=f"{names[i]} must .*torch.float32.*; got torch.float64"):
            loss(*[x.double() if j == i else x for j in range(3)])
        with pytest.raises(ValueError, match=f"{names[i]} must be on the device of {names[0]}, cpu; got meta"):
            loss(*[x.to("meta") if j == i else x for j in range(3)])


@pytest.mark.parametrize("loss", [ops.sim_loss, ops.moment_matching_loss, ops.moment_matching_auxiliary_loss])
@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        ("1", TypeError, "weight must be a float or a tensor; got str"),
        (float("nan"), ValueError, "weight must be finite; got nan"),
        (torch.tensor([1.0, float("inf")]), ValueError, "weight must be finite; got inf"),
        (torch.ones(3), ValueError, r"weight must be a float, a 0-d tensor or of shape \(2,\); got shape \(3,\)"),
        (torch.ones(2, 1), ValueError, r"got shape \(2, 1\)"),
        (torch.ones(2, dtype=torch.int64), TypeError, "weight must be float32 or float64; got torch.int64"),
        (torch.ones(2, requires_grad=True), ValueError, "weight is a constant and must not require grad"),
    ],
)
def test_bad_weights_are_named(loss, weight, error, message):
    x = torch.zeros(2, 3)
    with pytest.raises(error, match=message):
        loss(x, x, x, weight=weight)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"c": -0.1}, "c must be finite and at least 0; got -0.1"),
        ({"c": torch.tensor([0.1, -0.2])}, "c must be finite and at least 0; got -0.2"),
        ({"c": float("nan")}, "c must be finite and at least 0; got nan"),
        ({"c": torch.ones(2, requires_grad=True)}, "c is a constant and must not require grad"),
        ({"distance": "l1"}, "distance must be one of 'pseudo_huber', 'l2'; got 'l1'"),
    ],
)
def test_bad_constants_of_sim_are_named(arguments, message):
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=message):
        ops.sim_loss(x, x, x, **arguments)
