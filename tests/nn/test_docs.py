"""docs/blocks.md says what is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from fastdiff_kernels import nn

TEXT = (Path(__file__).parents[2] / "docs" / "blocks.md").read_text()
SIZES = TEXT.split("Sizes of published networks:")[1].split("\n\n")[1]


@pytest.mark.parametrize("call", re.findall(r"`(\w+Block\(.*?\))`", SIZES))
def test_published_sizes_build(call):
    with torch.device("meta"):
        block = eval(call, {**vars(nn), "C": 576})
    assert sum(p.numel() for p in block.parameters()) > 1e5


@pytest.mark.parametrize("name", ["DiTBlock", "PixArtBlock", "MMDiTBlock", "UNetAttentionBlock", "EDM2AttentionBlock"])
def test_every_parameter_has_its_name_elsewhere(name):
    (table,) = re.findall(rf"\| `{name}` \|.*?\n\n", TEXT, flags=re.DOTALL)
    layout = getattr(nn, name).__doc__.split("State dict:")[1].split("Raises:")[0]
    for stem in set(re.findall(r"(\w+(?:\.\d)?)\.weight", layout)):
        assert stem in table, f"{stem} is not in the table of {name}"
