"""The loop that runs any recipe: batches, progress, history, checkpoints, interruption."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._checks import check_count
from ..diffusion.guidance import leaves, map_tensors
from ._state import check_keys
from .recipe import Recipe, mixed_seed

BatchSource = Callable[[int], tuple["Tensor | int", "Mapping[str, Tensor] | None"]]


class Trainer:
    """Run a recipe for a number of steps on one device.

    Batches are drawn without replacement, epoch after epoch; which samples a step sees depends on `seed` and the step alone. With a
    checkpoint, a run that stopped, by Ctrl-C (SIGINT) too, goes on where it was in the next `fit()`, in the same process or another,
    and ends with the same bits as a run that was never stopped. A first Ctrl-C lets the running step finish, a second does not. Where
    SIGINT is ignored, as under nohup, it stays so.

    Args:
        recipe: a `ScoreTrainer`, `SIMDistiller`, `MomentMatchingDistiller` or another `Recipe`.
        data: clean data [M, ...]; or None for a recipe that needs none; or a function step -> (batch, conditioning).
        steps: how many steps the whole run has.
        batch_size: samples a step.
        conditioning: tensors [M, ...], or dicts of them, that belong to the data (or, without data, that batches are drawn from).
        checkpoint: file to write the state to, and to resume from if it is there. None: no checkpoints.
        checkpoint_every: steps between checkpoints; None: only at the start, at the end and when interrupted.
        progress: show a progress bar (needs tqdm).
        log: called as log(step, metrics) after each step, metrics a dict of floats.
        seed: of the order of the data.
    """

    def __init__(
        self,
        recipe: Recipe,
        data: Tensor | BatchSource | None = None,
        *,
        steps: int,
        batch_size: int | None = None,
        conditioning: Mapping[str, Tensor] | None = None,
        checkpoint: str | os.PathLike | None = None,
        checkpoint_every: int | None = None,
        progress: bool = True,
        log: Callable[[int, dict[str, float]], None] | None = None,
        seed: int = 0,
    ) -> None:
        if not isinstance(recipe, Recipe):
            raise TypeError(f"recipe must be a Recipe, got {type(recipe).__name__}")
        if checkpoint_every is not None:
            check_count(checkpoint_every, "checkpoint_every")
            if checkpoint is None:
                raise ValueError("checkpoint must name a file when checkpoint_every is given")
        self.recipe, self.steps = recipe, check_count(steps, "steps")
        self.checkpoint, self.checkpoint_every = None if checkpoint is None else Path(checkpoint), checkpoint_every
        self.progress, self.log, self.seed = progress, log, check_count(seed, "seed", 0)
        if callable(data) and (conditioning is not None or batch_size is not None):
            raise ValueError("conditioning and batch_size must not be given beside a function that makes the batches")
        samples = None
        if callable(data):
            self.batches = data
        else:
            self.batches, samples = _tensor_batches(data, conditioning, batch_size, self.seed, recipe.device)
        self._order = {"seed": self.seed, "batch_size": batch_size, "number of samples": samples}
        self.history: dict[str, list[float]] = {}

    def fit(self) -> dict[str, list[float]]:
        """Run to the end, from the checkpoint if there is one.

        Returns:
            Every metric's values with the steps they belong to: {"loss": [...], "loss/step": [...], ...}.

        Raises:
            RuntimeError: launched as one of several processes; or an earlier step was torn, by an error or a second Ctrl-C, and no
                checkpoint holds a state from before it.
            ValueError: the file is no checkpoint, or one of another recipe, of other arguments (learning rates and functions aside), of
                another order of the data, or of another number of samples. OSError: it cannot be read or written.
            KeyboardInterrupt: interrupted; the checkpoint, if one is kept, has been written.
        """
        _refuse_several_processes()
        if self.checkpoint is not None and self.checkpoint.exists():
            self._resume(self.checkpoint)
        self.recipe.check_whole()
        # Already here, so that a torn first step has a state to go back to, and a path that cannot be written does not cost a run.
        self._save()
        with _deferred_interrupt() as interrupted, self._bar() as bar:
            try:
                stop = False
                while self.recipe.steps_done < self.steps and not stop:
                    self._one_step(bar)
                    stop = interrupted.is_set()
                    if stop or self._checkpoint_due():
                        self._save()
            except KeyboardInterrupt:
                # A step that was torn apart must not be saved: its networks are no state of any run.
                if not self.recipe.torn:
                    self._save()
                raise
        return self.history

    def _checkpoint_due(self) -> bool:
        done = self.recipe.steps_done
        return done == self.steps or (self.checkpoint_every is not None and done % self.checkpoint_every == 0)

    def _one_step(self, bar: Any) -> None:
        step = self.recipe.steps_done
        metrics = self.recipe.step(*self.batches(step))
        for name, value in metrics.items():
            self.history.setdefault(name, []).append(value)
            self.history.setdefault(f"{name}/step", []).append(step)
        if bar is not None:
            bar.update()
            bar.set_postfix({name: f"{value:.3g}" for name, value in metrics.items()}, refresh=False)
        if self.log is not None:
            self.log(step, metrics)

    @contextmanager
    def _bar(self) -> Iterator[Any]:
        if not self.progress:
            yield None
            return
        try:
            from tqdm.auto import tqdm
        except ImportError as error:
            raise ImportError("progress=True needs tqdm: pip install fastdiff-kernels[train], or pass progress=False") from error
        with tqdm(total=self.steps, initial=self.recipe.steps_done, desc=type(self.recipe).__name__) as bar:
            yield bar

    def _save(self) -> None:
        if self.checkpoint is None:
            return
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        partial = self.checkpoint.with_name(self.checkpoint.name + ".partial")
        torch.save({"recipe": self.recipe.state_dict(), "history": self.history, "order": self._order}, partial)
        os.replace(partial, self.checkpoint)  # a run killed while writing keeps the previous checkpoint

    def _resume(self, checkpoint: Path) -> None:
        held = _read(checkpoint)
        for name, value in self._order.items():
            if held["order"][name] != value:
                raise ValueError(f"{name} must be the checkpoint's {held['order'][name]} to resume {checkpoint}, got {value}")
        try:
            self.recipe.load_state_dict(held["recipe"])
        except ValueError as error:
            raise ValueError(f"checkpoint {checkpoint}: {error}") from error
        self.history = held["history"]


def _read(checkpoint: Path) -> Mapping[str, Any]:
    """What `Trainer` has written there, in main memory."""
    try:
        held = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # torch.load has no error of its own: a damaged file ends in whatever its bytes lead to
        raise ValueError(
            f"checkpoint must be a file that a Trainer has written, got {checkpoint}, which cannot be read: {error!r}"
        ) from error
    check_keys(held, ("recipe", "history", "order"), f"checkpoint {checkpoint}")
    check_keys(held["order"], ("seed", "batch_size", "number of samples"), f"order of the checkpoint {checkpoint}")
    check_keys(held["recipe"], (), f"recipe of the checkpoint {checkpoint}")
    return held


def _tensor_batches(
    data: Tensor | None, conditioning: Mapping[str, Tensor] | None, batch_size: int | None, seed: int, device: torch.device
) -> tuple[BatchSource, int | None]:
    """step -> (batch, conditioning): epochs of shuffled samples, computed from the step alone; and of how many samples."""
    if batch_size is None:
        raise ValueError("batch_size must be given with data in a tensor, or without data")
    check_count(batch_size, "batch_size")
    given: Mapping[str, Any] = conditioning or {}
    sources = {name: source for name, source in leaves(given, "conditioning") if source is not None}
    if data is not None:
        sources["data"] = data
    for name, source in sources.items():
        if not isinstance(source, Tensor):
            raise TypeError(f"{name} must be a tensor [M, ...], got {type(source).__name__}")
        if source.dim() == 0 or source.shape[0] == 0:
            raise ValueError(f"{name} must be a tensor [M, ...] with M > 0, got shape {list(source.shape)}")
    sizes = {name: source.shape[0] for name, source in sources.items() if isinstance(source, Tensor)}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"data and conditioning must have equally many samples, got {sizes}")
    if not sources:
        return lambda step: (batch_size, None), None
    total = next(iter(sizes.values()))
    orders: dict[int, Tensor] = {}

    def order(epoch: int) -> Tensor:
        if epoch not in orders:
            for old in [known for known in orders if known < epoch - 1]:
                del orders[old]
            orders[epoch] = torch.randperm(total, generator=torch.Generator().manual_seed(mixed_seed(seed, epoch)))
        return orders[epoch]

    def batches(step: int) -> tuple[Tensor | int, dict[str, Tensor] | None]:
        first, last = step * batch_size, (step + 1) * batch_size
        epochs = range(first // total, (last - 1) // total + 1)
        index = torch.cat([order(epoch)[max(first - epoch * total, 0) : last - epoch * total] for epoch in epochs])  # [batch_size]
        drawn = map_tensors(lambda source: source[index.to(source.device)].to(device), {"data": data, "conditioning": given})
        return batch_size if data is None else drawn["data"], drawn["conditioning"] or None

    return batches, total


def _refuse_several_processes() -> None:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    world_size = torch.distributed.get_world_size() if distributed else int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1:
        raise RuntimeError(f"Trainer runs in one process, but was launched in {world_size} (WORLD_SIZE), which would train separate copies")


@contextmanager
def _deferred_interrupt() -> Iterator[threading.Event]:
    """Within it the first SIGINT sets the event it yields, to be raised as KeyboardInterrupt at the end; the second interrupts at once.

    Outside of the main thread, which signals do not reach, and where SIGINT is ignored or not Python's to handle, nothing changes.
    """
    interrupted = threading.Event()
    main = threading.current_thread() is threading.main_thread()
    previous = signal.getsignal(signal.SIGINT) if main else None
    if previous is None or previous == signal.SIG_IGN:
        yield interrupted
        return

    def handler(signum: int, frame: object) -> None:
        interrupted.set()
        signal.signal(signal.SIGINT, previous)

    signal.signal(signal.SIGINT, handler)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, previous)
    if interrupted.is_set():
        raise KeyboardInterrupt
