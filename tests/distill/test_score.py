"""Score training: what DSM and LCSS minimise, and how they are related."""

from __future__ import annotations

import pytest
import torch

from fastdiff_kernels import ops
from fastdiff_kernels.diffusion import Schedule, edm_weight
from fastdiff_kernels.distill import LearningRate, MomentMatchingDistiller, ScoreTrainer


def gradients(loss, module):
    found = torch.autograd.grad(loss, list(module.parameters()), retain_graph=True)
    return torch.cat([gradient.flatten() for gradient in found])


def gaussian_data(count, d, std, seed=0):
    return std * torch.randn(count, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("c", "sigma", "d", "gamma", "k"), [(1.3, 0.6, 4, 1.0, 0.4), (0.7, 1.1, 3, 1.0, 0.9), (1.0, 0.5, 2, 0.6, 0.3), (0.4, 0.9, 5, 1.7, 1.0)]
)
def test_lcss_value_and_minimiser_for_a_linear_score(c, sigma, d, gamma, k):
    # data N(0, c^2 I_d), s(x) = -k x:  J(k) = -gamma k d + k^2 d (c^2 + sigma^2) / 2,  k* = gamma / (c^2 + sigma^2)
    x = gaussian_data(200_000, d, c)
    noisy = ops.lcss_perturb(x, sigma, 11)
    linear = ops.lcss_loss(-noisy, 11, sigma, gamma=gamma).mean() - noisy.square().sum(1).mean() / 2  # coefficient of k
    curvature = noisy.square().sum(1).mean()
    total = c**2 + sigma**2
    assert (-linear / curvature).item() == pytest.approx(gamma / total, rel=0.02)
    assert ops.lcss_loss(-k * noisy, 11, sigma, gamma=gamma).mean().item() == pytest.approx(
        -gamma * k * d + k**2 * d * total / 2, abs=0.02 * gamma * k * d
    )


def test_lcss_printed_oracle():
    c, sigma, d = 1.3, 0.6, 4
    noisy = ops.lcss_perturb(gaussian_data(200_000, d, c), sigma, 5)
    k = 1 / (c**2 + sigma**2)
    assert k == pytest.approx(0.487805, abs=1e-6)
    assert ops.lcss_loss(-k * noisy, 5, sigma).mean().item() == pytest.approx(-0.975610, rel=0.02)
    assert ops.lcss_loss(-0.4 * noisy, 5, sigma).mean().item() == pytest.approx(-0.944, rel=0.02)


@pytest.mark.parametrize(("c", "sigma_t", "sigma"), [(1.0, 0.8, 0.3), (0.6, 0.5, 1.0), (1.5, 0.4, 0.8)])
@pytest.mark.parametrize("antithetic", [False, True])
def test_reading_a_estimates_the_score_at_the_total_noise_level(linear_score_denoiser, c, sigma_t, sigma, antithetic):
    denoiser = linear_score_denoiser(0.3)
    trainer = ScoreTrainer(denoiser, loss="lcss", reading="A", local_ratio=sigma / sigma_t, antithetic=antithetic)
    total = torch.full((100_000,), (sigma_t**2 + sigma**2) ** 0.5)
    losses = trainer.lcss_losses(gaussian_data(100_000, 2, c), total, 3, {}).mean()
    (slope,) = torch.autograd.grad(losses, denoiser.k, create_graph=True)
    (curvature,) = torch.autograd.grad(slope, denoiser.k)
    # the loss is quadratic in k: one Newton step is exact
    assert (denoiser.k - slope / curvature).item() == pytest.approx(1 / (c**2 + sigma_t**2 + sigma**2), rel=0.02)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_reading_b_estimates_gamma_times_the_score(linear_score_denoiser, gamma):
    denoiser = linear_score_denoiser(0.3)
    trainer = ScoreTrainer(denoiser, loss="lcss", reading="B", gamma=gamma)
    losses = trainer.lcss_losses(gaussian_data(100_000, 2, 0.8), torch.full((100_000,), 0.6), 3, {}).mean()
    (slope,) = torch.autograd.grad(losses, denoiser.k, create_graph=True)
    (curvature,) = torch.autograd.grad(slope, denoiser.k)
    assert (denoiser.k - slope / curvature).item() == pytest.approx(gamma / (0.8**2 + 0.6**2), rel=0.02)


@pytest.mark.parametrize("sigma", [0.05, 0.6, 7.0])
def test_reading_b_has_the_gradient_of_dsm_sample_by_sample(tiny_denoiser, sigma):
    denoiser = tiny_denoiser(dtype=torch.float64)
    trainer = ScoreTrainer(denoiser, loss="lcss", reading="B", gamma=1.0)
    clean, labels, sigmas = torch.randn(3, 1, 4, 4, dtype=torch.float64), torch.tensor([0, 1, 2]), torch.full((3,), sigma)
    noise = ops.lcss_noise(clean, 17)
    lcss = trainer.lcss_losses(clean, sigmas, 17, {"class_labels": labels})
    dsm = trainer.dsm_losses(clean, sigmas, noise, {"class_labels": labels})
    for sample in range(3):
        expected = gradients(dsm[sample], denoiser)
        torch.testing.assert_close(gradients(lcss[sample], denoiser), expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item())
    # the values differ by the constant weight |xi|^2 / (2 sigma^2), weight = 2 sigma^4 lambda
    constant = (sigmas.double() ** 2 * edm_weight(sigmas.double())) * noise.square().flatten(1).sum(1)
    torch.testing.assert_close(lcss + constant, dsm, rtol=1e-5, atol=1e-6)


def test_gamma_other_than_one_is_not_dsm(tiny_denoiser):
    denoiser = tiny_denoiser(dtype=torch.float64)
    clean, sigmas = torch.randn(3, 1, 4, 4, dtype=torch.float64), torch.full((3,), 0.6)
    dsm, lcss = (
        gradients(ScoreTrainer(denoiser, loss="lcss", reading="B", gamma=gamma).lcss_losses(clean, sigmas, 17, {}).sum(), denoiser)
        for gamma in (1.0, 1.3)
    )
    assert (dsm - lcss).norm() > 0.01 * dsm.norm()


def test_antithetic_pairs_lower_the_variance_and_keep_the_mean(linear_score_denoiser):
    denoiser, clean = linear_score_denoiser(1.2), gaussian_data(50_000, 2, 0.8)
    losses = {}
    for antithetic in (False, True):
        trainer = ScoreTrainer(denoiser, loss="lcss", local_ratio=0.2, antithetic=antithetic, seed=1)
        losses[antithetic] = trainer.lcss_losses(clean, torch.full((50_000,), 0.5), 3, {}).detach()
    assert losses[True].var() < 0.25 * losses[False].var()
    spread = (losses[False].var() / 50_000).sqrt().item()
    assert losses[True].mean().item() == pytest.approx(losses[False].mean().item(), abs=5 * spread)


@pytest.mark.parametrize(
    "options", [{"loss": "dsm"}, {"loss": "lcss"}, {"loss": "lcss", "reading": "B"}, {"loss": "lcss", "antithetic": True}]
)
def test_training_finds_the_gaussian(gaussian_denoiser, options):
    denoiser = gaussian_denoiser(0.0, 1.0)
    trainer = ScoreTrainer(denoiser, learning_rate=LearningRate(0.05, "cosine", 200), clip=1.0, ema_decay=0.9, **options)
    rng = torch.Generator().manual_seed(0)
    for _ in range(200):
        trainer.step(0.7 + 0.4 * torch.randn(512, 1, dtype=torch.float64, generator=rng))
    assert trainer.generator.mean.item() == pytest.approx(0.7, abs=0.05)
    assert trainer.generator.std.abs().item() == pytest.approx(0.4, abs=0.05)
    samples = trainer.sample(2000, schedule=Schedule.karras(18, 0.01, 20.0))
    assert samples.mean().item() == pytest.approx(0.7, abs=0.1)
    assert samples.std().item() == pytest.approx(0.4, abs=0.06)


def test_dropped_labels_become_the_null_class(tiny_denoiser):
    seen = []
    denoiser = tiny_denoiser()
    denoiser.network.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["class_labels"]), with_kwargs=True)
    trainer = ScoreTrainer(denoiser, label_dropout=0.3)
    labels = torch.arange(2000) % 3
    trainer.step(torch.zeros(2000, 1, 2, 2), {"class_labels": labels})
    dropped = seen[0] == 3
    assert dropped.float().mean().item() == pytest.approx(0.3, abs=0.05)
    assert torch.equal(seen[0][~dropped], labels[~dropped])


@pytest.mark.parametrize("null_label", [0, 2])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_any_class_can_be_the_null_class(linear_denoiser, null_label, dtype):
    class Labelled(linear_denoiser):
        def forward(self, x, sigma, class_labels):
            seen.append(class_labels)
            return super().forward(x, sigma)

    seen = []
    trainer = ScoreTrainer(Labelled(0.5), label_dropout=1.0, null_label=null_label)
    trainer.step(torch.zeros(4, 1, dtype=torch.float64), {"class_labels": torch.arange(4, dtype=dtype)})
    assert seen[0].tolist() == [null_label] * 4
    assert seen[0].dtype == dtype


def test_losses_are_reported_per_element(tiny_denoiser):
    torch.manual_seed(0)
    metrics = ScoreTrainer(tiny_denoiser()).step(0.5 * torch.randn(64, 1, 4, 4))
    assert set(metrics) == {"loss", "gradient_norm"}
    # the EDM weight makes the raw network regress on a target of unit variance
    assert 0.3 < metrics["loss"] < 4


@pytest.mark.parametrize("loss", ["dsm", "lcss"])
def test_a_step_descends_the_mean_over_all_elements(tiny_denoiser, loss):
    batch = 0.5 * torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    options = {"reading": "B"} if loss == "lcss" else {}
    metrics = ScoreTrainer(tiny_denoiser(), loss=loss, **options).step(batch)
    same = ScoreTrainer(tiny_denoiser(), loss=loss, **options)
    sigma = same.noise_law(4, same.rng)
    if loss == "dsm":
        losses = same.dsm_losses(batch, sigma, torch.randn(batch.shape, generator=same.rng), {})
    else:
        losses = same.lcss_losses(batch, sigma, same._op_seed(1), {})
    mean = losses.sum() / batch.numel()
    assert metrics["loss"] == pytest.approx(mean.item(), rel=1e-5)
    assert metrics["gradient_norm"] == pytest.approx(gradients(mean, same.denoiser).norm().item(), rel=1e-4)


def test_samples_need_a_shape(tiny_denoiser):
    trainer = ScoreTrainer(tiny_denoiser())
    with pytest.raises(ValueError, match="sample_shape must be given"):
        trainer.sample(2)
    assert ScoreTrainer(tiny_denoiser(), sample_shape=(1, 4, 4)).sample(2, schedule=Schedule.karras(3, 0.1, 10.0)).shape == (2, 1, 4, 4)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"loss": "ssm"}, ValueError, "loss must be one of 'dsm', 'lcss', got 'ssm'"),
        ({"loss": "lcss", "reading": "C"}, ValueError, "reading must be one of 'A', 'B', got 'C'"),
        ({"loss": "lcss", "gamma": 0.0}, ValueError, "gamma must be finite and > 0"),
        ({"loss": "lcss", "local_ratio": -1.0}, ValueError, "local_ratio must be finite and > 0"),
        ({"antithetic": True}, ValueError, "antithetic belongs to loss=\"lcss\", got loss='dsm'"),
        ({"reading": "A"}, ValueError, "reading belongs to loss=\"lcss\", got loss='dsm'"),
        ({"gamma": 2}, ValueError, "gamma belongs to loss=\"lcss\", got loss='dsm'"),
        ({"local_ratio": 7.0}, ValueError, "local_ratio belongs to loss=\"lcss\", got loss='dsm'"),
        ({"loss": "lcss", "reading": "B", "local_ratio": 7.0}, ValueError, "local_ratio belongs to reading=\"A\", got reading='B'"),
        ({"loss": "lcss", "antithetic": "no"}, TypeError, "antithetic must be a bool, got str"),
        ({"label_dropout": 1.5}, ValueError, "label_dropout must be finite"),
        ({"null_label": 4}, ValueError, "null_label must be at most 3, the network's num_classes, got 4"),
        ({"null_label": -1}, ValueError, "null_label must be at least 0, got -1"),
        ({"null_label": 3.0}, TypeError, "null_label must be an int, got float"),
        ({"ema_decay": 2.0}, ValueError, "ema_decay must be finite"),
        ({"learning_rate": 0.0}, ValueError, "peak must be finite|learning_rate must be finite"),
        ({"learning_rate": "fast"}, TypeError, "learning_rate must be a number, got str"),
        ({"clip": 0.0}, ValueError, "clip must be finite and > 0"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
        ({"sample_shape": (0, 4)}, ValueError, "sample_shape must be a sequence of positive ints"),
    ],
)
def test_bad_arguments(tiny_denoiser, options, error, message):
    with pytest.raises(error, match=message):
        ScoreTrainer(tiny_denoiser(), **options)


def test_bad_denoisers(linear_denoiser):
    with pytest.raises(TypeError, match=r"denoiser must be a torch\.nn\.Module"):
        ScoreTrainer(lambda x, sigma: x)
    with pytest.raises(ValueError, match="denoiser must have parameters"):
        ScoreTrainer(torch.nn.Identity())
    with pytest.raises(ValueError, match="sigma_data must be given"):
        ScoreTrainer(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="null_label must be given"):
        ScoreTrainer(linear_denoiser(1.0), label_dropout=0.1)


def test_a_frozen_denoiser_is_named(tiny_denoiser):
    """A teacher is frozen by its distiller; that it can be trained no longer is said."""
    teacher = tiny_denoiser()
    MomentMatchingDistiller(teacher, num_steps=1)
    with pytest.raises(ValueError, match="denoiser must have parameters that require grad; got EDMPrecond with none: it is frozen, as"):
        ScoreTrainer(teacher)
    assert not teacher.training
    ScoreTrainer(teacher.requires_grad_(True))


def test_bad_batches(tiny_denoiser):
    trainer = ScoreTrainer(tiny_denoiser(), label_dropout=0.1)
    images, labels = torch.zeros(2, 1, 4, 4), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(TypeError, match="batch must be a tensor of clean data"):
        trainer.step(4)
    with pytest.raises(TypeError, match=r"dtype torch\.float32, got torch\.float64"):
        trainer.step(images.double())
    with pytest.raises(ValueError, match=r"conditioning\['class_labels'\] must have shape \[2, ...\], got \[3\]"):
        trainer.step(images, {"class_labels": torch.zeros(3, dtype=torch.int64)})
    with pytest.raises(TypeError, match=r"conditioning\['class_labels'\] must be a tensor, got list"):
        trainer.step(images, {"class_labels": [0, 1]})
    with pytest.raises(TypeError, match="conditioning must be a mapping"):
        trainer.step(images, labels)
    for missing in (None, {}, {"class_labels": None}):
        with pytest.raises(ValueError, match=r"conditioning must hold class_labels with label_dropout=0.1, got \[\]"):
            trainer.step(images, missing)
    with pytest.raises(TypeError, match=r"conditioning\['class_labels'\] must be class indices, int64 or int32, .* got torch.float32"):
        trainer.step(images, {"class_labels": torch.eye(2, 3)})
    with pytest.raises(ValueError, match=r"conditioning\['class_labels'\] must have shape \[B\] with label_dropout, got \[2, 3\]"):
        trainer.step(images, {"class_labels": torch.eye(2, 3, dtype=torch.int64)})
    assert not trainer.torn
    trainer.step(images, {"class_labels": labels})
    with pytest.raises(ValueError, match=r"batch must have shape \[B, 1, 4, 4\], got \[2, 1, 8, 8\]"):
        trainer.step(torch.zeros(2, 1, 8, 8), {"class_labels": labels})
