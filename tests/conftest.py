"""What holds for every test: poisoned allocations, one thread, and skips that are listed with their reasons at the end."""

from __future__ import annotations

import sys

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def poisoned_allocations():
    """Fills what torch.empty returns with NaN (integers: their maximum), so that an element nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeded():
    """The same random numbers in every run."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Functions that differ only in what they close over share their code, and with it the compiler's limit of recompilations."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


def pytest_addoption(parser):
    parser.addoption("--update-budgets", action="store_true", help="write what kernels take to tests/budgets/ instead of comparing")


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))  # it launches kernels on one; -ra lists it at the end
