"""What the check for spills takes for the same machine code."""

import importlib.util
import itertools

import pytest

from tests.check_spills import code

KERNELS = """
import triton
import triton.language as tl

FACTOR = tl.constexpr({factor})


@triton.jit
def _part(x):
    return {part}


@triton.jit
def kernel(x):
    tl.store(x, _part(tl.load(x)) * FACTOR)
"""


@pytest.fixture
def written(tmp_path):
    """A kernel from the text of a file."""
    names = (f"kernels_{i}" for i in itertools.count())

    def load(text):
        name = next(names)
        path = tmp_path / f"{name}.py"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.kernel

    return load


def test_a_kernel_keeps_its_results_where_lines_above_it_move(written):
    text = KERNELS.format(factor=2, part="x")
    above, below = written(text), written("\n# A remark.\n" + text)
    assert above.cache_key != below.cache_key
    assert code(above) == code(below)


@pytest.mark.parametrize("change", [{"part": "x + 1"}, {"factor": 3}], ids=["what it calls", "a constant"])
def test_a_kernel_loses_its_results_with(written, change):
    same = {"factor": 2, "part": "x"}
    assert code(written(KERNELS.format(**same))) != code(written(KERNELS.format(**{**same, **change})))
