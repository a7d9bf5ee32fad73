"""Finished stages on disk: numbers as JSON, pictures and networks as safetensors."""

from __future__ import annotations

import json
import os
from pathlib import Path

from torch import nn

from .data import ImageData
from .settings import Settings
from .stages import Stage, new_denoiser


class Store:
    """``stages/<name>.json`` and ``.safetensors``, ``networks/<name>.safetensors`` and, while a stage trains, ``checkpoints/``.

    A stage counts as finished if its JSON is there and carries the fingerprint of this run.
    """

    def __init__(self, out: Path, fingerprint: str) -> None:
        self.stages, self.networks, self.checkpoints = out / "stages", out / "networks", out / "checkpoints"
        self.fingerprint = fingerprint
        for folder in (self.stages, self.networks, self.checkpoints):
            folder.mkdir(parents=True, exist_ok=True)

    def forget(self) -> None:
        """Remove what an earlier run left in the three folders."""
        for folder in (self.stages, self.networks, self.checkpoints):
            for path in folder.iterdir():
                if path.suffix in {".json", ".safetensors", ".pt", ".partial"}:
                    path.unlink()

    def load(self, name: str, settings: Settings, data: ImageData) -> tuple[Stage, float] | None:
        """The finished stage and the seconds it took, or None."""
        from safetensors.torch import load_file

        path = self.stages / f"{name}.json"
        if not path.exists():
            return None
        record = json.loads(path.read_text())
        if record["fingerprint"] != self.fingerprint:
            return None
        grids = load_file(self.stages / f"{name}.safetensors")
        networks = {key: self._load_network(key, settings, data) for key in record["networks"]}
        return Stage(record["rows"], record["curves"], record["details"], grids, networks), record["seconds"]

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
            "networks": sorted(stage.networks),
        }
        partial = self.stages / f"{name}.json.partial"
        partial.write_text(json.dumps(record))
        os.replace(partial, self.stages / f"{name}.json")
        for checkpoint in self.checkpoints.glob(f"{name}.pt*"):
            checkpoint.unlink()

    def save_network(self, name: str, network: nn.Module) -> None:
        from safetensors.torch import save_file

        save_file({key: value.contiguous() for key, value in network.state_dict().items()}, self.networks / f"{name}.safetensors")

    def _load_network(self, name: str, settings: Settings, data: ImageData) -> nn.Module:
        from safetensors.torch import load_file

        denoiser = new_denoiser(settings, data)
        denoiser.load_state_dict(load_file(self.networks / f"{name}.safetensors"))
        return denoiser.eval().requires_grad_(False)


def write_json(path: Path, value: object) -> None:
    """Indented JSON; a non-finite number is an error rather than invalid JSON."""
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")
