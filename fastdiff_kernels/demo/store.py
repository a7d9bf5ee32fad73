"""Finished stages on disk: numbers as JSON, pictures and networks as safetensors."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

from torch import nn

from ..diffusion import EDMPrecond
from .data import ImageData
from .features import FeatureExtractor
from .settings import Settings
from .stages import Stage, new_denoiser

Network = TypeVar("Network", bound=nn.Module)

MARKER = ".fastdiff-demo"


def claim(out: Path) -> None:
    """Make the folder and mark it as a demo's; FileExistsError if it holds anything and no demo has marked it."""
    out.mkdir(parents=True, exist_ok=True)
    if (out / MARKER).exists():
        return
    held = sorted(path.name for path in out.iterdir())
    if held:
        raise FileExistsError(f"out must be a new or empty folder, or one of an earlier demo, got '{out}', which holds {held[:5]}")
    (out / MARKER).write_text("`fastdiff demo` writes to this folder and replaces what it wrote before.\n")


class Store:
    """``stages/<name>.json`` and ``.safetensors``, ``networks/<name>.safetensors`` and, while a stage trains, ``checkpoints/``.

    A stage counts as finished if its JSON is there and carries the fingerprint of this run. `out` must be new, empty or an earlier demo's.
    """

    def __init__(self, out: Path, fingerprint: str) -> None:
        claim(out)
        self.stages, self.networks, self.checkpoints = out / "stages", out / "networks", out / "checkpoints"
        self.fingerprint = fingerprint
        for folder in (self.stages, self.networks, self.checkpoints):
            folder.mkdir(exist_ok=True)

    def forget(self, names: Iterable[str]) -> None:
        """Remove what an earlier run left of these stages; other files in the three folders stay."""
        for name in names:
            for path in (
                self.stages / f"{name}.json",
                self.stages / f"{name}.json.partial",
                self.stages / f"{name}.safetensors",
                self.networks / f"{name}.safetensors",
            ):
                path.unlink(missing_ok=True)
            self._forget_checkpoint(name)

    def _forget_checkpoint(self, name: str) -> None:
        for suffix in (".pt", ".pt.partial"):
            (self.checkpoints / f"{name}{suffix}").unlink(missing_ok=True)

    def _record(self, name: str) -> dict | None:
        path = self.stages / f"{name}.json"
        record = json.loads(path.read_text()) if path.exists() else None
        return record if record is not None and record["fingerprint"] == self.fingerprint else None

    def seconds(self, name: str) -> float | None:
        """How long the finished stage took; None if it is not finished."""
        record = self._record(name)
        return None if record is None else record["seconds"]

    def load(self, name: str) -> Stage:
        """A finished stage, without its networks."""
        from safetensors.torch import load_file

        record = self._record(name)
        if record is None:
            raise FileNotFoundError(f"stage '{name}' of this run is not in {self.stages}")
        return Stage(record["rows"], record["curves"], record["details"], load_file(self.stages / f"{name}.safetensors"))

    def save(self, name: str, stage: Stage, seconds: float) -> None:
        """Write the stage; its JSON, which makes it count, goes last and in one piece."""
        from safetensors.torch import save_file

        save_file({key: grid.contiguous() for key, grid in stage.grids.items()}, self.stages / f"{name}.safetensors")
        for key, network in stage.networks.items():
            self.save_network(key, network)
        record = {
            "fingerprint": self.fingerprint,
            "seconds": seconds,
            "rows": stage.rows,
            "curves": stage.curves,
            "details": stage.details,
        }
        partial = self.stages / f"{name}.json.partial"
        partial.write_text(json.dumps(record))
        os.replace(partial, self.stages / f"{name}.json")
        self._forget_checkpoint(name)

    def save_network(self, name: str, network: nn.Module) -> None:
        from safetensors.torch import save_file

        save_file({key: value.contiguous() for key, value in network.state_dict().items()}, self.networks / f"{name}.safetensors")

    def load_network(self, name: str, settings: Settings, data: ImageData) -> EDMPrecond:
        """A denoiser that `save_network` wrote, frozen."""
        return self._load(name, new_denoiser(settings, data))

    def load_features(self, data: ImageData) -> FeatureExtractor:
        """The feature extractor that `save_network` wrote, frozen."""
        return self._load("features", FeatureExtractor(data.sample_shape[0], data.num_classes))

    def _load(self, name: str, network: Network) -> Network:
        from safetensors.torch import load_file

        network.load_state_dict(load_file(self.networks / f"{name}.safetensors"))
        return network.eval().requires_grad_(False)


def write_json(path: Path, value: object) -> None:
    """Indented JSON; a non-finite number is an error rather than invalid JSON."""
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")
