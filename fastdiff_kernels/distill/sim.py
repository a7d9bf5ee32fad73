"""Score implicit matching: distilling a diffusion model into a one-step generator without data."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from .. import ops
from .._checks import check_choice, check_count, check_number
from ..diffusion import edm_weight
from ._checks import check_conditioning, check_data, check_denoiser, check_shape
from .learning_rate import LearningRate
from .noise_law import EDM_LAW, NoiseLaw, draw_levels
from .recipe import Learner, Recipe, data_scale, frozen, mixed_seed, per_element, per_sample, same_level, trainable_copy


class SIMDistiller(Recipe[int]):
    """Score Implicit Matching (Luo, Huang, Geng, Kolter, Qi 2024), alternating.

    The generator is the denoiser run once, g(z) = D(sigma_init z, sigma_init). Each step first fits the fake denoiser to it,
    lambda |D_fake(x0 + sigma eps, sigma) - x0|^2 with x0 = g(z) and the EDM weight, and then moves the generator down

        -weight <y, e> / n,   y = D_fake(x_t) - D_teacher(x_t),   e = D_fake(x_t) - x0,   n = sqrt(|y|^2 + c^2)   or 1 for "l2",

    with x_t = x0 + sigma eps. The gradient passes through x0, and through the inputs of both frozen denoisers: without those two
    terms it is that of another loss. The loss itself is 0 on average at any generator and says nothing about convergence; `gap` does.

    Args:
        teacher: denoiser module, float32 or float64; it is put into evaluation mode and its parameters are frozen. Generator
            and fake start as copies, in which what is frozen beside trained parameters stays frozen. A number in the attribute `guidance`
            is 1 in them: they learn the guided teacher's law with one evaluation for a sample.
        sample_shape: shape of one sample, for example (3, 32, 32).
        sigma_init: the noise level the generator is called at.
        learning_rate, fake_learning_rate: numbers or `LearningRate`s; the fake's is the generator's unless given.
        distance: "pseudo_huber" or "l2". "l2" divides each sample's weight by mean |x0 - D_teacher|, as SiD does (Zhou et al. 2024),
            since otherwise large noise levels drown the others.
        c: of "pseudo_huber" alone, its constant, on the norm over all elements of a denoised sample; 1e-3 unless given.
        weight: weight(sigma) [B] -> [B]; 1 unless given.
        generator_law, fake_law: noise levels of either half, EDM's log-normal unless given; called as law(count, generator) and giving
            float32 [count], > 0.
        sigma_data: scale of the data in the fake's weight; the teacher's own unless given.
        fake_steps: updates of the fake for one of the generator.
        betas, eps, clip: of both Adams, and the norm the gradients are clipped at (None: not).
        ema_decay: of the averaged generator.
        seed: of everything random.
        autocast: torch.bfloat16 or torch.float16 to run the networks in, or None. Their outputs should stay float32: y is a small
            difference.
    """

    SETTINGS = ("sigma_init", "distance", "c", "weight", "generator_law", "fake_law", "sigma_data", "fake_steps")
    sample_shape: tuple[int, ...]

    def __init__(
        self,
        teacher: nn.Module,
        *,
        sample_shape: tuple[int, ...],
        sigma_init: float = 2.5,
        learning_rate: float | LearningRate = 3e-4,
        fake_learning_rate: float | LearningRate | None = None,
        distance: str = "pseudo_huber",
        c: float | None = None,
        weight: Callable[[Tensor], Tensor] | None = None,
        generator_law: NoiseLaw = EDM_LAW,
        fake_law: NoiseLaw = EDM_LAW,
        sigma_data: float | None = None,
        fake_steps: int = 1,
        betas: tuple[float, float] = (0.0, 0.99),
        eps: float = 1e-8,
        clip: float | None = 1.0,
        ema_decay: float = 0.99,
        seed: int = 0,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.sample_shape = check_shape(sample_shape, "sample_shape")
        self.sigma_init = check_number(sigma_init, "sigma_init", above=0)
        self.distance = check_choice(distance, "distance", ("pseudo_huber", "l2"))
        if c is not None and distance != "pseudo_huber":
            raise ValueError(f'c belongs to distance="pseudo_huber", got distance={distance!r}')
        self.c = 1e-3 if c is None else check_number(c, "c", minimum=0)
        self.weight, self.generator_law, self.fake_law = weight, generator_law, fake_law
        self.sigma_data = data_scale(check_denoiser(teacher, "teacher"), sigma_data)
        self.fake_steps = check_count(fake_steps, "fake_steps")
        self.student, self.fake = trainable_copy(teacher), trainable_copy(teacher)
        fake_learning_rate = learning_rate if fake_learning_rate is None else fake_learning_rate
        learners = (
            Learner("student", self.student, learning_rate, betas, eps, clip),
            Learner("fake", self.fake, fake_learning_rate, betas, eps, clip),
        )
        super().__init__(learners[0], [learners[1]], ema_decay=ema_decay, seed=seed, autocast=autocast)
        self.teacher = teacher.eval().requires_grad_(False)  # last: a constructor that fails leaves the teacher as it was

    def _check_batch(self, batch: Tensor | int) -> int:
        if isinstance(batch, int):
            return check_count(batch, "batch")
        # No data is needed: a batch of it only says how many samples to draw.
        return check_data(batch, "batch", self.sample_shape, self.learners["student"].parameters[0]).shape[0]

    def _step(self, batch: int, conditioning: dict[str, Tensor]) -> dict[str, Tensor]:
        for _ in range(self.fake_steps):
            fake_loss, fake_norm = self._fake_step(batch, conditioning)
        clean = self._generate(self._randn((batch, *self.sample_shape)), conditioning)  # [B, ...]
        sigma = draw_levels(self.generator_law, "generator_law", batch, self.rng)  # [B]
        losses, gap = self.generator_losses(clean, sigma, self._randn(clean.shape), conditioning)
        loss = losses.mean()
        norm = self.learners["student"].update(loss, self.steps_done)
        return {"loss": loss, "gap": gap, "fake_loss": fake_loss, "gradient_norm": norm, "fake_gradient_norm": fake_norm}

    def _fake_step(self, batch: int, conditioning: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            clean = self._generate(self._randn((batch, *self.sample_shape)), conditioning)
        sigma = draw_levels(self.fake_law, "fake_law", batch, self.rng)  # [B]
        denoised = self.fake(clean + per_sample(sigma, clean) * self._randn(clean.shape), sigma, **conditioning)
        loss = ops.denoising_loss(denoised, clean, weight=per_element(clean) * edm_weight(sigma, self.sigma_data)).sum()
        return loss, self.learners["fake"].update(loss, self.steps_done)

    def _generate(self, noise: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        return self.student(self.sigma_init * noise, same_level(self.sigma_init, noise), **conditioning)

    def generator_losses(self, clean: Tensor, sigma: Tensor, noise: Tensor, conditioning: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The generator's losses [B], differentiable in clean [B, ...], and the mean squared gap between the two denoisers.

        sigma [B] and noise [B, ...] are the noise level and the noise that `clean` is seen through.
        """
        noisy = clean + per_sample(sigma, clean) * noise
        with frozen(self.fake):
            fake = self.fake(noisy, sigma, **conditioning)
        teacher = self.teacher(noisy, sigma, **conditioning)
        weight = torch.ones_like(sigma) if self.weight is None else self.weight(sigma)
        if self.distance == "l2":
            deviation = (clean - teacher).detach().abs().flatten(1).mean(1)
            weight = weight / deviation.clamp_min(1e-5)
        losses, gap = ops.sim_loss(fake, teacher, clean, weight=weight, c=self.c, distance=self.distance, return_gap=True)
        return losses, gap.square().sum() / clean.numel()

    @torch.no_grad()
    def sample(self, n: int, conditioning: Mapping[str, Tensor] | None = None, *, seed: int = 0) -> Tensor:
        """`n` samples [n, *sample_shape] in one call of the averaged generator; conditioning: tensors [n, ...]."""
        conditioning = check_conditioning(conditioning, check_count(n, "n", 0))
        rng = torch.Generator(device=self.device).manual_seed(mixed_seed(seed))
        noise = torch.randn((n, *self.sample_shape), generator=rng, device=self.device, dtype=self.dtype)
        return self.generator(self.sigma_init * noise, same_level(self.sigma_init, noise), **conditioning)
