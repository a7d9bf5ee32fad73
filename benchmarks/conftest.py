"""`pytest benchmarks`: one table at the end; `--save-rows` appends it to benchmarks/results/."""

from __future__ import annotations

import pytest
import torch

from .harness import RESULTS, Session, device_name

_SESSION = pytest.StashKey[Session]()


def pytest_addoption(parser):
    group = parser.getgroup("fastdiff")
    group.addoption("--save-rows", action="store_true", help="append the rows to benchmarks/results/")
    group.addoption("--quick", action="store_true", help="half a second a case instead of two")


def pytest_configure(config):
    config.stash[_SESSION] = Session()


@pytest.fixture
def compare(request, benchmark):
    """Session.compare with the seconds asked for; the last variant is also run under pytest-benchmark, with the speed-ups beside it."""
    session, seconds = request.config.stash[_SESSION], 0.5 if request.config.getoption("--quick") else 2.0

    def run(case, mode, variants, truth, **options):
        benchmark.group = f"{case} {mode}"
        speedups = session.compare(case, mode, variants, truth, seconds=seconds, **options)
        benchmark.extra_info.update({f"speedup_over_eager/{name}": round(value, 3) for name, value in speedups.items()})
        benchmark.pedantic(list(variants.values())[-1], rounds=3, iterations=1, warmup_rounds=1)
        return speedups

    return run


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def pytest_terminal_summary(terminalreporter, config):
    session = config.stash[_SESSION]
    if session.rows:
        terminalreporter.section(f"side by side on {device_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
        terminalreporter.write_line("\n".join(session.table()))
        if config.getoption("--save-rows"):
            path = RESULTS / "rows.csv"
            session.save(path)
            terminalreporter.write_line(f"appended to {path}")
