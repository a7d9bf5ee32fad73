"""Hooks of every kind of PyTorch's see in a patched model what they see in the host's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as of_all
from torch.utils._pytree import tree_leaves

from fastdiff_kernels.integrations.diffusers import patch
from fastdiff_kernels.integrations.diffusers._deferred import Deferred
from tests.integrations.models import BY_NAME, Case

CASES = [
    BY_NAME[name]
    for name in (
        "UNet2DModel",
        "UNet2DConditionModel-SD",
        "DiTTransformer2DModel",
        "PixArtTransformer2DModel",
        "SD3Transformer2DModel-3.5",
        "FluxTransformer2DModel",
        "WanTransformer3DModel",
    )
]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)

Seen = list[tuple[nn.Module, list[Tensor]]]


def seeing(seen: Seen) -> Callable[..., None]:
    """A hook that notes which module called it with which tensors."""

    def hook(module: nn.Module, *values: Any) -> None:
        leaves = tree_leaves(values)
        assert not any(isinstance(leaf, Deferred) for leaf in leaves)
        seen.append((module, [leaf.detach().clone() for leaf in leaves if isinstance(leaf, Tensor)]))

    return hook


OF_ONE = {
    "forward pre": lambda module, hook: module.register_forward_pre_hook(hook, with_kwargs=True),
    "forward": lambda module, hook: module.register_forward_hook(hook, with_kwargs=True),
    "full backward pre": lambda module, hook: module.register_full_backward_pre_hook(hook),
    "full backward": lambda module, hook: module.register_full_backward_hook(hook),
}
OF_ALL = {
    "forward pre": of_all.register_module_forward_pre_hook,
    "forward": of_all.register_module_forward_hook,
    "full backward pre": of_all.register_module_full_backward_pre_hook,
    "full backward": of_all.register_module_full_backward_hook,
}


def run(case: Case, model: nn.Module, kind: str) -> None:
    torch.manual_seed(0)
    output = case.call(model, torch.float64)
    if "backward" in kind:
        (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).reshape(output.shape)).sum().backward()


def roles(model: nn.Module) -> dict[str, nn.Module]:
    """One module for each class and place in its parent."""
    found: dict[tuple, tuple[str, nn.Module]] = {}
    for name, module in model.named_modules():
        found.setdefault((type(module), name.rpartition(".")[2]), (name, module))
    return dict(found.values())


def compare(actual: Seen, expected: Seen, names: dict[nn.Module, str]) -> None:
    """Module by module: in which order those run that do not wait for one another is nothing that a hook sees."""
    assert sorted(names[module] for module, _ in actual) == sorted(names[module] for module, _ in expected)
    for module, name in names.items():
        found, wanted = ([tensors for m, tensors in seen if m is module] for seen in (actual, expected))
        torch.testing.assert_close(found, wanted, msg=lambda text, name=name: f"{name}: {text}")


@every_case
@pytest.mark.parametrize("kind", OF_ONE)
def test_a_hook_on_a_module_sees_what_it_saw(case: Case, kind: str) -> None:
    model = case.model(torch.float64)
    expected: dict[str, Seen] = {}
    for patched in (False, True):
        if patched:
            watched = list(expected)
            assert patch(model).counts == case.counts
        else:
            watched = list(roles(model))
        for name in watched:
            module, seen = model.get_submodule(name), []
            handle = OF_ONE[kind](module, seeing(seen))
            run(case, model, kind)
            handle.remove()
            if patched:
                compare(seen, expected[name], {module: name})
            else:
                expected[name] = seen
    assert sum(map(bool, expected.values())) > 10


@every_case
@pytest.mark.parametrize("kind", OF_ALL)
def test_a_hook_on_all_modules_sees_what_it_saw(case: Case, kind: str) -> None:
    model = case.model(torch.float64)
    names = {module: name for name, module in model.named_modules()}
    expected, seen = [], []
    for found in (expected, seen):
        handle = OF_ALL[kind](seeing(found))
        try:
            run(case, model, kind)
        finally:
            handle.remove()
        patch(model)
    compare(seen, expected, names)
    assert len(expected) > 30


def test_a_hook_that_sees_the_last_operation_keeps_the_model_as_it_is() -> None:
    case = BY_NAME["FluxTransformer2DModel"]
    model = case.model()
    handle = model.transformer_blocks[0].register_backward_hook(lambda *args: None)
    report = patch(model)
    assert not report.replaced
    assert {entry.reason for entry in report.left} == {
        "hooks of register_backward_hook are in the model, which see what its last operations are; use register_full_backward_hook"
    }
    handle.remove()
    assert patch(model).counts == case.counts
    handle = model.transformer_blocks[0].register_backward_hook(lambda *args: None)
    assert patch(model).counts == case.counts  # what is replaced already
    handle.remove()
