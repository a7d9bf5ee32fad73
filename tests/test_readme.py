"""Every example of the README runs as it stands, one after another, as a reader would try them; those of the pages name what is there."""

from __future__ import annotations

import ast
import re
from importlib import import_module
from pathlib import Path

import pytest
import torch

from fastdiff_kernels.nn import DiTBlock

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


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


def modules_of_examples(page: Path) -> list[ast.Module]:
    return [ast.parse(block, str(page)) for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_are_python_and_import_what_is_there(page: Path):
    for module in modules_of_examples(page):
        for node in ast.walk(module):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("fastdiff_kernels"):
                source = import_module(node.module)
                assert [alias.name for alias in node.names if not hasattr(source, alias.name)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path):
    links = [link for link in re.findall(r"\]\(([^)#\s]+)\)", page.read_text()) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_pages_have_examples_and_links_to_check():
    assert sum(len(modules_of_examples(page)) for page in PAGES) >= 10
