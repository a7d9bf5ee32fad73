"""Moment matching distillation: few-step samplers that match the teacher's conditional expectations."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from .. import ops
from .._checks import check_count, check_number
from ..diffusion import edm_weight
from ._checks import check_conditioning, check_data, check_denoiser, check_flag, check_shape
from .learning_rate import LearningRate
from .recipe import Learner, Recipe, data_scale, mixed_seed, per_element, per_sample, same_level, trainable_copy


class MomentMatchingDistiller(Recipe[Tensor]):
    """Multistep distillation by moment matching (Salimans, Mensink, Heek, Hoogeboom 2024), alternating (Algorithm 2).

    The student g runs in `num_steps` steps of ancestral sampling (Algorithm 1). Training looks at one such step, from noise level
    sigma_t to sigma_s: z_t = x + sigma_t eps, x~ = g(z_t), z_s ~ q(z_s | z_t, x~), and asks that E_g[x~ | z_s] equal the teacher's
    E[x | z_s]. An auxiliary denoiser h learns the student's expectation; every second step is its turn:

        even:  w (|x~ - h(z_s)|^2 + |teacher(z_s) - h(z_s)|^2)             down in h
        odd:   w <x~, h(z_s) - teacher(z_s)>, the bracket held constant     down in g; z_s is held constant too

    With s ~ U(0, 1), t = min(s + U(0, 1 / num_steps), 1), and sigma = sigma_data tan(angle), the angle proportional to time and
    reaching sigma_max at time 1. The loss of the odd step says nothing about convergence; `gap`, |h - teacher|^2, does.

    Args:
        teacher: denoiser module, float32 or float64; it is put into evaluation mode and its parameters are frozen. Student
            and auxiliary start as copies, in which what is frozen beside trained parameters stays frozen. A number in the attribute
            `guidance` is 1 in them: they learn the guided teacher's law with one evaluation for a sample.
        num_steps: steps of the sampler.
        variant: "alternating", the paper's Algorithm 2. Its Algorithm 3, the instantaneous one in parameter space, is not here.
        learning_rate, auxiliary_learning_rate: numbers or `LearningRate`s (steps of both kinds count); the auxiliary's is the student's
            unless given.
        shared_batch: make both updates in every step, from the same batch and the auxiliary as it was before. Counting a backward pass
            as two forward passes, such a step costs 7 where the two alternating steps it stands for cost 10.
        weight: weight(sigma_s) [B] -> [B]; the square root of the EDM weight unless given.
        sigma_min, sigma_max: noise levels are kept between them; sampling starts at sigma_max.
        sigma_data: scale of the data; the teacher's own unless given.
        betas, eps, clip: of both Adams, and the norm the gradients are clipped at (None: not).
        ema_decay: of the averaged student.
        sample_shape: shape of one sample; taken from the first batch unless given.
        seed: of everything random.
        autocast: torch.bfloat16 or torch.float16 to run the networks in, or None. Their outputs should stay float32: h - teacher is
            a small difference.
    """

    SETTINGS = ("num_steps", "shared_batch", "weight", "sigma_min", "sigma_max", "sigma_data")

    def __init__(
        self,
        teacher: nn.Module,
        *,
        num_steps: int,
        variant: str = "alternating",
        learning_rate: float | LearningRate = 3e-4,
        auxiliary_learning_rate: float | LearningRate | None = None,
        shared_batch: bool = False,
        weight: Callable[[Tensor], Tensor] | None = None,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float | None = None,
        betas: tuple[float, float] = (0.0, 0.99),
        eps: float = 1e-12,
        clip: float | None = 1.0,
        ema_decay: float = 0.99,
        sample_shape: tuple[int, ...] | None = None,
        seed: int = 0,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.num_steps = check_count(num_steps, "num_steps")
        if variant != "alternating":
            raise ValueError(
                f"variant must be 'alternating' (Algorithm 2); Algorithm 3, in parameter space, is not implemented; got {variant!r}"
            )
        self.sigma_data = data_scale(check_denoiser(teacher, "teacher"), sigma_data)
        self.sigma_min = check_number(sigma_min, "sigma_min", above=0)
        self.sigma_max = check_number(sigma_max, "sigma_max", above=self.sigma_min)
        self.weight = weight
        self.shared_batch = check_flag(shared_batch, "shared_batch")
        self.sample_shape = None if sample_shape is None else check_shape(sample_shape, "sample_shape")
        self.student, self.auxiliary = trainable_copy(teacher), trainable_copy(teacher)
        auxiliary_learning_rate = learning_rate if auxiliary_learning_rate is None else auxiliary_learning_rate
        learners = (
            Learner("student", self.student, learning_rate, betas, eps, clip),
            Learner("auxiliary", self.auxiliary, auxiliary_learning_rate, betas, eps, clip),
        )
        super().__init__(learners[0], [learners[1]], ema_decay=ema_decay, seed=seed, autocast=autocast)
        self.teacher = teacher.eval().requires_grad_(False)  # last: a constructor that fails leaves the teacher as it was

    def sigma(self, time: Tensor) -> Tensor:
        """Noise level of a time in [0, 1]: sigma_data tan(time atan(sigma_max / sigma_data)), at least sigma_min."""
        angle = time.double() * math.atan(self.sigma_max / self.sigma_data)
        return (self.sigma_data * angle.tan()).clamp(self.sigma_min, self.sigma_max).float()

    def _check_batch(self, batch: Tensor | int) -> Tensor:
        data = check_data(batch, "batch", self.sample_shape, self.learners["student"].parameters[0])
        self.sample_shape = tuple(data.shape[1:])
        return data

    def _step(self, batch: Tensor, conditioning: dict[str, Tensor]) -> dict[str, Tensor]:
        sigma_s, sigma_t = self._draw_levels(batch.shape[0])
        auxiliary_turn = self.shared_batch or self.steps_done % 2 == 0
        student_turn = self.shared_batch or self.steps_done % 2 == 1
        noisy = batch + per_sample(sigma_t, batch) * self._randn(batch.shape)
        with torch.set_grad_enabled(student_turn):
            denoised = self.student(noisy, sigma_t, **conditioning)  # x~ [B, ...]
        less_noisy = ops.posterior_sample(denoised.detach(), noisy, sigma_s, sigma_t, self._op_seed(1))  # z_s [B, ...]
        with torch.no_grad():
            teacher = self.teacher(less_noisy, sigma_s, **conditioning)
        with torch.set_grad_enabled(auxiliary_turn):
            auxiliary = self.auxiliary(less_noisy, sigma_s, **conditioning)
        weight = edm_weight(sigma_s, self.sigma_data).sqrt() if self.weight is None else self.weight(sigma_s)
        weight = per_element(batch) * weight

        metrics = {"gap": (auxiliary - teacher).detach().square().mean()}
        if auxiliary_turn:
            loss = ops.moment_matching_auxiliary_loss(denoised.detach(), auxiliary, teacher, weight=weight).sum()
            metrics["auxiliary_loss"] = loss
            metrics["auxiliary_gradient_norm"] = self.learners["auxiliary"].update(loss, self.steps_done)
        if student_turn:
            loss = ops.moment_matching_loss(denoised, auxiliary.detach(), teacher, weight=weight).sum()
            metrics["loss"] = loss
            metrics["gradient_norm"] = self.learners["student"].update(loss, self.steps_done)
        return metrics

    def _draw_levels(self, count: int) -> tuple[Tensor, Tensor]:
        uniform = torch.rand((2, count), generator=self.rng, device=self.device)
        time_s = uniform[0]
        time_t = (time_s + uniform[1] / self.num_steps).clamp(max=1)
        return self.sigma(time_s), self.sigma(time_t)

    @torch.no_grad()
    def sample(self, n: int, conditioning: Mapping[str, Tensor] | None = None, *, seed: int = 0) -> Tensor:
        """`n` samples [n, ...] in `num_steps` calls of the averaged student (Algorithm 1); conditioning: tensors [n, ...].

        Raises ValueError when no batch was seen yet and no sample_shape given.
        """
        if self.sample_shape is None:
            raise ValueError("sample_shape must be given to the MomentMatchingDistiller, or a step taken, before samples can be drawn")
        conditioning = check_conditioning(conditioning, check_count(n, "n", 0))
        rng = torch.Generator(device=self.device).manual_seed(mixed_seed(seed))
        shape = (n, *self.sample_shape)
        sigmas = self.sigma(torch.arange(self.num_steps, 0, -1) / self.num_steps).tolist()
        noisy = sigmas[0] * torch.randn(shape, generator=rng, device=self.device, dtype=self.dtype)
        for step, sigma in enumerate(sigmas):
            denoised = self.generator(noisy, same_level(sigma, noisy), **conditioning)
            if step + 1 < self.num_steps:
                noisy = ops.posterior_sample(denoised, noisy, sigmas[step + 1], sigma, mixed_seed(seed, step))
        return denoised
