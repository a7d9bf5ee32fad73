"""What the adapters for modules known by their parts have in common: hooks, copies, and modules that cannot be compared."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from benchmarks import hosts
from fastdiff_kernels.integrations import dit, edm, k_diffusion
from tests.helpers import assert_bitwise


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


SIGMA, LABELS = torch.tensor([0.4, 5.0]), torch.eye(10)[[1, 7]]
# The adapter, the network, its call, and how many of its modules are replaced.
HOSTS = {
    "DiT": (dit, hosts.DiT, lambda net: net(randn(2, 4, 6, 6), torch.tensor([700, 3]), torch.tensor([1, 10])), 5),
    "timm": (dit, lambda: hosts.Block(12, 2), lambda net: net(randn(2, 5, 12)), 1),
    "EDM": (edm, hosts.edm, lambda net: net(randn(2, 2, 4, 4), SIGMA, LABELS), 10),
    "EDM2": (edm, hosts.edm2, lambda net: net(randn(2, 2, 4, 4), SIGMA, LABELS), 2),
    "HDiT": (k_diffusion, hosts.HDiT, lambda net: net(randn(2, 3, 4, 5), SIGMA), 8),
}
every_host = pytest.mark.parametrize("host", HOSTS)


def built(host: str) -> tuple[object, nn.Module, Callable[[nn.Module], Tensor], int]:
    torch.manual_seed(0)
    adapter, build, call, count = HOSTS[host]
    return adapter, build().eval(), call, count


KINDS: dict[str, Callable[[nn.Module, Callable], object]] = {
    "forward": lambda module, see: module.register_forward_hook(lambda *_: see()),
    "forward pre": lambda module, see: module.register_forward_pre_hook(lambda *_: see()),
    "backward": lambda module, see: module.register_full_backward_hook(lambda *_: see()),
    "backward pre": lambda module, see: module.register_full_backward_pre_hook(lambda *_: see()),
}


def watch(net: nn.Module, kind: str) -> tuple[Counter, list]:
    """How often the hooks of each module are called."""
    seen: Counter = Counter()
    return seen, [KINDS[kind](module, lambda name=name: seen.update([name])) for name, module in net.named_modules()]


# EDM adds in place to what its modules return, which PyTorch forbids behind a full backward hook.
@pytest.mark.parametrize(("host", "kind"), [(h, k) for h in HOSTS for k in KINDS if h != "EDM" or k.startswith("forward")])
@pytest.mark.parametrize("when", ["before the patch", "after it"])
@pytest.mark.filterwarnings("ignore:Full backward hook is firing when gradients are computed with respect to module outputs")
def test_hooks_of_every_module_fire_as_often_as_before(host: str, kind: str, when: str) -> None:
    adapter, net, call, _ = built(host)
    seen, handles = watch(net, kind)
    call(net).sum().backward()
    unpatched = Counter(seen)
    assert len(unpatched) > 5
    if when == "after it":
        for handle in handles:
            handle.remove()
    adapter.patch(net)
    if when == "after it":
        seen, handles = watch(net, kind)
    seen.clear()
    call(net).sum().backward()
    assert seen == unpatched


def test_the_report_names_what_hooks_watch_and_the_rest_is_replaced() -> None:
    model = hosts.DiT()
    handles = [getattr(model.blocks[0], part).register_forward_hook(lambda *_: None) for part in ("norm1", "norm2")]
    report = dit.patch(model)
    assert report.counts == {"DiTBlock": 1, "Attention": 2, "FinalLayer": 1}
    assert [entry.reason for entry in report.left if entry.kind == "DiTBlock"] == [
        "hooks watch its norm1 and norm2, which the op would not call"
    ]
    for handle in handles:
        handle.remove()
    assert dit.patch(model).counts == {"DiTBlock": 2, "Attention": 2, "FinalLayer": 1}
    model.final_layer.norm_final.register_forward_hook(lambda *_: None)
    assert [entry.reason for entry in dit.patch(model).left if entry.kind == "FinalLayer"] == [
        "hooks watch its norm_final, which the op would not call"
    ]


def test_global_hooks_see_every_module() -> None:
    _, net, call, _ = built("DiT")
    dit.patch(net)
    seen: Counter = Counter()
    names = {module: name for name, module in net.named_modules()}
    handle = register_module_forward_hook(lambda module, *_: seen.update([names[module]]))
    try:
        call(net)
    finally:
        handle.remove()
    assert seen["blocks.0.norm1"] == seen["blocks.1.norm2"] == seen["final_layer.norm_final"] == 1


@every_host
def test_comparing_calls_no_hook_and_copies_none(host: str) -> None:
    class Watcher:
        def __call__(self, *args: object) -> None:
            raise AssertionError("called")

        def __deepcopy__(self, memo: object) -> None:
            raise AssertionError("copied")

    adapter, net, _, count = built(host)
    leaves = [module for module in net.modules() if isinstance(module, (nn.Linear, nn.Conv2d, hosts.Conv2d, hosts.MPConv))]
    for leaf in leaves:
        leaf.register_forward_hook(Watcher())
    assert leaves
    assert len(adapter.patch(net).replaced) == count


@every_host
def test_copies_of_a_patched_network_are_patched_and_can_be_unpatched(host: str) -> None:
    adapter, net, call, count = built(host)
    before = call(net)
    adapter.patch(net)
    twin = copy.deepcopy(net)
    assert [type(module).__name__ for module in twin.modules()] == [type(module).__name__ for module in net.modules()]
    assert len(adapter.patch(twin).replaced) == count
    assert_bitwise(call(twin), call(net))
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in net.parameters()}
    adapter.unpatch(twin)
    assert_bitwise(call(twin), before)


@every_host
def test_an_unpatched_network_pickles(host: str) -> None:
    adapter, net, call, _ = built(host)
    adapter.patch(net)
    adapter.unpatch(net)
    assert_bitwise(call(pickle.loads(pickle.dumps(net))), call(net))


@every_host
def test_a_network_on_meta_is_left_and_the_report_says_why(host: str) -> None:
    adapter, net, _, count = built(host)
    report = adapter.patch(net.to("meta"))
    assert report.counts == {}
    reasons = Counter(entry.reason for entry in report.left)
    assert reasons["its parameters are on the meta device: patch it when they are loaded"] >= count
    assert all(parameter.is_meta for parameter in net.parameters())


class Uncopied(hosts.Attention):
    """What a comparison needs a copy of, and cannot have."""

    def __deepcopy__(self, memo: object) -> None:
        raise RuntimeError("no copies of this")


def test_what_cannot_be_copied_is_left_and_the_report_says_why() -> None:
    report = dit.patch(Uncopied(12, 2))
    assert report.left[0].reason == ("it has the parts of TimmAttention and cannot be called as one: RuntimeError: no copies of this")
