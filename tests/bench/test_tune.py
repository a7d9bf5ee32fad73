"""`make tune`: what the search finds, what it may not use, and how a search that was cut off goes on. Times are invented here."""

from __future__ import annotations

import csv
import time
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch

from benchmarks import choose, tune
from benchmarks.workloads import Case, Workload
from fastdiff_kernels import _choices
from fastdiff_kernels.triton import _tuned
from fastdiff_kernels.triton._tuned import Question, tuned

GPU = 7


class Sizes(NamedTuple):
    keys: int
    warps: int
    whole: bool
    """Nothing to be searched."""


OWN = Sizes(keys=32, warps=4, whole=True)


def launcher(x, y):
    """A product by a launcher that asks, and that goes wrong with 16 warps."""
    sizes = tuned("product", GPU, x.dtype, x.shape[-1], OWN)
    if sizes.keys > 128:
        raise RuntimeError("out of resource: shared memory")
    return x * y * (1 + (sizes.warps == 16))


def case(width: int = 8) -> Case:
    w = Workload("product", "none", (4, width), lambda: [torch.randn(4, width), torch.randn(4, width)], torch.mul, launcher)
    return Case(w, torch.float32, "forward")


def cost(launch: dict[str, int]) -> float:
    """Least at 64 keys and 16 warps, which compute something else, and then at 64 and 8."""
    return 1.0 + abs(launch["keys"] - 64) / 64 + abs(launch["warps"] - 16) / 16


def timer(runs):
    return {name: cost(_tuned.parse(name)) for name in runs}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Tables here instead of those shipped."""
    monkeypatch.setattr(_tuned, "FOLDER", tmp_path)
    _tuned.forget()
    yield tmp_path
    _tuned.forget()


def run_tune(folder, cases, seconds=60.0):
    def trials(target):
        return tune.Trials(target, "cpu", timer)

    return tune.tune(cases, _tuned.path_of(GPU, folder), GPU, "cpu", time.monotonic() + seconds, trials)


def test_the_search_goes_down_from_the_launchers_own_answer():
    found = tune.search((("keys", 32), ("warps", 4)), lambda launches: {launch: cost(dict(launch)) for launch in launches})
    assert dict(found.launch) == {"keys": 64, "warps": 16}
    assert found.speedup == pytest.approx(cost({"keys": 32, "warps": 4}) / cost({"keys": 64, "warps": 16}))
    assert found.excluded == 0


def test_a_gain_within_the_noise_changes_nothing():
    found = tune.search((("warps", 4),), lambda launches: {launch: 1.0 - 0.001 * dict(launch)["warps"] for launch in launches})
    assert found == tune.Found((("warps", 4),), 1.0, 3, 0)


def test_fields_stay_in_their_ranges():
    assert set(tune.neighbours((("warps", 16), ("stages", 1)))) == {(("warps", 8), ("stages", 1)), (("warps", 16), ("stages", 2))}


def test_an_own_answer_that_cannot_be_used_is_an_error():
    with pytest.raises(ValueError, match="warps=4 cannot be used"):
        tune.search((("warps", 4),), lambda launches: {})


def test_wrong_results_and_failures_are_excluded(folder):
    """The fastest configuration computes something else; more than 128 keys cannot be launched."""
    assert run_tune(folder, [case()]) == 0
    (row,) = _tuned.read(folder / "sm_7.csv")
    assert (row["kernel"], row["dtype"], row["size"], row["launch"]) == ("product", "float32", "8", "keys=64 warps=8")
    assert float(row["speedup"]) == pytest.approx(cost({"keys": 32, "warps": 4}) / cost({"keys": 64, "warps": 8}), abs=1e-3)
    assert ", 0 excluded" not in row["evidence"]


def test_what_spills_is_excluded(folder, monkeypatch):
    asked = {}

    def launcher(x, y):
        asked["sizes"] = tuned("product", GPU, x.dtype, x.shape[-1], OWN)
        return x * y

    class Late:
        """Reads what was asked once the call is over."""

        @property
        def n_spills(self):
            return 8 if asked["sizes"].warps == 8 else 0

    @contextmanager
    def compiled():
        yield [Late()]

    monkeypatch.setattr(tune, "compiled_kernels", compiled)
    w = Workload("product", "none", (4, 8), lambda: [torch.randn(4, 8), torch.randn(4, 8)], torch.mul, launcher)
    run_tune(folder, [Case(w, torch.float32, "forward")])
    (row,) = _tuned.read(folder / "sm_7.csv")
    assert row["launch"] == "keys=64 warps=4", "the way to 16 warps leads over 8"


def test_a_search_that_was_cut_off_goes_on(folder, capsys):
    cases = [case(8), case(16), case(8)]
    assert run_tune(folder, cases, seconds=-1) == 3
    assert run_tune(folder, cases[:1]) == 0
    first = (folder / "sm_7.csv").read_text()
    assert run_tune(folder, cases) == 0
    whole = (folder / "sm_7.csv").read_text()
    assert whole.startswith(first)
    assert [row["size"] for row in _tuned.read(folder / "sm_7.csv")] == ["8", "16"], "each question once"
    assert "[2/3] product float32 16: keys=64 warps=8" in capsys.readouterr().out


def test_launchers_read_what_was_written(folder):
    run_tune(folder, [case()])
    assert tuned("product", GPU, torch.float32, 8, OWN) == Sizes(64, 8, True)
    for other in (("product", GPU, torch.float32, 9), ("product", GPU, torch.bfloat16, 8), ("sum", GPU, torch.float32, 8)):
        assert tuned(*other, OWN) is OWN
    assert tuned("product", GPU + 1, torch.float32, 8, OWN) is OWN, "another GPU has no file"


def test_a_table_that_does_not_fit_its_launcher_is_refused(folder):
    (folder / "sm_7.csv").write_text("kernel,dtype,size,launch,speedup,evidence\nproduct,float32,8,queries=64,1,none\n")
    with pytest.raises(ValueError, match="Sizes has no queries; its fields are keys, warps, whole"):
        tuned("product", GPU, torch.float32, 8, OWN)
    _tuned.forget()
    (folder / "sm_7.csv").write_text("kernel,launch\n")
    with pytest.raises(
        ValueError, match=r"sm_7\.csv: the columns must be kernel, dtype, size, launch, speedup, evidence, got kernel, launch"
    ):
        tuned("product", GPU, torch.float32, 8, OWN)


def test_shipped_tables_can_be_read():
    for path in _tuned.FOLDER.glob("*.csv"):
        for row in _tuned.read(path):
            assert set(_tuned.parse(row["launch"])) <= tune.RANGES.keys()
            assert float(row["speedup"]) >= 1
            assert row["evidence"]


def test_questions_know_no_batch():
    assert set(Question.__dataclass_fields__) == {"kernel", "gpu", "dtype", "size"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_written_and_the_reason_is_said(tmp_path, capsys):
    assert tune.main(["--out", str(tmp_path)]) == 2
    assert "torch finds no GPU, so no launch configuration can be measured" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_all_cases_can_be_made():
    cases = tune.workload_cases()
    assert {c.workload.op.split(",")[0] for c in cases} >= {"attention", "attention_dual", "layer_norm_modulate", "qk_norm_rope"}
    assert [c.dtype for c in cases] == sorted((c.dtype for c in cases), key=tune.DTYPES.index), "the most wanted dtype first"


def point(rows, width, op, definition, mode="compiled"):
    return choose.Point("attention", mode, rows, width, {"fastdiff": op, "inductor": definition}, {"fastdiff": op, "inductor": definition})


def test_one_row_where_one_backend_is_the_best_everywhere():
    (row,) = choose.choices([point(256, 64, 1.0, 1.5), point(1024, 72, 1.0, 1.2)], "cpu", "here")
    assert (row["backend"], row["min_width"], row["max_width"], row["min_rows"], row["max_rows"]) == ("fastdiff", "", "", "", "")
    assert "fastdiff 1.20x to 1.50x of the next forward and 1.20x to 1.50x both ways at 256x64 and 1024x72" in row["evidence"]


@pytest.mark.parametrize("dimension", ["rows", "width"])
def test_two_rows_where_size_decides(dimension):
    sizes = [(256, 64), (256, 128), (256, 512)] if dimension == "width" else [(64, 128), (256, 128), (1024, 128)]
    points = [point(*size, op, 1.0) for size, op in zip(sizes, (2.0, 1.5, 0.5), strict=True)]
    small, large = choose.choices(points, "cpu", "here")
    assert (small["backend"], small[f"max_{dimension}"]) == ("inductor", str(sizes[1][dimension == "width"]))
    assert (large["backend"], large[f"min_{dimension}"]) == ("fastdiff", str(sizes[1][dimension == "width"] + 1))


def test_a_backend_that_refuses_some_sizes_is_chosen_for_none_of_their_side():
    both = [{"triton": 2.0, "sdpa": 1.0}, {"triton": 2.0}]
    points = [choose.Point("attention", "eager", 256, width, times, times) for width, times in zip((64, 72), both, strict=True)]
    narrow, wide = choose.choices(points, "sm_90", "here")
    assert (narrow["backend"], wide["backend"]) == ("sdpa", "triton")


def test_calls_without_gradients_are_chosen_by_forward_alone():
    times = {"fastdiff": 1.0, "inductor": 0.8}, {"fastdiff": 2.0, "inductor": 3.0}
    for mode, best in (("compiled", "fastdiff"), ("compiled_inference", "inductor")):
        (row,) = choose.choices([choose.Point("pixel_norm", mode, 256, 64, *times)], "cpu", "here")
        assert (row["mode"], row["backend"]) == (mode, best)


@pytest.mark.parametrize("rope", [None, "interleaved", "half"])
def test_a_rotated_norm_is_measured_by_itself(rope):
    found = choose.measure(choose.normalised((1, 4, 2, 8), rope), "compiled", "cpu", 0.01)
    assert found.op == ("qk_norm_rope" if rope is None else f"qk_norm_rope {rope}")


def test_rows_of_others_stay(tmp_path, monkeypatch):
    """In pieces: what was measured is not measured again, and the table is written when all is."""
    measured = []

    def fake(call, mode, device, seconds):
        measured.append(call.op)
        return point(256, 64 * len(measured), 1.0, 0.5)

    monkeypatch.setattr(choose, "measure", fake)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    table = tmp_path / "choices.csv"
    original = (_tuned.FOLDER.parent / "choices.csv").read_text()
    table.write_text(original)
    points = tmp_path / "points.jsonl"
    calls = [choose.CALLS[0]] * 3
    assert choose.update(table, time.monotonic() - 1, points, calls=calls) == 3
    assert table.read_text() == original
    real = time.monotonic
    monkeypatch.setattr(choose.time, "monotonic", lambda: real() + (100 if len(measured) == 2 else 0))
    assert choose.update(table, real() + 50, points, calls=calls) == 1
    monkeypatch.setattr(choose.time, "monotonic", real)
    assert choose.update(table, real() + 50, points, calls=calls) == 0
    assert len(measured) == 3
    assert not points.exists()
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    new = [row for row in rows if row["op"] == "attention" and row["device"] == "cpu"]
    assert [(row["mode"], row["backend"]) for row in new] == [("compiled", "inductor"), ("compiled_inference", "inductor")]
    others = [line for line in original.splitlines() if not line.startswith("attention,cpu,compiled")]
    assert [line for line in table.read_text().splitlines() if not line.startswith("attention,cpu,compiled")] == others
    assert rows[:2] == new


def test_a_compiled_call_is_timed_with_the_op_and_with_its_definition():
    call = choose.modulated("gate_residual", (1, 8, 16), 2, 1)
    found = choose.measure(call, "compiled", "cpu", 0.01)
    assert (found.op, found.mode, found.width) == ("gate_residual", "compiled", 16)
    assert found.forward.keys() == found.both.keys() == {"fastdiff", "inductor"}
    assert min(*found.forward.values(), *found.both.values()) > 0


def test_an_eager_call_is_timed_on_the_backends_that_run_it(monkeypatch):
    """No kernel of a GPU runs here, so there is nothing to choose between."""
    call = choose.modulated("gate_residual", (1, 8, 16), 2, 1)
    if not torch.cuda.is_available():
        assert choose._eager(call, call.tensors()) == {}
    assert {"eager", "compiled", "compiled_inference"} == set(_choices.MODES)
