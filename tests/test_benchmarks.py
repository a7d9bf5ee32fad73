"""The harness of `pytest benchmarks`: what gets a row, and what its columns count."""

from __future__ import annotations

import csv
import importlib.util
import os
import platform
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import synchronisations
from benchmarks.gpu_session import Piece, pieces, run
from benchmarks.harness import FIELDS, Session, WrongResult, measured
from benchmarks.memory import peak_bytes
from benchmarks.provenance import device_name
from benchmarks.synchronisations import TRAJECTORIES
from benchmarks.timing import Times
from benchmarks.workloads import QUICK, Case, Variant, Workload, cases, quick
from fastdiff_kernels import ops
from fastdiff_kernels._registry import OPS

ROOT = Path(__file__).parents[1]
BENCHES = sorted(path.stem for path in (ROOT / "benchmarks").glob("bench_*.py"))


def product(x, y):
    return x * y


def workload(**changes) -> Workload:
    settings = {"gradients": (0, 1), **changes}
    return Workload("product", "none", (4, 8), lambda: [torch.randn(4, 8), torch.randn(4, 8)], product, product, **settings)


def test_a_wrong_kernel_gets_no_row():
    session = Session("cpu", 0.01)
    with pytest.raises(WrongResult, match="ours: output 0"):
        session.measure(Case(workload(), torch.float32, "forward"), {"eager": product, "ours": lambda x, y: x * y + 1e-3})
    assert session.rows == []


def test_a_broken_kernel_gets_no_row_from_the_command(tmp_path):
    """`pytest benchmarks` with one op of the package broken on purpose: it fails, and saves the rows of the others alone."""
    (tmp_path / "breaking.py").write_text(
        "from fastdiff_kernels import ops\nworking = ops.lcss_loss\nops.lcss_loss = lambda *args: 1.001 * working(*args)\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "breaking", "benchmarks/bench_sweeps.py", "--quick"]
    command += ["-k", "lcss_loss and 192 and forward or integrate_schedule and steps", f"--save-rows={tmp_path / 'rows.csv'}"]
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stdout
    assert re.search(r"WrongResult: lcss_loss sweep elements=192 \w+ forward: ours: output 0 is", done.stdout)
    with (tmp_path / "rows.csv").open(newline="") as file:
        assert {row["op"] for row in csv.DictReader(file)} == {"integrate_schedule"}


def test_a_wrong_gradient_gets_no_row():
    class Halved(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, y):
            ctx.save_for_backward(x, y)
            return x * y

        @staticmethod
        def backward(ctx, grad):
            x, y = ctx.saved_tensors
            return grad * y, grad * x / 2

    session = Session("cpu", 0.01)
    with pytest.raises(WrongResult, match="ours: output 2"):
        session.measure(Case(workload(), torch.float32, "fwd+bwd"), {"eager": product, "ours": Halved.apply})
    assert session.rows == []


def test_a_kernel_that_returns_nan_gets_no_row():
    session = Session("cpu", 0.01)
    with pytest.raises(WrongResult):
        session.measure(Case(workload(), torch.float32, "forward"), {"eager": product, "ours": lambda x, y: x * y * torch.nan})


def test_a_wrong_rival_is_left_out_and_said_to_be(tmp_path):
    session = Session("cpu", 0.01)
    session.measure(Case(workload(), torch.float32, "forward"), {"eager": product, "rival": lambda x, y: x * y + 1e-3, "ours": product})
    assert [row.provider for row in session.rows] == ["eager", "ours"]
    assert session.rows[-1].x_best_rival is None
    (wrong,) = session.left_out
    assert "rival: output 0 is 1.0" in wrong


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", ["forward", "fwd+bwd"])
def test_rows_are_ratios_of_one_run(mode, dtype):
    session = Session("cpu", 0.01)
    session.measure(Case(workload(), dtype, mode), {"eager": product, "rival": product, "ours": product})
    eager, rival, ours = session.rows
    assert ours.x_eager == pytest.approx(eager.p50_ms / ours.p50_ms)
    assert ours.x_best_rival == pytest.approx(rival.p50_ms / ours.p50_ms)
    assert ours.x_compile is None
    assert ours.of_copy > 0
    assert ours.p20_ms <= ours.p50_ms <= ours.p80_ms


def test_random_providers_are_compared_with_what_can_be_checked():
    """Eager draws its own numbers, so only ours is held to the truth."""
    noisy = workload(checkable=product, gradients=())
    session = Session("cpu", 0.01)
    session.measure(Case(noisy, torch.float32, "forward"), {"eager": lambda x, y: x * torch.randn_like(y), "ours": product})
    with pytest.raises(WrongResult, match="ours"):
        session.measure(Case(noisy, torch.float32, "forward"), {"eager": product, "ours": lambda x, y: x + y})


def test_bytes_are_one_read_and_one_write_each_way():
    size = 4 * 8 * 4
    forward, both = (Case(workload(), torch.float32, mode) for mode in ("forward", "fwd+bwd"))
    args = forward.inputs(torch.float32, "cpu")
    assert forward.bytes(args, product(*args).unsqueeze(0)) == 3 * size
    leaves = both.inputs(torch.float32, "cpu")
    results = both.bind(product, leaves, [torch.ones(4, 8)])()
    # Two inputs and one output; then the inputs and the output's gradient again, and two gradients.
    assert both.bytes(leaves, results) == (3 + 3 + 2) * size


def test_peak_memory_counts_what_is_held_at_once():
    x = torch.randn(1 << 16)  # 256 KiB
    expected = {
        x.nbytes: (lambda: x + 1, lambda: (x + 1).mul_(2)),
        3 * x.nbytes: (lambda: (x + 1) + (x + 2),),
        0: (lambda: x.neg_(),),
    }
    for size, computations in expected.items():
        for computation in computations:
            # Numbers that become tensors of one element count as well.
            assert size <= peak_bytes(computation, "cpu") < size + 64


def test_a_rival_that_refuses_a_case_is_left_out_with_its_reason():
    def picky(x, y):
        raise RuntimeError("only on Tuesdays\nand never twice")

    session = Session("cpu", 0.01)
    session.measure(Case(workload(), torch.float32, "forward"), {"eager": product, "rival": picky, "ours": product})
    assert [row.provider for row in session.rows] == ["eager", "ours"]
    assert session.left_out == ["product none 4x8 float32 forward: rival: does not run: only on Tuesdays"]


@pytest.mark.parametrize("provider", ["ours", "ours-compiled", "eager"])
def test_what_we_run_may_not_refuse(provider):
    def broken(x, y):
        raise RuntimeError("no such kernel")

    session = Session("cpu", 0.01)
    with pytest.raises(RuntimeError, match="no such kernel"):
        session.measure(Case(workload(), torch.float32, "forward"), {"eager": product, "ours": product, provider: broken})
    assert session.rows == []


def test_ours_on_one_backend_alone_is_a_column_of_its_own_unless_it_has_no_kernel_there():
    gate = Workload(
        "gate_residual", "none", (2, 3, 8), lambda: [torch.randn(2, 3, 8), torch.randn(2, 3, 8), torch.randn(2, 8)],
        lambda x, branch, gate: x + gate.unsqueeze(1) * branch, ops.gate_residual, gradients=(0, 1, 2),
    )  # fmt: skip
    session = Session("cpu", 0.01)
    case = Case(gate, torch.float32, "fwd+bwd")
    session.measure(case, {"eager": gate.eager, "ours": gate.ours}, ("cpu", "reference", "sdpa"))
    assert [row.provider for row in session.rows] == ["eager", "ours", "ours-cpu", "ours-reference"]
    (refused,) = session.left_out
    assert "ours-sdpa: does not run: backend('sdpa') cannot run gate_residual" in refused


def sampler(run=lambda x, y: x * y / 2, definition=lambda x, y: x * y / 2) -> Workload:
    """A product, of which a thousand samples take 250 calls, and half of it, of which they take 10."""
    half = Variant(run, definition, lambda: 10)
    return workload(gradients=(), variants={"ours, half": half}, per_thousand=lambda: 250, streams=False)


def test_a_thousand_samples_are_what_counts_where_samples_are_drawn():
    session = Session("cpu", 0.01)
    measured = session.measure(Case(sampler(), torch.float32, "forward"), {"eager": product, "ours": product})
    eager, ours, half = session.rows
    assert eager.s_per_1000 == pytest.approx(0.25 * eager.p50_ms)
    assert half.s_per_1000 == pytest.approx(0.01 * half.p50_ms)
    assert half.x_eager == pytest.approx(eager.s_per_1000 / half.s_per_1000)
    assert measured.speedups["ours, half"] == pytest.approx(half.x_eager)
    assert ours.x_best_rival is None, "a variant is ours"
    assert half.of_copy is half.megabytes is None


def test_a_variant_is_held_to_its_own_definition():
    session = Session("cpu", 0.01)
    with pytest.raises(WrongResult, match="ours, half: output 0"):
        session.measure(Case(sampler(run=product), torch.float32, "forward"), {"eager": product, "ours": product})
    assert session.rows == []


def test_quantiles():
    times = Times((5.0, 1.0, 3.0, 2.0, 4.0))
    assert (times.quantile(0.2), times.median, times.quantile(0.8)) == (2.0, 3.0, 5.0)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what freed memory costs is known of glibc")
def test_freed_memory_is_kept_so_that_no_variant_pays_for_getting_it_again():
    """Of 40 MB, which glibc maps afresh in each call by itself: 10,240 page faults. The first calls still find where the heap has room."""
    code = """
import resource, statistics, torch
from benchmarks.timing import interleave
faults = []
def run():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(10 << 20)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
times = interleave({"ones": run}, 2.0, "cpu")["ones"]
print(statistics.median(faults[-len(faults) // 3 :]), times.how)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300, check=True)
    faults, how = done.stdout.split(" ", 1)
    assert float(faults) < 100
    assert how == "calls, freed memory kept\n"


def test_rows_are_appended_with_their_provenance(tmp_path):
    session, path = Session("cpu", 0.01), tmp_path / "rows.csv"
    for _ in range(2):
        session.measure(Case(workload(), torch.float32, "forward"), {"eager": product})
        session.save(path)
    with path.open(newline="") as file:
        first, second = csv.DictReader(file)
    assert tuple(first) == FIELDS
    assert first["op"] == second["op"] == "product"
    assert first["commit"]


def test_a_file_of_earlier_rows_gets_the_columns_that_came_later(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("op,date,note\nproduct,2020-01-01,kept\n")
    session = Session("cpu", 0.01)
    session.measure(Case(workload(), torch.float32, "forward"), {"eager": product})
    session.save(path)
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        earlier, row = reader
    assert reader.fieldnames[:3] == ["op", "date", "note"]
    assert set(FIELDS) <= set(reader.fieldnames)
    assert (earlier["date"], earlier["note"], earlier["p50_ms"]) == ("2020-01-01", "kept", "")
    assert (row["op"], row["note"]) == ("product", "")
    assert row["timed"].startswith("calls")
    assert float(row["p50_ms"]) > 0


def test_what_a_file_has_rows_for_need_not_be_measured_again(tmp_path):
    path = tmp_path / "rows.csv"
    assert measured(path, "cpu") == set()
    session = Session("cpu", 0.01)
    done, torn = (Case(workload(), torch.float32, mode) for mode in ("forward", "fwd+bwd"))
    session.measure(done, {"eager": product, "ours": product})
    session.measure(torn, {"eager": product})
    session.save(path)
    assert measured(path, "cpu") == {str(done)}
    path.write_text(path.read_text().replace(device_name("cpu"), "another device"))
    assert measured(path, "cpu") == set()


def test_a_run_goes_on_after_the_cases_of_its_file(tmp_path):
    """With rows for all but one, it measures that one; with that, nothing, and is content."""
    path = tmp_path / "rows.csv"
    missing, *rest = cases(importlib.import_module("benchmarks.bench_sweeps").WORKLOADS, [torch.float32])
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["device", "op", "network", "shape", "dtype", "mode", "provider"])
        writer.writeheader()
        for case in rest:
            w = case.workload
            row = {"op": w.op, "network": w.network, "shape": w.shape, "dtype": "float32", "mode": case.mode, "provider": "ours"}
            writer.writerow({"device": device_name("cuda" if torch.cuda.is_available() else "cpu"), **row})
    command = [sys.executable, "-m", "pytest", "-q", "benchmarks/bench_sweeps.py", "--quick", "--resume"]
    command += ["--dtype=float32", f"--save-rows={path}"]
    for expected in ("1 passed", "1 skipped"):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout
        assert expected in done.stdout.splitlines()[-1]
    with path.open(newline="") as file:
        *_, row = csv.DictReader(file)
    assert f"{row['op']} sweep {row['shape']} float32 {row['mode']}" == str(missing)


def test_rows_have_every_column_that_is_promised(tmp_path):
    flops = workload(flops=lambda x, y: x.numel())
    session = Session("cpu", 0.01)
    session.measure(Case(flops, torch.float32, "fwd+bwd"), {"eager": product, "compile": product, "rival": product, "ours": product})
    ours = session.rows[-1]
    assert ours.megabytes == pytest.approx((3 + 3 + 2) * 4 * 8 * 4 / 1e6)
    assert ours.gb_per_s == pytest.approx(ours.megabytes / ours.p50_ms)
    assert ours.gigaflop == pytest.approx(3 * 32 / 1e9)
    assert ours.tflop_per_s == pytest.approx(ours.gigaflop / ours.p50_ms)
    assert min(ours.of_copy, ours.of_matmul, ours.x_eager, ours.x_compile, ours.x_best_rival) > 0
    assert ours.peak_mb > 0
    assert ours.launch_bound is False, "there are no launches on a CPU"
    assert ours.s_per_1000 is None


def test_a_quick_run_measures_every_op():
    everything = [w for name in BENCHES for w in importlib.import_module(f"benchmarks.{name}").WORKLOADS]
    chosen = [w for w in everything if quick(w)]
    assert {w.op for w in chosen} & OPS.keys() == {w.op for w in everything} & OPS.keys()
    assert len(chosen) < len(everything)
    unknown = [name for name in QUICK if not any(w.network == name or w.network.startswith(f"{name} ") for w in everything)]
    assert unknown == []


def test_seconds_must_be_above_zero():
    command = [sys.executable, "-m", "pytest", "-q", "benchmarks/bench_sweeps.py", "--collect-only", "--seconds=0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "--seconds must be a finite number above 0; got 0.0" in done.stderr


def test_a_gpu_session_goes_on_where_it_was_cut_off(tmp_path):
    count = f"import pathlib; p = pathlib.Path({str(tmp_path / 'count')!r}); p.write_text(p.read_text() + 'x' if p.exists() else 'x')"
    marker = tmp_path / "now it is quick"
    todo = [
        Piece("first", (sys.executable, "-c", count)),
        Piece("missing", ("none",), needs="no-such-tool"),
        Piece("wrong", (sys.executable, "-c", "raise SystemExit(3)")),
        Piece("slow", (sys.executable, "-c", f"import pathlib, time; pathlib.Path({str(marker)!r}).exists() or time.sleep(600)")),
        Piece("last", (sys.executable, "-c", "print('done')")),
    ]
    cut = run(todo, tmp_path / "out", 5)
    assert cut == {"first": "passed", "missing": "absent", "wrong": "failed 3", "slow": "cut off 1", "last": "left"}
    again = run(todo, tmp_path / "out", 5)
    assert again == {**cut, "slow": "cut off 2", "last": "passed"}, "what is slow is run after the others"
    marker.touch()
    whole = run(todo, tmp_path / "out", 600)
    assert whole == {**again, "slow": "passed"}
    assert (tmp_path / "count").read_text() == "x", "what had passed was not run again"
    assert (tmp_path / "out" / "last.log").read_text() == "done\n"


def test_tests_that_were_cut_off_go_on_where_they_were(tmp_path):
    """A test that never ends is run last from then on; one that fails is run, and fails, again."""
    (tmp_path / "test_things.py").write_text(f"""
import os, pathlib, signal
here = pathlib.Path({str(tmp_path)!r})
def note(name): (here / "ran").open("a").write(name)
def test_a(): note("a")
def test_b():
    note("b")
    if not (here / "now it ends").exists(): os.kill(os.getpid(), signal.SIGKILL)
def test_c(): note("c")
def test_d(): note("d"); assert (here / "now it passes").exists()
""")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.unfinished", f"--unfinished={tmp_path / 'notes'}", str(tmp_path)]

    def outcome(ran: str) -> int:
        (tmp_path / "ran").write_text("")
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert (tmp_path / "ran").read_text() == ran, done.stdout
        return done.returncode

    assert outcome("ab") == -signal.SIGKILL
    assert outcome("cdb") == -signal.SIGKILL
    (tmp_path / "now it ends").touch()
    assert outcome("db") == pytest.ExitCode.TESTS_FAILED
    (tmp_path / "now it passes").touch()
    assert outcome("d") == pytest.ExitCode.OK
    assert outcome("") == pytest.ExitCode.OK, "nothing is left"


def test_a_gpu_session_names_files_that_exist(tmp_path):
    for piece in pieces(tmp_path):
        for part in piece.command:
            if part.startswith("benchmarks."):
                assert importlib.util.find_spec(part), part
            elif part.startswith(("tests", "benchmarks")):
                assert (ROOT / part).exists(), part


def test_a_gpu_session_measures_every_family(tmp_path):
    names = {piece.name for piece in pieces(tmp_path)}
    assert set(BENCHES) <= names


def test_a_gpu_session_goes_on_with_the_tests_and_cases_that_are_left(tmp_path):
    for piece in pieces(tmp_path):
        assert ("pytest" in piece.command) == (f"--unfinished={tmp_path / piece.name}.tests" in piece.command)


def test_a_gpu_session_tunes_the_rivals_of_both_networks_with_targets(tmp_path):
    (piece,) = [piece for piece in pieces(tmp_path) if "--max-autotune" in piece.command]
    asked = {part.removeprefix("--network=") for part in piece.command if part.startswith("--network=")}
    assert asked == {"DiT-XL/2", "EDM"}
    assert asked <= {w.network for w in importlib.import_module("benchmarks.bench_blocks").WORKLOADS}


def test_a_network_must_be_known():
    command = [sys.executable, "-m", "pytest", "-q", "benchmarks/bench_skipping.py", "--collect-only", "--network=pixels", "--network=SDXL"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "--network must be one of 'SD', 'SD x 16', 'pixels', 'decisions'; got 'SDXL'" in done.stderr


def test_only_the_networks_asked_for_are_measured():
    command = [sys.executable, "-m", "pytest", "-q", "benchmarks/bench_skipping.py", "--collect-only", "--network=pixels", "-k", "reused"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == pytest.ExitCode.OK, done.stderr
    assert re.findall(r"test_speed\[(.*)\]", done.stdout) == ["solver_step-reused-pixels-4x3x256x256,-10-steps-float32-forward"]


@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m", "euler, every second step"])
def test_plain_trajectories_read_nothing_of_the_device(name):
    """On "meta", where there is nothing to be read."""
    assert synchronisations.draw(TRAJECTORIES[name], "meta")().shape == (4, 3, 16, 16)
    assert TRAJECTORIES[name].events == 0


def test_the_calls_of_a_profile_are_counted():
    x = torch.ones(3)
    assert synchronisations.calls(lambda: [x.sum().item() for _ in range(5)], ("aten::item",)) == {"aten::item": 5}
    assert synchronisations.calls(synchronisations.draw(TRAJECTORIES["euler, official"], "cpu")) == {}, "a CPU waits for no device"


def test_an_adaptive_trajectory_may_wait_for_each_decision_alone():
    official = TRAJECTORIES["euler, official"]
    reads = synchronisations.STEPS - official.skip.first_decision
    assert synchronisations.excess({"cudaEventSynchronize": reads}, official) == {}
    assert synchronisations.excess({"cudaEventSynchronize": reads + 1}, official) == {"cudaEventSynchronize": reads + 1}
    assert synchronisations.excess({"cudaStreamSynchronize": 1}, official) == {"cudaStreamSynchronize": 1}
    assert synchronisations.excess({"cudaEventSynchronize": 1}, TRAJECTORIES["euler"]) == {"cudaEventSynchronize": 1}


@pytest.mark.parametrize("name", BENCHES)
def test_workloads_are_well_formed(name):
    """Each one's inputs can be drawn, and what is differentiated is a floating tensor."""
    workloads = importlib.import_module(f"benchmarks.{name}").WORKLOADS
    assert workloads
    assert len({(w.op, w.network, w.shape) for w in workloads}) == len(workloads), "two workloads of one name"
    for w in workloads:
        inputs = w.inputs()
        assert all(inputs[i].is_floating_point() for i in w.gradients)
