"""What property tests draw where kernels run in the interpreter: few small inputs, the same in every run."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

few_examples = settings(max_examples=15, deadline=None, derandomize=True)
# Of samples and whatever they are made of; of no samples, too.
shapes = st.builds(lambda batch, sizes: (batch, *sizes), st.integers(0, 3), st.lists(st.integers(1, 9), max_size=3))


def laid_out(x: Tensor, permuted: bool) -> Tensor:
    """x, its elements in memory in the opposite order of dimensions if permuted; samples stay outermost."""
    order = (0, *reversed(range(1, x.dim())))
    return x.permute(order).contiguous().permute(order) if permuted else x
