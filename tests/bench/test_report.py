from __future__ import annotations

import csv
import html
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest

from benchmarks.harness import FIELDS
from benchmarks.timing import Times
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


def test_a_network_has_its_parts_and_variants_with_it(tmp_path):
    networks = ("EDM", "EDM-16", "EDM2", "DiT-XL/2 rms half")
    path = write(tmp_path / "rows.csv", *(measured(p, 10, network=name) for name in networks for p in ("eager", "ours")))
    text = report.markdown(rows.read(path), ["EDM", "DiT-XL/2"])
    assert [name for name in networks if f"| {name} |" in text] == ["EDM", "EDM-16", "DiT-XL/2 rms half"]


def test_tables_of_a_network_that_was_not_measured_are_refused(tmp_path, capsys):
    """What the file shows stays there."""
    path = write(tmp_path / "rows.csv", *(measured(p, 10, network=name) for name in ("EDM-16", "DiT-XL/2") for p in ("eager", "ours")))
    target = tmp_path / "README.md"
    target.write_text(f"{report.BEGIN}\nold\n{report.END}\n")
    assert main(["bench", "report", str(path), "--into", str(target), "--network", "EDM", "--network", "DiT-XL"]) == 2
    assert "network must be one of 'EDM-16', 'DiT-XL/2'; got 'DiT-XL'" in capsys.readouterr().err
    assert "old" in target.read_text()


def test_options_that_would_have_no_effect_are_refused(tmp_path, capsys):
    path, out = write(tmp_path / "rows.csv", measured("eager", 10), measured("ours", 5)), tmp_path / "out"
    assert main(["bench", "report", str(path), "--out", str(out), "--network", "DiT-XL/2"]) == 2
    assert "--network needs --into" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["bench", "report", str(path), "--out", str(out), "--into", "README.md"])
    assert "not allowed with argument --out" in capsys.readouterr().err
    assert not out.exists()


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


def sampled(provider: str, seconds: float, x: float) -> dict:
    return measured(provider, 5, op="sampling", shape="B=1, 4 of 50 steps", x_eager=x, s_per_1000=seconds, absent="liger apex")


def test_samples_end_to_end_have_a_table_of_their_own(tmp_path):
    """Every way to a thousand samples, with what was not there to compare with."""
    samples = [sampled("eager", 6000, 1.0), sampled("ours", 6100, 0.98), sampled("ours, one step", 98.7, 60.8)]
    path = write(tmp_path / "rows.csv", *samples)
    text = report.markdown(rows.read(path))
    assert "| DiT-XL/2 | B=1, 4 of 50 steps | float32 | eager | 6,000 | 1.00 |" in text
    assert "| ours | 6,100 | 0.98 (loses) |" in text
    assert "| ours, one step | 98.7 | 60.80 |" in text
    assert "| sampling |" not in text
    assert "Not installed, so not compared with: apex, liger." in text
    page = report.write(rows.read(path), tmp_path / "out").read_text()
    assert page.index("Samples, end to end") < page.index("Ops, blocks and steps")
    assert '<td class="n loses">0.98 (loses)</td>' in page


def test_what_was_there_in_one_case_was_there(tmp_path):
    path = write(tmp_path / "rows.csv", measured("eager", 10, absent="liger apex"), measured("ours", 5, absent="apex"))
    assert "Not installed, so not compared with: apex." in report.markdown(rows.read(path))


def test_files_without_the_later_columns_can_be_read(tmp_path):
    path = tmp_path / "rows.csv"
    columns = [name for name in FIELDS if name not in ("s_per_1000", "timed", "clock_mhz", "absent", "megabytes", "gigaflop")]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows([measured("eager", 10), measured("ours", 5, launch_bound=True)])
    _, ours = rows.read(path)
    assert (ours.s_per_1000, ours.clock_mhz, ours.timed, ours.launch_bound) == (None, None, "", True)


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# What a page says of itself once it is laid out, put where --dump-dom shows it.
ASK = """<script>onload = () => { document.title = JSON.stringify({
    broken: [...document.images].filter(i => !i.naturalWidth).length,
    pictures: [...document.images].map(i => Math.round(i.clientWidth)),
    text: Math.min(...[...document.querySelectorAll("td,th,p")].map(e => parseFloat(getComputedStyle(e).fontSize))),
    across: document.documentElement.scrollWidth - document.documentElement.clientWidth,
}) }</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium or Chrome is installed")
@pytest.mark.parametrize("width", [1400, 500])
def test_the_page_opens_in_a_browser(tmp_path, width):
    """Its pictures load and are drawn no smaller than they can be read; what is wide scrolls by itself, and the page does not."""
    swept = [measured(p, ms, network=report.SWEEP, shape=f"N={n}") for p in ("eager", "ours") for n, ms in ((64, 1), (256, 9))]
    path = write(
        tmp_path / "rows.csv", measured("eager", 10), measured("compile", 8), measured("ours", 5), sampled("eager", 60, 1.0), *swept
    )
    page = report.write(rows.read(path), tmp_path / "out")
    page.write_text(page.read_text() + ASK)
    quiet = ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic"]
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", *quiet, f"--user-data-dir={tmp_path / 'profile'}"]
    command += [f"--window-size={width},2000", "--virtual-time-budget=2000", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    told = json.loads(html.unescape(re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)[1]))
    assert told["broken"] == 0
    assert told["across"] == 0
    assert told["text"] >= 12
    speedups, sweep = told["pictures"]
    assert speedups >= 640
    assert sweep >= 350


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


def verdicts(factor: float, noise: float, eager: float = 1.0, runs: int = 100, samples: int = 25) -> list[str]:
    """What is said of pairs of runs, the second `factor` times as slow, on a machine whose times vary by `noise` and drift between runs.

    In the second eager alone is `eager` times as slow.
    """
    random = np.random.default_rng(0)

    def run(folder: Path, name: str, factor: float, eager: float) -> list[rows.Row]:
        drift = random.lognormal(0, 0.2)
        milliseconds = {"eager": 10.0 * eager, "compile": 9.0, "sdpa": 7.0, "ours": 5.0 * factor}
        taken = {provider: Times(tuple(drift * t * random.lognormal(0, noise, samples))) for provider, t in milliseconds.items()}
        found = [
            {**COMMON, "provider": provider, "p20_ms": t.quantile(0.2), "p50_ms": t.median, "p80_ms": t.quantile(0.8),
             "x_eager": taken["eager"].median / t.median}
            for provider, t in taken.items()
        ]  # fmt: skip
        return rows.read(write(folder / name, *found))

    with tempfile.TemporaryDirectory() as folder:
        pairs = [(run(Path(folder), "a.csv", 1.0, 1.0), run(Path(folder), "b.csv", factor, eager)) for _ in range(runs)]
    return [compare.compare(a, b)[0].verdict for a, b in pairs]


@pytest.mark.parametrize("noise", [0.005, 0.02, 0.1])
def test_two_runs_of_the_same_code_differ_by_noise(noise):
    assert verdicts(1.0, noise).count("noise") >= 0.99 * 100


@pytest.mark.parametrize(("factor", "noise"), [(1.05, 0.005), (1.2, 0.02), (2.0, 0.1)])
def test_a_regression_beyond_the_noise_is_found(factor, noise):
    assert verdicts(factor, noise).count("slower") >= 0.99 * 100
    assert verdicts(1 / factor, noise).count("faster") >= 0.99 * 100


@pytest.mark.parametrize("noise", [0.005, 0.02])
@pytest.mark.parametrize("eager", [1 / 2.3, 1.2, 2.3])
def test_where_eager_alone_has_moved_ours_is_neither_slower_nor_faster(eager, noise):
    """The ratios of PyTorch's other providers have moved as well, and none of them is ours."""
    assert verdicts(1.0, noise, eager).count("noise") >= 0.99 * 100


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
