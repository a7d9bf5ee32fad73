"""The examples run as they stand, here with less of everything."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from PIL import Image

EXAMPLES = Path(__file__).parents[2] / "examples"
# The schedulers' own, under numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def main(name: str):
    return runpy.run_path(str(EXAMPLES / name))["main"]


def test_patched_models_sample_the_same(capsys, tmp_path) -> None:
    differences = main("diffusers_patch.py")(size=8, steps=2, out=tmp_path / "patched.png")
    assert set(differences) == {"DiT", "PixArt", "U-Net"}
    assert max(differences.values()) < 1e-4
    assert "PatchReport of DiTTransformer2DModel" in capsys.readouterr().out
    assert Image.open(tmp_path / "patched.png").size == (6 * 8 * 4, 3 * 8 * 4)


def test_stable_diffusion_skips_calls(tmp_path) -> None:
    pytest.importorskip("transformers")
    found = main("diffusers_skip.py")(steps=20, thresholds=(0.0, 0.5), out=tmp_path / "skipped.png")
    assert found[0.0][0] == 0
    assert found[0.0][1] == float("inf")
    assert found[0.5][0] > 0
    assert Image.open(tmp_path / "skipped.png").size[0] == 3 * Image.open(tmp_path / "skipped.png").size[1]


def test_digits_from_training_to_a_one_step_pipeline(tmp_path) -> None:
    pytest.importorskip("sklearn")
    images = main("diffusers_digits.py")(tmp_path, train=2, distil=1, channels=8, batch=4, steps=2)
    assert images.shape[0] == 10
    assert torch.isfinite(images).all()
    assert (tmp_path / "samples.png").stat().st_size > 0
    assert (tmp_path / "pipeline" / "model_index.json").exists()
