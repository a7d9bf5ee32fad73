"""A whole demo at tiny sizes: stages, files, resumption and repeatability; quality is not what it can show."""

import dataclasses
import json
import re

import pytest
import torch
from safetensors.torch import load_file

from fastdiff_kernels.demo import ImageData, Settings, load_digits, run_demo, workers
from fastdiff_kernels.demo.settings import Training
from fastdiff_kernels.demo.store import MARKER, Store

SHORT = Training(steps=4, batch_size=16, learning_rate=1e-3, ema_decay=0.9, warmup_steps=1)
TINY = dataclasses.replace(
    Settings.fast(),
    channels=8,
    teacher=SHORT,
    lcss=SHORT,
    sim=SHORT,
    moment_matching=SHORT,
    schedule_knots=16,
    feature_epochs=1,
    floor_splits=3,
    name="tiny",
)
STAGES = ["teacher", "lcss", "schedule", "skipping", "sim", *(f"moment_matching_{k}" for k in (8, 4, 2, 1))]


@pytest.fixture(scope="module")
def few_digits():
    digits = load_digits()
    keep = torch.cat([(digits.labels == label).nonzero().flatten()[:12] for label in range(10)])
    return ImageData("digits", digits.images[keep], digits.labels[keep], digits.class_names, digits.scale, digits.shift)


@pytest.fixture(scope="module")
def finished(few_digits, tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    said = []
    metrics = run_demo(TINY, out, data=few_digits, progress=False, say=said.append)
    return metrics, out, said


def test_everything_promised_is_written(finished):
    metrics, out, _ = finished
    assert json.loads((out / "metrics.json").read_text()) == metrics
    networks = {path.stem for path in (out / "networks").iterdir()}
    assert networks == {"features", "teacher", "lcss", "sim", *(f"moment_matching_{k}" for k in (1, 2, 4, 8))}
    assert all(torch.isfinite(value).all() for value in load_file(out / "networks" / "sim.safetensors").values())
    for name in ("overview", "schedule", "skipping", "losses", "quality", "samples_teacher", "samples_sim", "samples_moment_matching_1"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_report_needs_no_other_file(finished):
    page = (finished[1] / "report.html").read_text(encoding="utf-8")
    sources = re.findall(r'src="([^"]{0,30})', page)
    assert len(sources) >= 16
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "http" not in re.sub(r'src="[^"]*"', "", page)


def test_rows_cost_what_their_baselines_cost(finished):
    rows = finished[0]["rows"]
    for row in rows.values():
        assert all(rows[name]["calls"] == row["calls"] for name in row["baselines"])
        assert row["frechet"] >= 0
        assert row["ms_per_sample"] > 0
    assert rows["teacher"]["calls"] == rows["lcss"]["calls"] == 35
    assert {name: row["calls"] for name, row in rows.items() if row["method"] == "distilled"} == {
        "sim": 1,
        "moment_matching_8": 8,
        "moment_matching_4": 4,
        "moment_matching_2": 2,
        "moment_matching_1": 1,
    }
    assert [rows[f"karras_{n}"]["calls"] for n in (4, 6, 8, 10)] == [7, 11, 15, 19]


def test_missed_bars_and_losing_rows_are_said_plainly(finished):
    metrics, out, said = finished
    page, terminal = (out / "report.html").read_text(encoding="utf-8"), "\n".join(said)
    assert metrics["bars_missed"] == [bar["name"] for bar in metrics["bars"] if not bar["passed"]]
    assert metrics["bars_missed"], "four training steps cannot meet every bar"
    for name in metrics["bars_missed"]:
        assert name in page
        assert f"MISSED {name}" in terminal
    for row in metrics["rows"].values():
        assert bool(row["loses_to"]) == (f"loses at {row['calls']} calls: {row['label']}, to" in terminal)


def test_every_stage_was_timed_and_predicted(finished):
    stages = finished[0]["stages"]
    assert [name for name in stages if name != "features"] == STAGES
    assert all(stages[name]["measured_s"] > 0 and stages[name]["predicted_s"] > 0 for name in STAGES)


def test_a_folder_that_no_demo_wrote_is_refused_and_left_as_it_is(few_digits, tmp_path):
    own = [tmp_path / "checkpoints" / "teacher.pt", tmp_path / "networks" / "mine.safetensors", tmp_path / "stages" / "plan.json"]
    for path in own:
        path.parent.mkdir()
        path.write_text("a week of training")
    message = r"out must be a new or empty folder, or one of an earlier demo, got .*, which holds \['checkpoints', 'networks', 'stages'\]"
    for resume in (False, True):
        with pytest.raises(FileExistsError, match=message):
            run_demo(TINY, tmp_path, data=few_digits, resume=resume, progress=False)
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(own)


def test_a_new_run_forgets_its_own_stages_alone(tmp_path):
    Store(tmp_path, "earlier")
    own = {tmp_path / "checkpoints" / "teacher.pt.copy", tmp_path / "networks" / "mine.safetensors", tmp_path / "stages" / "plan.json"}
    stages = {tmp_path / "checkpoints" / "teacher.pt", tmp_path / "networks" / "sim.safetensors", tmp_path / "stages" / "sim.json"}
    for path in own | stages:
        path.touch()
    Store(tmp_path, "later").forget(STAGES)
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == own | {tmp_path / MARKER}


def test_no_checkpoint_is_left_behind(finished):
    assert not list((finished[1] / "checkpoints").iterdir())


def deterministic(metrics):
    drop = {"ms_per_sample"}
    return {name: {k: v for k, v in row.items() if k not in drop} for name, row in metrics["rows"].items()}


def test_two_workers_end_as_one(finished, few_digits, tmp_path):
    metrics = run_demo(TINY, tmp_path, data=few_digits, workers=2, progress=False, say=lambda line: None)
    assert deterministic(metrics) == deterministic(finished[0])


def test_an_interrupted_run_resumes_and_ends_as_an_uninterrupted_one(finished, few_digits, tmp_path, monkeypatch):
    functions = workers.stage_functions(TINY)

    def interrupt(bench):
        raise KeyboardInterrupt

    monkeypatch.setattr(workers, "stage_functions", lambda settings: {**functions, "schedule": interrupt})
    with pytest.raises(KeyboardInterrupt):
        run_demo(TINY, tmp_path, data=few_digits, progress=False, say=lambda line: None)
    assert not (tmp_path / "metrics.json").exists()
    monkeypatch.undo()
    metrics = run_demo(TINY, tmp_path, data=few_digits, resume=True, progress=False, say=lambda line: None)
    assert [name for name, timing in metrics["stages"].items() if timing["resumed"]] == ["teacher", "lcss"]
    assert deterministic(metrics) == deterministic(finished[0])


def test_a_run_in_which_no_step_is_skipped_ends_with_its_report(few_digits, tmp_path):
    settings = dataclasses.replace(TINY, skip_threshold=0.0, skip_steps=6, schedule_steps=(4,), moment_matching_steps=(1,))
    said = []
    metrics = run_demo(settings, tmp_path, data=few_digits, progress=False, say=said.append)
    assert metrics["rows"]["adaptive_linspace_hold"]["calls"] == 6
    assert metrics["rows"]["adaptive_linspace_hold"]["psnr"] is None
    bar = next(bar for bar in metrics["bars"] if bar["name"] == "AdaptiveSkip PSNR (dB)")
    assert bar["value"] is None
    assert bar["passed"]
    assert "ok     AdaptiveSkip PSNR (dB): inf >= 30" in said
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    assert "6 network calls, inf dB" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_fewer_workers_than_one_are_refused(tmp_path):
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        run_demo(TINY, tmp_path, workers=0)


def test_other_settings_do_not_take_up_what_a_run_left(finished, few_digits):
    store_fingerprints = {TINY.fingerprint(few_digits), dataclasses.replace(TINY, seed=1).fingerprint(few_digits)}
    assert len(store_fingerprints) == 2
