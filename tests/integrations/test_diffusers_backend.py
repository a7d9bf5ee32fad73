"""The dispatcher's backend "fastdiff": used where it was chosen, nowhere else, and gone when it was taken away."""

from __future__ import annotations

import copy
from itertools import permutations

import pytest
import torch
from diffusers.models import attention_dispatch as host

from fastdiff_kernels.integrations import diffusers as integration
from fastdiff_kernels.integrations.diffusers import _processors as processors
from fastdiff_kernels.integrations.diffusers._backend import attention_backend
from tests.helpers import assert_bitwise, assert_within_eager
from tests.integrations.models import BY_NAME, randn

dispatched = pytest.mark.parametrize("name", ["FluxTransformer2DModel", "WanTransformer3DModel"])


@pytest.fixture(autouse=True)
def as_before():
    """Every test begins and ends without the backend."""
    before = list(host.AttentionBackendName)
    yield
    integration.unregister_attention_backend()
    assert list(host.AttentionBackendName) == before


@pytest.fixture
def attended(monkeypatch) -> list[int]:
    """Grows with every call of this package's attention."""
    calls, attention = [], processors.ops.attention
    monkeypatch.setattr(processors.ops, "attention", lambda *args, **kwargs: calls.append(1) or attention(*args, **kwargs))
    return calls


@dispatched
def test_only_the_model_that_chose_it_uses_it(name: str, attended: list[int]) -> None:
    case = BY_NAME[name]
    model, other = case.model(), case.model()
    truth, before = case.call(copy.deepcopy(model).double(), torch.float64), case.call(model)
    active = host._AttentionBackendRegistry.get_active_backend()
    count = integration.set_attention_backend(model)
    assert count == sum(hasattr(m, "processor") for m in model.modules())
    assert host._AttentionBackendRegistry.get_active_backend() == active
    assert_within_eager(case.call(model), before, truth)
    assert len(attended) == count
    assert_bitwise(case.call(other), before)
    assert len(attended) == count
    integration.reset_attention_backend(model)
    assert_bitwise(case.call(model), before)
    assert all(m.processor._attention_backend is None for m in model.modules() if hasattr(m, "processor"))


def test_unregistering_takes_it_from_every_processor() -> None:
    case = BY_NAME["FluxTransformer2DModel"]
    model = case.model()
    for attn in (m for m in model.modules() if hasattr(m, "processor")):
        attn.set_attention_backend("_native_math")
    integration.set_attention_backend(model)
    integration.register_attention_backend()
    assert "fastdiff" in {name.value for name in host.AttentionBackendName}
    integration.unregister_attention_backend()
    integration.unregister_attention_backend()
    assert "fastdiff" not in {name.value for name in host.AttentionBackendName}
    assert {m.processor._attention_backend.value for m in model.modules() if hasattr(m, "processor")} == {"_native_math"}
    assert torch.isfinite(case.call(model)).all()


@pytest.mark.parametrize("had", [None, "_native_math"])
@pytest.mark.parametrize("order", list(permutations(("set", "patch", "reset", "unpatch"))), ids="-".join)
def test_any_order_with_a_patch_ends_where_it_began(order: tuple[str, ...], had: str | None) -> None:
    case = BY_NAME["FluxTransformer2DModel"]
    model = case.model()
    attentions = [m for m in model.modules() if hasattr(m, "processor")]
    if had is not None:
        model.set_attention_backend(had)
    processors = [attn.processor for attn in attentions]
    before = case.call(model)
    steps = {
        "set": integration.set_attention_backend,
        "patch": integration.patch,
        "reset": integration.reset_attention_backend,
        "unpatch": integration.unpatch,
    }
    for step in order:
        steps[step](model)
        torch.testing.assert_close(case.call(model), before)
    integration.unregister_attention_backend()
    torch.testing.assert_close(case.call(model), before)
    integration.unpatch(model)
    assert all(attn.processor is processor for attn, processor in zip(attentions, processors, strict=True))
    assert [processor._attention_backend for processor in processors] == [None if had is None else host.AttentionBackendName(had)] * 3
    assert_bitwise(case.call(model), before)


@pytest.mark.parametrize("patched", [False, True], ids=["plain", "patched"])
def test_what_was_chosen_since_is_kept(patched: bool) -> None:
    model = BY_NAME["FluxTransformer2DModel"].model()
    if patched:
        integration.patch(model)
    integration.set_attention_backend(model)
    model.set_attention_backend("_native_math")
    integration.reset_attention_backend(model)
    integration.unpatch(model)
    assert {m.processor._attention_backend.value for m in model.modules() if hasattr(m, "processor")} == {"_native_math"}


def test_copies_know_what_they_had() -> None:
    case = BY_NAME["FluxTransformer2DModel"]
    model = case.model()
    model.set_attention_backend("_native_math")
    integration.set_attention_backend(model)
    twin = copy.deepcopy(model)
    integration.unregister_attention_backend()
    integration.reset_attention_backend(twin)
    assert {m.processor._attention_backend.value for m in twin.modules() if hasattr(m, "processor")} == {"_native_math"}
    assert_bitwise(case.call(twin), case.call(model))


@pytest.mark.filterwarnings("error")
def test_a_patched_model_has_its_attention_already(attended: list[int], monkeypatch) -> None:
    case = BY_NAME["FluxTransformer2DModel"]
    model = case.model()
    rotated, rotate = [], processors.ops.qk_norm_rope
    monkeypatch.setattr(processors.ops, "qk_norm_rope", lambda *args, **kwargs: rotated.append(1) or rotate(*args, **kwargs))
    monkeypatch.setattr(processors, "_said", set())
    integration.patch(model)
    integration.set_attention_backend(model)
    before = case.call(model)
    assert (len(attended), len(rotated)) == (3, 4)  # one for each stream
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(case.call(compiled), before)


def test_a_release_with_another_dispatcher_is_refused(monkeypatch) -> None:
    model = BY_NAME["FluxTransformer2DModel"].model()
    for attribute, message in (("_constraints", "has no dict _constraints"), (None, "has no attention_dispatch")):
        with monkeypatch.context() as patched:
            if attribute is None:
                patched.setattr("fastdiff_kernels.integrations.diffusers._backend.host", None)
            else:
                patched.delattr(host._AttentionBackendRegistry, attribute)
            with pytest.raises(RuntimeError, match=message):
                integration.set_attention_backend(model)
            integration.unregister_attention_backend()
            integration.reset_attention_backend(model)


def test_the_hosts_own_ways_to_choose_it_work_while_it_is_registered(attended: list[int]) -> None:
    integration.register_attention_backend()
    case = BY_NAME["FluxTransformer2DModel"]
    model = case.model()
    with host.attention_backend("fastdiff"):
        case.call(model)
    assert len(attended) == 3
    model.set_attention_backend("fastdiff")
    case.call(model)
    assert len(attended) == 6


def test_models_that_do_not_dispatch_are_told_to_be_patched() -> None:
    with pytest.raises(ValueError, match=r"no attention processor of DiTTransformer2DModel goes through .* use patch\(model\)"):
        integration.set_attention_backend(BY_NAME["DiTTransformer2DModel"].model())


def test_it_compiles_into_one_graph() -> None:
    case = BY_NAME["FluxTransformer2DModel"]
    model = case.model()
    before = case.call(model)
    integration.set_attention_backend(model)
    torch.testing.assert_close(case.call(torch.compile(model, fullgraph=True, backend="eager")), before)


def test_padding_masks_are_lengths_and_scales_are_used() -> None:
    query, key, value = randn(2, 3, 2, 4), randn(2, 5, 2, 4, seed=2), randn(2, 5, 2, 4, seed=3)
    mask = torch.arange(5) < torch.tensor([[5], [2]])
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (query, key, value)), attn_mask=mask[:, None, None], scale=0.3
    )
    torch.testing.assert_close(attention_backend(query, key, value, mask[:, None], scale=0.3), expected.transpose(1, 2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"is_causal": True}, "has no is_causal"),
        ({"dropout_p": 0.1}, "has no dropout_p"),
        ({"return_lse": True}, "has no return_lse"),
        ({"_parallel_config": object()}, "has no _parallel_config"),
        ({"attn_mask": torch.zeros(2, 2, 3, 3)}, "padding behind the keys and no others"),
    ],
)
def test_what_it_cannot_do_is_refused_and_not_dropped(arguments: dict, message: str) -> None:
    x = randn(2, 3, 2, 4)
    with pytest.raises(ValueError, match=message):
        attention_backend(x, x, x, **arguments)
