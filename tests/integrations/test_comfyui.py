"""The attention override: both layouts, chained in front of another, and out of the way where it does not apply."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fastdiff_kernels.integrations import comfyui


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    mask: Tensor | None = None,
    attn_precision: torch.dtype | None = None,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    **kwargs: object,
) -> Tensor:
    """Attention with the arguments of ComfyUI's functions."""
    if not skip_reshape:
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


def inputs(skip_reshape: bool) -> list[Tensor]:
    shapes = [(2, 3, 4, 8), (2, 3, 6, 8), (2, 3, 6, 8)]
    heads_first = [torch.randn(shape) for shape in shapes]
    return heads_first if skip_reshape else [x.transpose(1, 2).flatten(2) for x in heads_first]


def never(*args: object, **kwargs: object) -> Tensor:
    raise AssertionError("called")


@pytest.mark.parametrize("skip_reshape", [False, True])
@pytest.mark.parametrize("skip_output_reshape", [False, True])
def test_both_layouts_come_and_go(skip_reshape: bool, skip_output_reshape: bool) -> None:
    options = {"skip_reshape": skip_reshape, "skip_output_reshape": skip_output_reshape}
    args = inputs(skip_reshape)
    override = comfyui.attention_override()
    found = override(never, *args, 3, **options, attn_precision=torch.float32, transformer_options={})
    torch.testing.assert_close(found, attention(*args, 3, **options))


@pytest.mark.parametrize("why", ["mask", "wide", "grouped", "unknown"])
def test_calls_it_has_no_kernel_for_go_to_the_function(why: str) -> None:
    args, heads, options = inputs(False), 3, {}
    if why == "mask":
        options = {"mask": torch.zeros(4, 6)}
    elif why == "wide":
        args, heads = [torch.randn(1, 4, 300)] * 3, 1
    elif why == "grouped":
        args, options = [torch.randn(2, 4, 5, 8), *[torch.randn(2, 2, 5, 8)] * 2], {"skip_reshape": True}
        heads = 4
    else:
        options = {"low_precision_attention": False}
    calls = []
    override = comfyui.attention_override()
    found = override(lambda *a, **kw: calls.append(1) or attention(*a, **kw), *args, heads, **options)
    assert calls == [1]
    torch.testing.assert_close(found, attention(*args, heads, **options))


def test_an_override_that_was_there_gets_what_is_left() -> None:
    seen = []

    def other(func, *args, **kwargs):
        seen.append(kwargs["mask"] is not None)
        return func(*args, **kwargs)

    options = {comfyui.KEY: other}
    installed = comfyui.install(options)
    assert options[comfyui.KEY] is installed
    args = inputs(False)
    installed(never, *args, 3)
    assert seen == []
    mask = torch.zeros(4, 6)
    torch.testing.assert_close(installed(attention, *args, 3, mask=mask), attention(*args, 3, mask=mask))
    assert seen == [True]
