"""Tests marked `executes` run kernels: on a GPU where there is one, otherwise in a second process that has Triton's interpreter on.

The interpreter has to be chosen before a kernel is decorated, and an address out of bounds ends its process. The other tests compile.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from . import running

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def pytest_configure(config):
    config.addinivalue_line("markers", "executes: runs Triton kernels, on a GPU or in the interpreter")
    running.update_budgets = config.getoption("--update-budgets")


def pytest_collection_modifyitems(config, items):
    interpreting = os.environ.get("TRITON_INTERPRET") == "1"
    can_execute = interpreting or torch.cuda.is_available()
    elsewhere = [item for item in items if HERE in item.path.parents and _runs_elsewhere(item, interpreting, can_execute)]
    if elsewhere:
        config.hook.pytest_deselected(items=elsewhere)
        items[:] = [item for item in items if item not in elsewhere]


def _runs_elsewhere(item: pytest.Item, interpreting: bool, can_execute: bool) -> bool:
    return not can_execute if item.get_closest_marker("executes") else interpreting
