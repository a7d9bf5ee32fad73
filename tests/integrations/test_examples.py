"""The examples run as they stand, here with less of everything."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
# The schedulers' own, under numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def main(name: str):
    return runpy.run_path(str(EXAMPLES / name))["main"]


def test_patched_models_sample_the_same(capsys) -> None:
    differences = main("diffusers_patch.py")(size=8, steps=2)
    assert set(differences) == {"DiT", "PixArt", "U-Net"}
    assert max(differences.values()) < 1e-4
    assert "PatchReport of DiTTransformer2DModel" in capsys.readouterr().out


def test_stable_diffusion_skips_calls() -> None:
    pytest.importorskip("transformers")
    found = main("diffusers_skip.py")(steps=20, thresholds=(0.0, 0.5))
    assert found[0.0][0] == 0
    assert found[0.0][1] == float("inf")
    assert found[0.5][0] > 0


def test_digits_from_training_to_a_one_step_pipeline(tmp_path) -> None:
    pytest.importorskip("sklearn")
    images = main("diffusers_digits.py")(tmp_path, train=2, distil=1, channels=8, batch=4, steps=2)
    assert images.shape[0] == 10
    assert torch.isfinite(images).all()
    assert (tmp_path / "samples.png").stat().st_size > 0
    assert (tmp_path / "pipeline" / "model_index.json").exists()
