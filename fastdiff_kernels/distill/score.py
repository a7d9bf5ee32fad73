"""Training a denoiser: denoising score matching, or local curvature smoothing with Stein's identity."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import ops
from .._checks import check_choice, check_count, check_number
from ..diffusion import OnlineSchedule, Schedule, edm_weight, sample
from ..diffusion.costs import RawDenoiser
from ..diffusion.costs import check_denoiser as check_raw_denoiser
from ._checks import HALF_PRECISION, check_conditioning, check_data, check_denoiser, check_flag, check_shape
from .learning_rate import LearningRate
from .noise_law import EDM_LAW, NoiseLaw, draw_levels
from .recipe import Learner, Recipe, data_scale, mixed_seed, per_element, per_sample


class ScoreTrainer(Recipe[Tensor]):
    """Train a denoiser D, or what is the same its score s(x, sigma) = (D(x, sigma) - x) / sigma^2.

    loss="dsm": lambda |D(x0 + sigma eps, sigma) - x0|^2, lambda the EDM weight (Karras et al. 2022, eq. 108).

    loss="lcss": 2 sigma^4 lambda (gamma / sigma' <s(x', sigma), xi> + |s(x', sigma)|^2 / 2), x' = centre + sigma' xi
    (Osada, Shing, Nishide 2024), whose minimiser is gamma times the score; the weight makes its gradient that of "dsm" in size.

    * reading "A", the local one: the centre is x0 + sigma_t eps for a noise of its own, and the denoiser is told the total
      sigma = sqrt(sigma_t^2 + sigma'^2). sigma' / sigma_t is `local_ratio`; the variance of the target grows as 1 + 1 / local_ratio^2.
    * reading "B": the centre is x0 and sigma' = sigma. With gamma = 1 its gradient is that of "dsm", sample by sample.

    Which reading the paper's experiments follow, and whether its coefficient gamma multiplies the first term, as here, or the second, has
    not been confirmed; at gamma = 1 the second question does not arise. "A" is the default because it is what LCSS has beside denoising.

    The noise xi is never stored: the ops draw it again from a seed. Losses are reported per element; that of "lcss" is negative.

    Args:
        denoiser: module called as denoiser(x, sigma, **conditioning); it is trained in place, those of its parameters that require grad,
            which must be float32 or float64: in 16 bits the steps of Adam and of the average round away.
        loss: "dsm" or "lcss".
        learning_rate: a number or a `LearningRate`.
        noise_law: noise levels of the training, EDM's log-normal unless given; called as noise_law(count, generator) -> float32 [count],
            > 0. An `OnlineSchedule` besides observes the averaged denoiser on every batch, before the step, which after its burn-in costs a
            forward pass on twice the batch. It is part of the trainer's state, and its levels are those of `sample`. It needs a float32 or
            float64 denoiser with `.raw`, as `EDMPrecond` has it, and should be given to one trainer alone.
        sigma_data: scale of the data in the weight; the denoiser's own unless given.
        reading, gamma, local_ratio: of "lcss" alone, above; "A", 1 and 2 unless given. local_ratio is of reading "A" alone.
        antithetic: "lcss", alone of the two, evaluates at centre + sigma' xi and centre - sigma' xi, which costs two passes and removes
            most of the variance.
        label_dropout: probability with which `class_labels`, then int64 or int32 [B], become `null_label`, for classifier-free guidance.
        null_label: the null class, at most the network's `num_classes` where it has that; `num_classes` itself unless given.
        betas, eps, clip: of Adam, and the norm gradients are clipped at (None: not).
        ema_decay: of the averaged weights in `generator`.
        sample_shape: shape of one sample; taken from the first batch unless given.
        seed: of everything random.
        autocast: torch.bfloat16 or torch.float16 to run the networks in, or None; what an `OnlineSchedule` observes is never cast.
    """

    SETTINGS = ("loss", "reading", "gamma", "local_ratio", "antithetic", "noise_law", "sigma_data", "label_dropout", "null_label")

    def __init__(
        self,
        denoiser: nn.Module,
        *,
        loss: str = "dsm",
        learning_rate: float | LearningRate = 1e-3,
        noise_law: NoiseLaw = EDM_LAW,
        sigma_data: float | None = None,
        reading: str | None = None,
        gamma: float | None = None,
        local_ratio: float | None = None,
        antithetic: bool = False,
        label_dropout: float = 0.0,
        null_label: int | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        clip: float | None = None,
        ema_decay: float = 0.999,
        sample_shape: tuple[int, ...] | None = None,
        seed: int = 0,
        autocast: torch.dtype | None = None,
    ) -> None:
        check_denoiser(denoiser, "denoiser")
        self.loss = check_choice(loss, "loss", ("dsm", "lcss"))
        self.antithetic, self.noise_law = check_flag(antithetic, "antithetic"), noise_law
        of_lcss = {"reading": reading, "gamma": gamma, "local_ratio": local_ratio, "antithetic": antithetic or None}
        if loss != "lcss" and (given := [name for name, value in of_lcss.items() if value is not None]):
            raise ValueError(f'{given[0]} belongs to loss="lcss", got loss={loss!r}')
        self.reading = "A" if reading is None else check_choice(reading, "reading", ("A", "B"))
        if local_ratio is not None and self.reading != "A":
            raise ValueError(f'local_ratio belongs to reading="A", got reading={reading!r}')
        self.gamma = 1.0 if gamma is None else check_number(gamma, "gamma", above=0)
        self.local_ratio = 2.0 if local_ratio is None else check_number(local_ratio, "local_ratio", above=0)
        self.sigma_data = data_scale(denoiser, sigma_data)
        self.label_dropout = check_number(label_dropout, "label_dropout", minimum=0, maximum=1)
        self.null_label = _null_label(denoiser, null_label)
        if label_dropout and self.null_label is None:
            raise ValueError("null_label must be given with label_dropout, as the denoiser's network names no number of classes")
        self.sample_shape = None if sample_shape is None else check_shape(sample_shape, "sample_shape")
        learner = Learner("denoiser", denoiser, learning_rate, betas, eps, clip)
        self.online = noise_law if isinstance(noise_law, OnlineSchedule) else None
        if self.online is not None:
            check_raw_denoiser(denoiser)
            coarse = next((parameter.dtype for parameter in denoiser.parameters() if parameter.dtype in HALF_PRECISION), None)
            if coarse is not None:
                raise TypeError(f"denoiser must be float32 or float64 for an OnlineSchedule, which differences scores, got {coarse}")
        super().__init__(learner, [], ema_decay=ema_decay, seed=seed, autocast=autocast)
        self.denoiser = denoiser.train()

    def _check_batch(self, batch: Tensor | int) -> Tensor:
        data = check_data(batch, "batch", self.sample_shape, self.learners["denoiser"].parameters[0])
        self.sample_shape = tuple(data.shape[1:])
        return data

    def _check_conditioning(self, conditioning: Mapping[str, Tensor] | None, count: int) -> dict[str, Tensor]:
        checked = super()._check_conditioning(conditioning, count)
        if self.label_dropout:
            self._check_labels(checked)
        return checked

    def _check_labels(self, conditioning: dict[str, Tensor]) -> None:
        if conditioning.get("class_labels") is None:
            given = sorted(name for name, value in conditioning.items() if value is not None)
            raise ValueError(f"conditioning must hold class_labels with label_dropout={self.label_dropout}, got {given}")
        labels = conditioning["class_labels"]
        if labels.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"conditioning['class_labels'] must be class indices, int64 or int32, with label_dropout, got {labels.dtype}")
        if labels.dim() != 1:
            raise ValueError(f"conditioning['class_labels'] must have shape [B] with label_dropout, got {list(labels.shape)}")

    def _step(self, batch: Tensor, conditioning: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.online is not None:
            with torch.autocast(self.device.type, enabled=False):
                self.online.observe(cast(RawDenoiser, self.generator), batch, conditioning)
        conditioning = self._drop_labels(conditioning)
        sigma = draw_levels(self.noise_law, "noise_law", batch.shape[0], self.rng)  # [B]
        if self.loss == "dsm":
            losses = self.dsm_losses(batch, sigma, self._randn(batch.shape), conditioning, factor=per_element(batch))
        else:
            losses = self.lcss_losses(batch, sigma, self._op_seed(1), conditioning, factor=per_element(batch))
        loss = losses.sum()
        return {"loss": loss, "gradient_norm": self.learners["denoiser"].update(loss, self.steps_done)}

    def dsm_losses(self, clean: Tensor, sigma: Tensor, noise: Tensor, conditioning: Mapping[str, Tensor], *, factor: float = 1.0) -> Tensor:
        """factor lambda(sigma) |D(clean + sigma noise, sigma) - clean|^2 [B]; clean, noise [B, ...], sigma [B]."""
        denoised = self.denoiser(clean + per_sample(sigma, clean) * noise, sigma, **conditioning)
        return ops.denoising_loss(denoised, clean, weight=factor * edm_weight(sigma, self.sigma_data))

    def lcss_losses(self, clean: Tensor, sigma: Tensor, seed: int, conditioning: Mapping[str, Tensor], *, factor: float = 1.0) -> Tensor:
        """factor times the loss of local curvature smoothing [B] at total noise level sigma [B], its noise drawn from `seed`."""
        centre, local_sigma = clean, sigma
        if self.reading == "A":
            forward_sigma = sigma / (1 + self.local_ratio**2) ** 0.5
            centre = clean + per_sample(forward_sigma, clean) * self._randn(clean.shape)
            local_sigma = self.local_ratio * forward_sigma
        weight = 2 * factor * sigma**4 * edm_weight(sigma, self.sigma_data)
        score = self._score(ops.lcss_perturb(centre, local_sigma, seed), sigma, conditioning)
        mirrored = None
        if self.antithetic:
            mirrored = self._score(ops.lcss_perturb(centre, local_sigma, seed, mirrored=True), sigma, conditioning)
        return ops.lcss_loss(score, seed, local_sigma, gamma=self.gamma, weight=weight, mirrored=mirrored)

    def _score(self, x: Tensor, sigma: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        return (self.denoiser(x, sigma, **conditioning) - x) / per_sample(sigma.square(), x)

    def _drop_labels(self, conditioning: dict[str, Tensor]) -> dict[str, Tensor]:
        if not self.label_dropout:
            return conditioning
        assert self.null_label is not None, "the constructor asks for one with label_dropout"
        labels = conditioning["class_labels"]
        dropped = torch.rand(labels.shape, generator=self.rng, device=self.device) < self.label_dropout
        return {**conditioning, "class_labels": torch.where(dropped, self.null_label, labels)}

    @torch.no_grad()
    def sample(
        self,
        n: int,
        conditioning: Mapping[str, Tensor] | None = None,
        *,
        seed: int = 0,
        schedule: Schedule | None = None,
        **options: Any,
    ) -> Tensor:
        """`n` samples [n, ...] of the averaged denoiser.

        Args:
            n: how many.
            conditioning: keyword arguments for the denoiser, tensors [n, ...].
            seed: of the initial noise.
            schedule: noise levels; unless given those of the `OnlineSchedule` trained with, or 18 Karras levels from 80 to 0.002.
            options: handed to `diffusion.sample`, for example solver="euler" or guidance.

        Raises:
            ValueError: no batch was seen yet and no sample_shape given.
        """
        if self.sample_shape is None:
            raise ValueError("sample_shape must be given to the ScoreTrainer, or a step taken, before samples can be drawn")
        conditioning = check_conditioning(conditioning, check_count(n, "n", 0))
        rng = torch.Generator(device=self.device).manual_seed(mixed_seed(seed))
        noise = torch.randn((n, *self.sample_shape), generator=rng, device=self.device, dtype=self.dtype)
        if schedule is None:
            schedule = Schedule.karras(18, 0.002, 80.0) if self.online is None else self.online.schedule
        return sample(self.generator, noise, schedule, conditioning=conditioning, **options).samples

    def state_dict(self) -> dict:
        """As every recipe's; with an `OnlineSchedule` its levels and its estimate too."""
        state = super().state_dict()
        return state if self.online is None else {**state, "online": self.online.state_dict()}

    def load_state_dict(self, state: Mapping) -> None:
        """Continue from `state_dict()` of a trainer made with the same arguments.

        Raises:
            ValueError: as every recipe's; and where the state has an `OnlineSchedule` and this trainer has none, or the reverse, or
                theirs were made with other arguments.
        """
        if ("online" in state) != (self.online is not None):
            held, own = ("an OnlineSchedule", "none") if "online" in state else ("no OnlineSchedule", "one")
            raise ValueError(f"state must be of a ScoreTrainer with the same noise_law, got one with {held} for a trainer with {own}")
        self._check_state(state)
        if self.online is not None:
            self.online.load_state_dict(state["online"])
        super().load_state_dict(state)


def _null_label(denoiser: nn.Module, null_label: int | None) -> int | None:
    """The null class, its network's unless given; None where neither names one."""
    num_classes = getattr(getattr(denoiser, "network", None), "num_classes", None) or None  # 0: without classes
    if null_label is None:
        return num_classes
    check_count(null_label, "null_label", 0)
    if num_classes is not None and null_label > num_classes:
        raise ValueError(f"null_label must be at most {num_classes}, the network's num_classes, got {null_label}")
    return null_label
