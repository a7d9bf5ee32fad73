from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest

from benchmarks.harness import FIELDS
from fastdiff_kernels.bench import compare, report, rows
from fastdiff_kernels.cli import main

ROOT = Path(__file__).parents[2]
COMMON = {
    "date": "2024-01-01T00:00:00+00:00", "commit": "abc1234", "device": "Some CPU", "threads": 2, "torch": "2.13.0", "op": "attention",
    "network": "DiT-XL/2", "shape": "4x256x16x72", "dtype": "float32", "mode": "forward", "launch_bound": False,
}  # fmt: skip


def measured(provider: str, ms: float, eager_ms: float = 10.0, spread: float = 0.01, **changes) -> dict:
    times = {"p20_ms": ms * (1 - spread), "p50_ms": ms, "p80_ms": ms * (1 + spread)}
    return {**COMMON, "provider": provider, **times, "x_eager": eager_ms / ms, **changes}


def write(path: Path, *found: dict) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(found)
    return path


def test_only_the_last_run_of_a_case_is_shown(tmp_path):
    newer = {"date": "2024-02-01T00:00:00+00:00", "commit": "def5678"}
    path = write(
        tmp_path / "rows.csv", measured("eager", 10), measured("ours", 8), measured("eager", 10, **newer), measured("ours", 5, **newer)
    )
    text = report.markdown(rows.read(path))
    assert "| attention | DiT-XL/2 | 4x256x16x72 | float32 | forward | 5 | 2.00 |" in text
    assert "1.25" not in text
    assert "commit def5678" in text


def test_rows_that_lose_are_in_the_table_and_say_so(tmp_path):
    path = write(tmp_path / "rows.csv", measured("eager", 10), measured("ours", 20, x_compile=0.4))
    assert "| 0.50 (loses) | 0.40 (loses) |" in report.markdown(rows.read(path))


def test_what_no_gpu_has_measured_is_said(tmp_path):
    path = write(tmp_path / "rows.csv", measured("eager", 10), measured("ours", 5))
    assert "GPU: not measured." in report.markdown(rows.read(path))
    gpu = write(tmp_path / "gpu.csv", measured("eager", 10, device="NVIDIA X"), measured("ours", 5, device="NVIDIA X"))
    assert "not measured" not in report.markdown(rows.read(gpu))


def test_a_page_with_figures(tmp_path):
    sweep = [
        measured(p, ms * f, network=report.SWEEP, shape=f"N={n}") for p, f in (("eager", 1), ("ours", 0.5)) for n, ms in ((64, 1), (256, 9))
    ]
    path = write(tmp_path / "rows.csv", measured("eager", 10), measured("compile", 8), measured("ours", 5), *sweep)
    assert main(["bench", "report", str(path), "--out", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert sorted(p.name for p in (tmp_path / "out").glob("*.png")) == [
        "Some_CPU_attention.png",
        "Some_CPU_attention_N_float32_forward.png",
    ]
    assert "<td>4x256x16x72</td>" in page
    assert "N=64" not in page, "sweeps are drawn, not listed"


def test_tables_go_between_the_marks(tmp_path):
    path = write(tmp_path / "rows.csv", measured("eager", 10), measured("ours", 5))
    target = tmp_path / "README.md"
    target.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    assert main(["bench", "report", str(path), "--into", str(target)]) == 0
    text = target.read_text()
    assert text.startswith(f"before\n{report.BEGIN}\nSome CPU, 2 threads")
    assert text.endswith(f"{report.END}\nafter\n")
    assert "old" not in text
    target.write_text("no marks")
    assert main(["bench", "report", str(path), "--into", str(target)]) == 2


@pytest.mark.parametrize(
    ("ms", "spread", "verdict"),
    [(8.0, 0.01, "slower"), (5.0, 0.01, "noise"), (5.1, 0.001, "noise"), (3.0, 0.01, "faster"), (6.0, 0.2, "noise")],
)
def test_a_change_is_one_only_beyond_the_noise(tmp_path, ms, spread, verdict):
    a = write(tmp_path / "a.csv", measured("eager", 10), measured("ours", 5.0))
    # The machine has become half as fast, which is no change of ours.
    b = write(tmp_path / "b.csv", measured("eager", 20, spread=spread), measured("ours", 2 * ms, eager_ms=20, spread=spread))
    (change,) = compare.compare(rows.read(a), rows.read(b))
    assert change.verdict == verdict
    assert change.ratio == pytest.approx(ms / 5)
    assert main(["bench", "compare", str(a), str(b)]) == int(verdict == "slower")


def test_runs_of_one_file_by_commit(tmp_path, capsys):
    newer = {"date": "2024-02-01T00:00:00+00:00", "commit": "def5678"}
    path = write(
        tmp_path / "rows.csv", measured("eager", 10), measured("ours", 5), measured("eager", 10, **newer), measured("ours", 9, **newer)
    )
    assert main(["bench", "compare", f"{path}@abc", f"{path}@def"]) == 1
    assert "slower" in capsys.readouterr().out
    assert main(["bench", "compare", f"{path}@abc", f"{path}@123"]) == 2
    assert f"{path}@123: no rows" in capsys.readouterr().err


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "other.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="not a file of benchmark rows, the columns date, commit"):
        rows.read(path)
    assert main(["bench", "report", str(tmp_path / "absent.csv")]) == 2


@pytest.mark.parametrize("name", ["README.md", "benchmarks/results/README.md"])
def test_the_tables_shown_are_those_of_the_rows(name):
    """`make tables` writes them; nobody types them."""
    networks = re.search(r"^NETWORKS := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split() if name == "README.md" else ()
    text = (ROOT / name).read_text()
    assert report.splice(text, report.markdown(rows.read(ROOT / "benchmarks" / "results" / "rows.csv"), networks)) == text
