"""What every recipe is made of: networks with their optimisers, an average of the weights, seeded randomness, complete state."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Generic, TypeVar, cast

import torch
from torch import Tensor, nn

from .._checks import check_count, check_number
from ._checks import check_autocast, check_conditioning, check_precision
from ._state import check_keys, check_moments, check_network, check_settings, in_memory, plain, restored_generator
from .learning_rate import LearningRate, as_learning_rate

Batch = TypeVar("Batch", Tensor, int)

_GOLDEN = 0x9E3779B97F4A7C15
_MASK64 = (1 << 64) - 1


def mixed_seed(*parts: int) -> int:
    """A 63-bit seed from integers (splitmix64), so that streams of neighbouring seeds and steps have nothing in common."""
    state = 0
    for part in parts:
        state = (state + part + _GOLDEN) & _MASK64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
        state ^= state >> 31
    return state >> 1


def trainable_copy(module: nn.Module) -> nn.Module:
    """A deep copy in training mode and, where the module has classifier-free guidance of its own, without: one evaluation for a sample.

    Parameters that are frozen beside others that are not stay so; of a wholly frozen module, as a distilled teacher is, all
    floating-point parameters require gradients.
    """
    module = copy.deepcopy(module).train()
    if type(getattr(module, "guidance", None)) in (float, int):
        cast(Any, module).guidance = 1.0
    if not any(parameter.requires_grad for parameter in module.parameters()):
        for parameter in module.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
    return module


def frozen_copy(module: nn.Module) -> nn.Module:
    """A deep copy in evaluation mode that takes no gradients."""
    return copy.deepcopy(module).eval().requires_grad_(False)


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Within it the parameters take no gradients; gradients still flow through to the module's input."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


class Learner:
    """A network with its Adam optimiser, learning rate and gradient clipping."""

    def __init__(
        self, name: str, network: nn.Module, learning_rate: float | LearningRate, betas: tuple[float, float], eps: float, clip: float | None
    ) -> None:
        self.name, self.network = name, network
        self.learning_rate = as_learning_rate(learning_rate, f"{name} learning_rate")
        self.clip = float("inf") if clip is None else check_number(clip, "clip", above=0)
        self.parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        if not self.parameters:
            raise ValueError(
                f"{name} must have parameters that require grad; got {type(network).__name__} with none: it is frozen, as distillers "
                "freeze their teachers in place. Give a copy, or call requires_grad_(True) on it"
            )
        check_precision(network, name)
        fused = self.parameters[0].device.type in ("cpu", "cuda")
        self.optimizer = torch.optim.Adam(self.parameters, lr=self.learning_rate(0), betas=betas, eps=eps, fused=fused)

    def update(self, loss: Tensor, step: int) -> Tensor:
        """One Adam step down the gradient of `loss`; returns the gradient's norm before clipping.

        Raises FloatingPointError, and leaves the network as it was, when the gradient is not finite.
        """
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.clip)
        if not torch.isfinite(norm):
            raise FloatingPointError(f"the gradient of {self.name} is not finite at step {step} (loss {loss.item()})")
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        self.optimizer.step()
        return norm

    def settings(self) -> dict[str, Any]:
        """What the updates depend on but the learning rate."""
        group = self.optimizer.param_groups[0]
        return {
            f"{self.name} {key}": plain(value) for key, value in (("betas", group["betas"]), ("eps", group["eps"]), ("clip", self.clip))
        }

    def state_dict(self) -> dict:
        return {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}

    def check_state(self, state: object) -> None:
        held = check_keys(state, ("network", "optimizer"), self.name)
        check_network(held["network"], self.network, self.name)
        check_moments(held["optimizer"], self.parameters, f"the optimizer of {self.name}")

    def load_state_dict(self, state: Mapping) -> None:
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        # Adam goes on in the very tensors it is given, which belong to whoever holds the state.
        for moments in self.optimizer.state.values():
            moments.update({name: value.clone() for name, value in moments.items()})


class Recipe(ABC, Generic[Batch]):
    """A way to train networks: `step` on a batch, `sample` from the result, and a state from which a run resumes bit for bit.

    `generator` is the exponential moving average of the trained denoiser, called as `generator(x, sigma, **conditioning)`.
    `torn` tells that the last step ended in an error or an interrupt, perhaps with some of its updates made and some not.
    All randomness derives from `seed`: neither the global random state nor a call of `sample` changes a run.
    `SETTINGS` names the attributes, beside those every recipe has, in which a run must agree with the state it goes on from.
    """

    SETTINGS: ClassVar[tuple[str, ...]] = ()
    sample_shape: tuple[int, ...] | None = None

    def __init__(self, generator: Learner, others: list[Learner], *, ema_decay: float, seed: int, autocast: torch.dtype | None) -> None:
        self.seed = check_count(seed, "seed", 0)
        self.ema_decay = check_number(ema_decay, "ema_decay", minimum=0, maximum=1)
        self.autocast = check_autocast(autocast)
        self.learners = {learner.name: learner for learner in (generator, *others)}
        self.generator = frozen_copy(generator.network)
        self.steps_done, self.torn = 0, False
        like = generator.parameters[0]
        self.device, self.dtype = like.device, like.dtype
        self.rng = torch.Generator(device=self.device).manual_seed(mixed_seed(self.seed))
        self._averaged = list(zip(self.generator.parameters(), generator.network.parameters(), strict=True))
        self._copied = list(zip(self.generator.buffers(), generator.network.buffers(), strict=True))

    def step(self, batch: Tensor | int, conditioning: Mapping[str, Tensor] | None = None) -> dict[str, float]:
        """One training step.

        Args:
            batch: clean data [B, ...], B > 0, of the network's dtype and device, or, where the method needs no data, how many samples.
            conditioning: keyword arguments for the denoiser, tensors [B, ...], for example {"class_labels": int64 [B]}, or dicts of them.

        Returns:
            Losses and gradient norms, as floats.

        Raises:
            ValueError, TypeError: the batch or the conditioning does not fit. FloatingPointError: a gradient is not finite.
        """
        checked = self._check_batch(batch)
        conditioning = self._check_conditioning(conditioning, checked if isinstance(checked, int) else checked.shape[0])
        self.torn = True
        with self._seeded(), torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            metrics = self._step(checked, conditioning)
        self.steps_done += 1
        self._average()
        values = torch.stack([value.detach().double() for value in metrics.values()]).tolist()
        self.torn = False
        return dict(zip(metrics, values, strict=True))

    @abstractmethod
    def _step(self, batch: Batch, conditioning: dict[str, Tensor]) -> dict[str, Tensor]:
        """Update the networks; scalar tensors to report."""

    @abstractmethod
    def _check_batch(self, batch: Tensor | int) -> Batch:
        """The batch, if it is one that this recipe can use."""

    def _check_conditioning(self, conditioning: Mapping[str, Tensor] | None, count: int) -> dict[str, Tensor]:
        """The conditioning of a step on `count` samples, if it is one that this recipe can use."""
        return check_conditioning(conditioning, count)

    @abstractmethod
    def sample(self, n: int, conditioning: Mapping[str, Tensor] | None = None, *, seed: int = 0) -> Tensor:
        """`n` samples [n, ...] of the averaged network; the same seed gives the same samples."""

    @contextmanager
    def _seeded(self) -> Iterator[None]:
        # Dropout draws from the global generator, which has no business deciding what a seeded run computes.
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(self._op_seed(0))
            yield

    def _op_seed(self, stream: int) -> int:
        """The seed of the ops' noise in this step; a stream keeps several uses in one step apart."""
        return mixed_seed(self.seed, self.steps_done, stream)

    def _randn(self, shape: tuple[int, ...] | torch.Size) -> Tensor:
        return torch.randn(shape, generator=self.rng, device=self.device, dtype=self.dtype)

    @torch.no_grad()
    def _average(self) -> None:
        # A young average would otherwise consist of the initial weights.
        decay = min(self.ema_decay, (1 + self.steps_done) / (10 + self.steps_done))
        for average, parameter in self._averaged:
            average.lerp_(parameter, 1 - decay)
        for copied, buffer in self._copied:
            copied.copy_(buffer)

    def check_whole(self) -> None:
        """RuntimeError where the last step was torn."""
        if self.torn:
            raise RuntimeError(
                f"the last step of the {type(self).__name__} ended in an error or an interrupt, perhaps with some of its updates made and "
                "some not: load a state from before it, or make the recipe and its networks anew"
            )

    def state_dict(self) -> dict:
        """Networks, optimisers, average, random state and step: all a run depends on but the teacher, which does not change.

        A copy in main memory, which later steps do not change.

        Raises:
            RuntimeError: the last step was torn; what it left is the state of no run.
        """
        self.check_whole()
        return in_memory(
            {
                "recipe": type(self).__name__,
                "settings": self._settings(),
                "steps_done": self.steps_done,
                "sample_shape": self.sample_shape,
                "rng": self.rng.get_state(),
                "generator": self.generator.state_dict(),
                "learners": {name: learner.state_dict() for name, learner in self.learners.items()},
            }
        )

    def load_state_dict(self, state: Mapping) -> None:
        """Continue from `state_dict()` of a recipe made with the same arguments; learning rates may be others.

        Functions, such as weights, are not compared. The state is not shared with the recipe.

        Raises:
            ValueError: it is of another recipe, of one with other arguments or networks, or no state; the recipe is as it was.
        """
        rng = self._check_state(state)
        self.torn = True
        for name, learner in self.learners.items():
            learner.load_state_dict(state["learners"][name])
        self.generator.load_state_dict(state["generator"])
        self.steps_done, self.rng = state["steps_done"], rng
        if state["sample_shape"] is not None:
            self.sample_shape = tuple(state["sample_shape"])
        self.torn = False

    def _settings(self) -> dict[str, Any]:
        own = {name: plain(getattr(self, name)) for name in (*self.SETTINGS, "seed", "ema_decay", "autocast", "dtype")}
        own["device"] = self.device.type
        for learner in self.learners.values():
            own.update(learner.settings())
        return own

    def _check_state(self, state: object) -> torch.Generator:
        """Refuses what `load_state_dict` could load in part only; the generator as it was."""
        expected = ("recipe", "settings", "steps_done", "sample_shape", "rng", "generator", "learners")
        held = check_keys(state, expected, "state")
        if held["recipe"] != type(self).__name__:
            raise ValueError(f"state must be of a {type(self).__name__}, got one of a {held['recipe']}")
        check_settings(held["settings"], self._settings())
        shape = held["sample_shape"]
        if None not in (shape, self.sample_shape) and tuple(shape) != self.sample_shape:
            raise ValueError(f"sample_shape must be the state's {tuple(shape)}, got {self.sample_shape}")
        learners = check_keys(held["learners"], self.learners, "the state's learners")
        for name, learner in self.learners.items():
            learner.check_state(learners[name])
        check_network(held["generator"], self.generator, "the averaged network")
        return restored_generator(held["rng"], self.device)


def per_element(batch: Tensor) -> float:
    """The factor that makes a mean over all elements of losses that are sums over samples.

    It belongs into a loss's weight: the gradient that the loss has written in its forward pass is then final, whereas a factor applied
    to the loss has backward multiply it in a pass of its own.
    """
    return 1 / max(batch.numel(), 1)


def per_sample(value: Tensor, like: Tensor) -> Tensor:
    """[B] -> [B, 1, ..., 1] in the dtype of `like` [B, ...]."""
    return value.to(like.dtype).view(-1, *([1] * (like.dim() - 1)))


def same_level(sigma: float, x: Tensor) -> Tensor:
    """One noise level for all of x [B, ...] in the form that denoisers are promised: float32 [B], float64 for float64 x."""
    return torch.full((x.shape[0],), sigma, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)


def data_scale(denoiser: nn.Module, sigma_data: float | None) -> float:
    """`sigma_data`, or the denoiser's own."""
    if sigma_data is None:
        sigma_data = getattr(denoiser, "sigma_data", None)
        if sigma_data is None:
            raise ValueError("sigma_data must be given for a denoiser that has no attribute sigma_data")
    return check_number(sigma_data, "sigma_data", above=0)
