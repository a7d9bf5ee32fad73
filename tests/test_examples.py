"""The examples that need no other library's models run as they stand, here with less of everything."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
# Matplotlib's own, under numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
Image = pytest.importorskip("PIL.Image")


@pytest.fixture
def example(monkeypatch, request) -> ModuleType:
    """The script of this name, imported."""
    spec = importlib.util.spec_from_file_location(request.param, EXAMPLES / f"{request.param}.py")
    module = importlib.util.module_from_spec(spec)
    # Where dataclasses look for the names in their annotations.
    monkeypatch.setitem(sys.modules, request.param, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("example", ["score_matching_estimators"], indirect=True)
def test_ways_to_learn_a_score(example, monkeypatch, tmp_path, capsys):
    for name in ("checkerboard_task", "digits_task"):
        whole = getattr(example, name)
        few = dataclasses.replace(whole(fast=True), steps=2, batch=8, samples=36)
        monkeypatch.setattr(example, name, lambda fast, few=few: few)
    example.main(["--fast", "--out", str(tmp_path)])
    head, _, *rows = (tmp_path / "table.md").read_text().splitlines()
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == list(example.METHODS)
    for row in rows:
        steps, milliseconds, noise, quality = (float(cell) for cell in row.strip("| ").split(" | ")[1:5])
        assert (steps, milliseconds > 0, noise > 0, 0 < quality <= 1) == (2, True, True, True)
    assert head in capsys.readouterr().out
    assert Image.open(tmp_path / "estimators.png").size[0] > 1000
    trained = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.pt")}
    assert len(trained) == 2 * len(example.METHODS)
    example.main(["--fast", "--out", str(tmp_path)])
    assert trained == {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.pt")}, "what has been trained is taken again"


@pytest.mark.parametrize("example", ["score_matching_estimators"], indirect=True)
def test_the_distance_to_the_checkerboard_is_small_for_its_own_samples(example):
    own = example.checkerboard(10_000, torch.Generator().manual_seed(0))
    assert example.total_variation(own) < 0.08
    assert example.total_variation(own + 0.45) > 0.4
    assert example.total_variation(own + 10) == pytest.approx(1.0)


@pytest.mark.parametrize("example", ["skip_reuse"], indirect=True)
def test_what_a_skipped_step_should_do(example, monkeypatch, tmp_path):
    train = example.train
    monkeypatch.setattr(example, "train", lambda steps, channels: train(2, 8))
    monkeypatch.setattr(example, "SOLVERS", {"Euler": example.SOLVERS["Euler"]})
    monkeypatch.setattr(example, "BUDGETS", (14, 20, 30))
    example.main(["--fast", "--out", str(tmp_path)])
    _, budgets, *rows = (tmp_path / "table.txt").read_text().splitlines()
    assert budgets.split() == ["14", "20", "30"]
    for grid in example.GRIDS:
        assert [row[19:42].strip() for row in rows if row.startswith(f"Euler     {grid}")] == list(example.METHODS)
    assert Image.open(tmp_path / "skip_reuse.png").size[0] > 400
