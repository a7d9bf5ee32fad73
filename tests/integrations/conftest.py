"""diffusers is an optional host: without it nothing here can run."""

from __future__ import annotations

import logging

import pytest

pytest.importorskip("diffusers")


@pytest.fixture(autouse=True)
def quiet_host():
    """diffusers warns about every cast with `.to(dtype)`, also where no module is kept in float32."""
    logging.getLogger("diffusers").setLevel(logging.ERROR)
