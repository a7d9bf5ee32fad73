"""`pytest benchmarks`: the workloads of every bench_*.py in every dtype and mode, one table at the end, appended to results/ on request."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastdiff_kernels._registry import OPS

from .harness import RESULTS, Session, measured
from .provenance import device_name
from .rivals import absent
from .workloads import Case, cases, quick

_SESSION = pytest.StashKey[Session]()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
USUAL = {"cpu": ("float32",), "cuda": ("bfloat16",)}


def pytest_addoption(parser):
    group = parser.getgroup("fastdiff")
    usual = RESULTS / "rows.csv"
    group.addoption(
        "--save-rows", nargs="?", const=str(usual), metavar="FILE", help="append the rows to this file (benchmarks/results/rows.csv)"
    )
    group.addoption("--resume", action="store_true", help="with --save-rows: leave out the cases that the file has rows for")
    group.addoption("--seconds", type=float, metavar="S", help="for a case, all its providers together; 2 by default")
    group.addoption("--quick", action="store_true", help="a quarter of a second for a case, and one network of those of a like size")
    group.addoption("--network", action="append", default=[], help="only workloads of this network, for instance DiT-XL/2")
    group.addoption("--dtype", action="append", default=[], choices=DTYPES, help=f"default: {USUAL[DEVICE][0]} on this machine")
    group.addoption("--max-autotune", action="store_true", help="torch.compile(mode='max-autotune') as one more provider")


def pytest_configure(config):
    seconds = config.getoption("--seconds")
    if seconds is None:
        seconds = 0.25 if config.getoption("--quick") else 2.0
    if not 0 < seconds < float("inf"):
        raise pytest.UsageError(f"--seconds must be a finite number above 0; got {seconds}")
    config.stash[_SESSION] = Session(DEVICE, seconds)


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        networks, dtypes = (metafunc.config.getoption(name) for name in ("--network", "--dtype"))
        chosen = [w for w in metafunc.module.WORKLOADS if not networks or w.network in networks]
        if metafunc.config.getoption("--quick") and not networks:
            chosen = [w for w in chosen if quick(w)]
        found = cases(chosen, [DTYPES[name] for name in dtypes or USUAL[DEVICE]])
        if metafunc.config.getoption("--resume"):
            done = _measured(metafunc.config)
            found = [case for case in found if str(case) not in done]
        metafunc.parametrize("case", found, ids=[str(c).replace(" ", "-") for c in found])


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    known = dict.fromkeys(w.network for module in dict.fromkeys(item.module for item in items) for w in module.WORKLOADS)
    if unknown := [name for name in config.getoption("--network") if name not in known]:
        raise pytest.UsageError(f"--network must be one of {', '.join(map(repr, known))}; got {', '.join(map(repr, unknown))}")


def _measured(config) -> set[str]:
    path = config.getoption("--save-rows")
    if path is None:
        raise pytest.UsageError("--resume needs --save-rows, the file whose cases are left out")
    return measured(Path(path), DEVICE)


@pytest.fixture
def measure(request, benchmark):
    """Session.measure of every provider; ours is also run under pytest-benchmark, with the speed-ups beside it."""
    config = request.config
    session: Session = config.stash[_SESSION]

    def run(case: Case) -> dict[str, float]:
        w = case.workload
        benchmark.group = f"{w.op} {case.mode}"
        compiled = _compiled(w, config.getoption("--max-autotune"))
        rivals = {**w.rivals, **(w.forward_rivals if case.mode == "forward" else {})}
        result = session.measure(case, {"eager": w.eager, **compiled, **rivals, "ours": w.ours}, _backends(w) if DEVICE == "cuda" else ())
        if path := config.getoption("--save-rows"):
            # A run that is cut off keeps what it has measured.
            session.save(Path(path))
        benchmark.extra_info.update({f"speedup_over_eager/{name}": round(value, 3) for name, value in result.speedups.items()})
        benchmark.pedantic(_synchronised(result.runs["ours"]), rounds=1 if config.getoption("--quick") else 3, iterations=1)
        return result.speedups

    return run


def _backends(w) -> tuple[str, ...]:
    """Those that "ours" is run on one by one: of a workload that is one op with kernels on several."""
    kernels = [name for name in OPS[w.op].kernels if name != "cpu"] if w.op in OPS else []
    return tuple(kernels) if len(kernels) > 1 else ()


def _compiled(w, max_autotune: bool) -> dict:
    if not w.compiled:
        return {}
    found = {"compile": torch.compile(w.eager, dynamic=False)}
    if max_autotune:
        # Without its own graphs: the harness captures every provider's call as one, and a capture cannot hold another.
        found["compile-max"] = torch.compile(w.eager, dynamic=False, mode="max-autotune-no-cudagraphs")
    return found


def _synchronised(run):
    def call():
        results = run()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return results

    return call


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def fresh_compiler():
    yield
    torch._dynamo.reset()


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, config):
    session = config.stash[_SESSION]
    if not session.rows:
        return
    terminalreporter.section(f"side by side on {device_name(DEVICE)}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    terminalreporter.write_line("\n".join(session.table()))
    for wrong in session.left_out:
        terminalreporter.write_line(f"left out: {wrong}")
    for name, reason in absent().items():
        terminalreporter.write_line(f"absent: {name} ({reason})")
    if DEVICE == "cpu":
        terminalreporter.write_line("not measured: anything on a GPU")
    if path := config.getoption("--save-rows"):
        terminalreporter.write_line(f"appended to {path}")
