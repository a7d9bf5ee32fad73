"""A pytest plugin for runs that are cut off: `pytest -p benchmarks.unfinished --unfinished=FILE`, again until it ends.

What has passed or been skipped is not run again; what was running when a run was cut off comes last, so that it cannot keep the others from
being run. What failed is run again, so that the last run's status is that of all.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest


def pytest_addoption(parser):
    parser.getgroup("fastdiff").addoption("--unfinished", type=Path, metavar="FILE", help="where each test's beginning and end is noted")


def pytest_configure(config):
    if config.getoption("--unfinished") is not None:
        config.pluginmanager.register(Unfinished(config.getoption("--unfinished")))


class Unfinished:
    """Notes "begun", and "passed" or "failed", for each test in a file of one line each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        notes = [line.split(" ", 1) for line in path.read_text().splitlines()] if path.exists() else []
        self.passed = {name for outcome, name in notes if outcome == "passed"}
        # Begun more often than ended.
        self.cut_off = Counter(name for outcome, name in notes if outcome == "begun") - Counter(
            name for outcome, name in notes if outcome != "begun"
        )
        self.failed = False

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config, items):
        done = [item for item in items if item.nodeid in self.passed]
        left = [item for item in items if item.nodeid not in self.passed]
        items[:] = sorted(left, key=lambda item: self.cut_off[item.nodeid])
        config.hook.pytest_deselected(items=done)

    def pytest_runtest_logstart(self, nodeid):
        self.failed = False
        self._note("begun", nodeid)

    def pytest_runtest_logreport(self, report):
        self.failed |= report.failed

    def pytest_runtest_logfinish(self, nodeid):
        self._note("failed" if self.failed else "passed", nodeid)

    def pytest_sessionfinish(self, session, exitstatus):
        if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and self.passed:
            session.exitstatus = pytest.ExitCode.OK

    def _note(self, outcome: str, nodeid: str) -> None:
        with self.path.open("a") as file:
            file.write(f"{outcome} {nodeid}\n")
