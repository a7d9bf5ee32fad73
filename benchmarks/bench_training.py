"""A training step of score implicit matching and one of moment matching: networks, losses, gradients, clipping and both optimisers.

Ours is the distiller's own step with patched networks; eager is the same step written in PyTorch, around the networks as diffusers has
them. Where networks run in bfloat16, by autocast, their parameters are float32. The draws are made beforehand, and the learning rate is too
small to move a parameter, so that every call computes the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import diffusers
import torch
from torch import Tensor, nn

from benchmarks.workloads import Workload
from fastdiff_kernels.diffusion import EDMPrecond, edm_weight
from fastdiff_kernels.distill import MomentMatchingDistiller, SIMDistiller
from fastdiff_kernels.distill.recipe import frozen, mixed_seed, per_sample, trainable_copy
from fastdiff_kernels.integrations.diffusers import patch
from fastdiff_kernels.reference.philox import normals

GPU = torch.cuda.is_available()
BATCH, LAYERS = (64, 12) if GPU else (2, 2)
SHAPE = (4, 32, 32)
SIGMA_INIT, PSEUDO_HUBER, RATE = 2.5, 1e-3, 1e-30
# Of the posterior's noise in the first step of a run of seed 0.
NOISE_SEED = mixed_seed(0, 0, 1)
RATES = {"betas": (0.0, 0.99), "lr": RATE, "fused": True}


Step = Callable[..., list[Tensor]]


class DiT(nn.Module):
    """DiT-S/2 of diffusers, fewer blocks of it on a CPU, as EDMPrecond calls a network."""

    def __init__(self) -> None:
        super().__init__()
        self.model = diffusers.DiTTransformer2DModel(num_attention_heads=6, attention_head_dim=64, num_layers=LAYERS, sample_size=32)

    def forward(self, x: Tensor, noise_level: Tensor) -> Tensor:
        labels = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
        return self.model(x, timestep=noise_level, class_labels=labels, return_dict=False)[0][:, : x.shape[1]]


def teacher(dtype: torch.dtype, patched: bool) -> EDMPrecond:
    torch.manual_seed(0)
    network = DiT().to("cuda" if GPU else "cpu", dtype)
    # Dropped labels would be another draw.
    for module in network.modules():
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0
    if patched:
        patch(network.model)
    return EDMPrecond(network).eval()


def apart(denoiser: nn.Module) -> nn.Module:
    """Moves a network a little, so that it differs from the teacher that it is a copy of."""
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=rng).to(parameter)
    return denoiser


def gradients(*networks: nn.Module) -> list[Tensor]:
    """What a step hands its optimisers, and is checked by: a loss alone is one number, which may be exact by luck."""
    return [p.grad for network in networks for p in network.parameters() if p.grad is not None]


class Plain:
    """What a step in PyTorch has: three networks and an Adam for two of them."""

    def __init__(self, dtype: torch.dtype, eps: float, compiled: bool) -> None:
        self.teacher = teacher(dtype, patched=False).requires_grad_(False)
        self.student, self.other = trainable_copy(self.teacher), apart(trainable_copy(self.teacher))
        self.run = [torch.compile(n, dynamic=False) if compiled else n for n in (self.teacher, self.student, self.other)]
        self.adams = {id(n): torch.optim.Adam(n.parameters(), eps=eps, **RATES) for n in (self.student, self.other)}

    def update(self, network: nn.Module, loss: Tensor) -> None:
        adam = self.adams[id(network)]
        adam.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        adam.step()


class PlainSIM(Plain):
    def __call__(self, latents: Tensor, fake_sigma: Tensor, sigma: Tensor) -> list[Tensor]:
        for_fake, fake_noise, z, noise = latents
        teacher, student, fake = self.run
        with torch.no_grad():
            clean = student(SIGMA_INIT * for_fake, SIGMA_INIT)
        denoised = fake(clean + per_sample(fake_sigma, clean) * fake_noise, fake_sigma)
        losses = edm_weight(fake_sigma, 0.5) * (denoised - clean).square().flatten(1).sum(1)
        fake_loss = losses.sum() / clean.numel()
        self.update(self.other, fake_loss)
        clean = student(SIGMA_INIT * z, SIGMA_INIT)
        noisy = clean + per_sample(sigma, clean) * noise
        with frozen(self.other):
            seen = fake(noisy, sigma)
        gap = seen - teacher(noisy, sigma)
        losses = -(gap * (seen - clean)).flatten(1).sum(1) / (gap.square().flatten(1).sum(1) + PSEUDO_HUBER**2).sqrt()
        self.update(self.student, losses.mean())
        return gradients(self.student, self.other)


class OurSIM(SIMDistiller):
    """With given draws."""

    def __init__(self, dtype: torch.dtype, autocast: torch.dtype | None) -> None:
        super().__init__(
            teacher(dtype, patched=True), sample_shape=SHAPE, sigma_init=SIGMA_INIT, learning_rate=RATE, c=PSEUDO_HUBER,
            generator_law=lambda count, rng: self.sigma, fake_law=lambda count, rng: self.fake_sigma,
            autocast=autocast,
        )  # fmt: skip
        apart(self.fake)

    def _randn(self, shape: tuple[int, ...] | torch.Size) -> Tensor:
        return next(self.draws)

    def __call__(self, latents: Tensor, fake_sigma: Tensor, sigma: Tensor) -> list[Tensor]:
        self.draws, self.fake_sigma, self.sigma = iter(latents), fake_sigma, sigma
        self.step(BATCH)
        return gradients(self.student, self.fake)


class PlainMomentMatching(Plain):
    def __init__(self, dtype: torch.dtype, eps: float, compiled: bool, known: bool = False) -> None:
        """known: whether the posterior's noise is the one that ours draws."""
        super().__init__(dtype, eps, compiled)
        self.known = known

    def __call__(self, clean: Tensor, noise: Tensor, sigma_s: Tensor, sigma_t: Tensor) -> list[Tensor]:
        teacher, student, auxiliary = self.run
        noisy = clean + per_sample(sigma_t, clean) * noise
        denoised = student(noisy, sigma_t)
        s, t = per_sample(sigma_s, clean), per_sample(sigma_t, clean)
        ratio = (s / t).square()
        drawn = self.noise(clean) if self.known else torch.randn_like(clean)
        less_noisy = (ratio * noisy + (1 - ratio) * denoised + s * (1 - ratio).sqrt() * drawn).detach()
        with torch.no_grad():
            expected = teacher(less_noisy, sigma_s)
        found = auxiliary(less_noisy, sigma_s)
        weight = edm_weight(sigma_s, 0.5).sqrt()
        distances = (denoised.detach() - found).square() + (expected - found).square()
        auxiliary_loss = (weight * distances.flatten(1).sum(1)).sum() / clean.numel()
        self.update(self.other, auxiliary_loss)
        loss = (weight * (denoised * (found.detach() - expected)).flatten(1).sum(1)).sum() / clean.numel()
        self.update(self.student, loss)
        return gradients(self.student, self.other)

    def noise(self, like: Tensor) -> Tensor:
        return normals(like.shape, NOISE_SEED, 0, "posterior", like.device).to(like.dtype)


class OurMomentMatching(MomentMatchingDistiller):
    """With given draws, but for the posterior's, which its op draws."""

    def __init__(self, dtype: torch.dtype, autocast: torch.dtype | None) -> None:
        super().__init__(teacher(dtype, patched=True), num_steps=8, learning_rate=RATE, shared_batch=True, autocast=autocast)
        apart(self.auxiliary)

    def _randn(self, shape: tuple[int, ...] | torch.Size) -> Tensor:
        return self.noise

    def _draw_levels(self, count: int) -> tuple[Tensor, Tensor]:
        return self.levels

    def __call__(self, clean: Tensor, noise: Tensor, sigma_s: Tensor, sigma_t: Tensor) -> list[Tensor]:
        self.noise, self.levels, self.steps_done = noise, (sigma_s, sigma_t), 0
        self.step(clean)
        return gradients(self.student, self.auxiliary)


@functools.cache
def step(name: str, dtype: torch.dtype, autocast: torch.dtype | None) -> Step:
    made: dict[str, Callable[[], Step]] = {
        "SIM": lambda: PlainSIM(dtype, 1e-8, compiled=False),
        "SIM, compiled": lambda: PlainSIM(dtype, 1e-8, compiled=True),
        "SIM, ours": lambda: OurSIM(dtype, autocast),
        "moment matching": lambda: PlainMomentMatching(dtype, 1e-12, compiled=False),
        "moment matching, compiled": lambda: PlainMomentMatching(dtype, 1e-12, compiled=True),
        "moment matching, known": lambda: PlainMomentMatching(dtype, 1e-12, compiled=False, known=True),
        "moment matching, ours": lambda: OurMomentMatching(dtype, autocast),
    }
    return made[name]()


def provider(name: str) -> Step:
    def run(draws: Tensor, *sigmas: Tensor) -> list[Tensor]:
        dtype = torch.promote_types(draws.dtype, torch.float32)
        autocast = None if draws.dtype == dtype else draws.dtype
        made, levels = draws.to(dtype), [s.to(dtype) for s in sigmas]
        with torch.enable_grad(), torch.autocast(draws.device.type, autocast, enabled=autocast is not None):
            return step(name, dtype, autocast)(*(made.unbind() if name.startswith("moment") else (made,)), *levels)

    return run


def workload(name: str, draws: int) -> Workload:
    def inputs() -> list[Tensor]:
        low = torch.empty(BATCH).uniform_(0.2, 2.0)
        return [torch.randn(draws, BATCH, *SHAPE), low, 1.5 * low]

    known = name == "moment matching"
    return Workload(
        f"{name} step",
        "DiT-S/2",
        f"B={BATCH}, {LAYERS} blocks",
        inputs,
        provider(name),
        provider(f"{name}, ours"),
        # The compiler takes minutes for whole networks on a CPU.
        rivals={"compile": provider(f"{name}, compiled")} if GPU else {},
        checkable=provider(f"{name}, known") if known else None,
        compiled=False,
        captured=False,
        streams=False,
        factor=8.0,
        dtypes=(torch.float32, torch.bfloat16),
    )


WORKLOADS = [workload("SIM", 4), workload("moment matching", 2)]


def test_speed(case, measure):
    measure(case)
