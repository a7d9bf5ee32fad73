"""Every example of the README runs as it stands, one after another, as a reader would try them."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from fastdiff_kernels.nn import DiTBlock

README = Path(__file__).parent.parent / "README.md"


def test_the_examples_run():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) == 7
    names: dict = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    assert names["one_step_samples"].shape == names["four_step_samples"].shape == (4, 3, 16, 16)
    assert names["result"].nfe == 15
    assert torch.isfinite(names["loss"])


def test_the_block_of_the_readme_is_a_dit_block():
    names: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    exec("from fastdiff_kernels import ops\n" + next(b for b in blocks if "def dit_block" in b), names)
    block = DiTBlock(16, 2, 8)
    torch.nn.init.normal_(block.modulation.weight)
    x, condition = torch.randn(2, 5, 16), torch.randn(2, 8)
    modulation = lambda c: block.modulation(torch.nn.functional.silu(c))  # noqa: E731
    ours = names["dit_block"](x, condition, modulation, lambda h: block._attend(h, None), block.mlp)
    torch.testing.assert_close(ours, block(x, condition))
