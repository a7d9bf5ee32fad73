"""diffusers is an optional host: without it its tests are left out, which test_imports.py reports."""

from __future__ import annotations

import importlib.util
import logging

import pytest

from fastdiff_kernels.integrations._policy import everywhere

if importlib.util.find_spec("diffusers") is None:
    collect_ignore_glob = ["test_diffusers_*.py", "test_examples.py"]


@pytest.fixture(autouse=True)
def quiet_host():
    """diffusers warns about every cast with `.to(dtype)`, also where no module is kept in float32."""
    logging.getLogger("diffusers").setLevel(logging.ERROR)


@pytest.fixture(autouse=True)
def ops_at_every_size():
    """Modules of tests are too small for ops to pay."""
    with everywhere():
        yield
