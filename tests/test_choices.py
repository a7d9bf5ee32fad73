from __future__ import annotations

import pytest

from fastdiff_kernels import _choices
from fastdiff_kernels._registry import OPS

TABLE = _choices.table()


@pytest.mark.parametrize("choice", TABLE, ids=str)
def test_every_row_names_what_exists(choice: _choices.Choice):
    rotated = choice.op in ("qk_norm_rope interleaved", "qk_norm_rope half") and choice.mode != "eager"
    op = OPS["qk_norm_rope" if rotated else choice.op]
    assert choice.backend in ((*op.kernels, "reference") if choice.mode == "eager" else ("fastdiff", "inductor"))
    assert choice.mode in _choices.MODES
    assert choice.evidence
    assert op.size is not None, f"{choice.op} has no size to choose by"


@pytest.mark.parametrize("choice", TABLE, ids=str)
def test_a_row_is_found_by_the_first_size_it_holds_for(choice: _choices.Choice):
    rows, width = (int(low) for low in (choice.rows[0], choice.width[0]))
    assert _choices.choose(choice.op, (choice.device,), choice.mode, rows, width) == choice


def test_no_row_for_this_device():
    assert _choices.choose("attention", ("abacus",), "eager", 4096, 64) is None
