"""The attention override within ComfyUI's protocol: it fires, in every layout, and is out of the way where it does not apply."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fastdiff_kernels.integrations import comfyui
from tests.integrations.counting import attends


def dispatched(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """What ComfyUI makes of each of its attention functions: the override is asked once, and a mark keeps it from being asked again."""

    @functools.wraps(function)
    def asks(*args: object, preferred_attention: object = None, **kwargs: object) -> Tensor:
        if kwargs.get("_inside_attn_wrapper"):
            return function(*args, **kwargs)
        override = (kwargs.get("transformer_options") or {}).get("optimized_attention_override")
        kwargs["_inside_attn_wrapper"] = True
        return function(*args, **kwargs) if override is None else override(function, *args, **kwargs)

    return asks


@dispatched
def attention_plain(
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
    """One of ComfyUI's functions: these arguments, and any others."""
    if not skip_reshape:
        width = q.shape[-1] // heads
        q, k, v = (x.unflatten(-1, (-1, width)).transpose(1, 2) for x in (q, k, v))
    known = {name: kwargs[name] for name in ("scale", "enable_gqa") if name in kwargs}
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, **known)
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


@dispatched
def attention_handing_on(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, **kwargs: object) -> Tensor:
    """Another of them, which calls the plain one for what it cannot do."""
    return attention_plain(q, k, v, heads, mask=mask, **kwargs)


def options() -> dict[str, object]:
    installed: dict[str, object] = {"block_index": 0}
    comfyui.install(installed)
    return installed


def inputs(skip_reshape: bool, heads: int = 4, shared: int = 4, width: int = 8) -> list[Tensor]:
    heads_first = [torch.randn(2, h, n, width) for h, n in ((heads, 5), (shared, 7), (shared, 7))]
    return heads_first if skip_reshape else [x.transpose(1, 2).flatten(2) for x in heads_first]


layouts = pytest.mark.parametrize(
    "layout",
    [{}, {"skip_reshape": True}, {"skip_output_reshape": True}, {"skip_reshape": True, "skip_output_reshape": True}],
    ids=lambda layout: "+".join(layout) or "plain",
)


@layouts
@pytest.mark.parametrize("function", [attention_plain, attention_handing_on])
@pytest.mark.parametrize(
    "more",
    [{}, {"scale": 0.2}, {"low_precision_attention": False}, {"attn_precision": torch.float32}, {"preferred_attention": object()}],
    ids=lambda more: "".join(more) or "nothing more",
)
def test_it_fires_in_every_layout_and_with_every_argument(layout: dict, function: Callable, more: dict) -> None:
    args = inputs("skip_reshape" in layout)
    expected = function(*args, 4, **layout, **more)
    with attends(1):
        found = function(*args, 4, **layout, **more, transformer_options=options())
    torch.testing.assert_close(found, expected)


@layouts
@pytest.mark.parametrize("shared", [2, 1])
def test_heads_share_keys_in_either_layout(layout: dict, shared: int) -> None:
    args = inputs("skip_reshape" in layout, shared=shared)
    expected = attention_plain(*args, 4, **layout, enable_gqa=True)
    with attends(1):
        found = attention_plain(*args, 4, **layout, enable_gqa=True, transformer_options=options())
    torch.testing.assert_close(found, expected)


@layouts
@pytest.mark.parametrize("shared", [4, 2])
def test_masks_are_left_to_the_function(layout: dict, shared: int) -> None:
    args, mask = inputs("skip_reshape" in layout, shared=shared), torch.randn(5, 7)
    expected = attention_plain(*args, 4, mask, **layout, enable_gqa=True)
    with attends(0):
        found = attention_handing_on(*args, 4, mask, **layout, enable_gqa=True, transformer_options=options())
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("why", ["wide", "ungrouped", "unequal", "unknown", "low precision"])
def test_calls_it_has_no_kernel_for_go_to_the_function_as_they_came(why: str) -> None:
    args, more = inputs(True), {}
    if why == "wide":
        args = inputs(True, width=300)
    elif why == "ungrouped":
        args = inputs(True, shared=2)
    elif why == "unequal":
        args[2] = args[2][..., :4]
    elif why == "unknown":
        more = {"is_causal": True}
    else:
        args = [x.to(torch.float8_e4m3fn) for x in args]
    seen = []

    @dispatched
    def function(*args: object, **kwargs: object) -> str:
        seen.append((args, kwargs))
        return "its own"

    carried = options()
    with attends(0):
        assert function(*args, 4, None, skip_reshape=True, **more, transformer_options=carried) == "its own"
    ((came, kwargs),) = seen
    assert all(a is b for a, b in zip(came, [*args, 4], strict=True))
    defaults = {"mask": None, "attn_precision": None, "skip_output_reshape": False}
    assert kwargs == defaults | {"skip_reshape": True, "_inside_attn_wrapper": True, "transformer_options": carried} | more


@pytest.mark.parametrize("shared", [2, 3])
def test_packed_keys_that_do_not_divide_into_heads_are_the_functions(shared: int) -> None:
    args = inputs(False, shared=shared)
    with attends(0), pytest.raises(RuntimeError):
        attention_plain(*args, 4, transformer_options=options())


def test_an_override_that_was_there_gets_what_is_left() -> None:
    seen = []

    def other(func: Callable, *args: object, **kwargs: object) -> Tensor:
        seen.append(kwargs["_inside_attn_wrapper"])
        return func(*args, **kwargs)

    carried = {comfyui.KEY: other}
    installed = comfyui.install(carried)
    assert carried[comfyui.KEY] is installed
    args, mask = inputs(False), torch.zeros(5, 7)
    with attends(1):
        attention_plain(*args, 4, transformer_options=carried)
    assert seen == []
    with attends(0):
        found = attention_plain(*args, 4, mask=mask, transformer_options=carried)
    torch.testing.assert_close(found, attention_plain(*args, 4, mask=mask))
    assert seen == [True]
