"""Hosts are imported by those who ask for them."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import sys
import fastdiff_kernels.nn, fastdiff_kernels.diffusion
from fastdiff_kernels.integrations import comfyui, dit, edm, k_diffusion
assert not {"diffusers", "timm", "k_diffusion", "transformers"} & set(sys.modules)
"""


def test_the_package_imports_no_host() -> None:
    subprocess.run([sys.executable, "-c", CODE], check=True)


def test_diffusers_is_there_to_be_tested_with() -> None:
    diffusers = pytest.importorskip("diffusers", reason="no diffusers: test_diffusers_*.py and test_examples.py were left out")
    assert hasattr(diffusers, "DiTTransformer2DModel")
