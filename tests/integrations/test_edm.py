"""Networks of EDM and EDM2: attention by einsum and their own group norms replaced, and the whole as a denoiser."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from benchmarks import hosts
from fastdiff_kernels.diffusion import optimize_schedule, sample
from fastdiff_kernels.distill import SIMDistiller
from fastdiff_kernels.integrations import edm
from tests.helpers import assert_bitwise, assert_within_eager

BUILD = {"edm": lambda: hosts.edm().eval(), "edm shift": lambda: hosts.edm(False).eval(), "edm2": lambda: hosts.edm2().eval()}
COUNTS = {"edm": {"UNetBlock": 2, "GroupNorm": 8}, "edm shift": {"UNetBlock": 2, "GroupNorm": 8}, "edm2": {"EDM2Block": 2}}
every_network = pytest.mark.parametrize("name", BUILD)


def randn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def call(net: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    labels = torch.eye(10)[[1, 7]]
    return net(randn(2, 2, 4, 4).to(dtype), torch.tensor([0.4, 5.0], dtype=dtype), labels)


def gradients(net: nn.Module, dtype: torch.dtype) -> Tensor:
    output = call(net, dtype)
    found = torch.autograd.grad(output, list(net.parameters()), randn(*output.shape, seed=5).to(dtype))
    return torch.cat([g.flatten() for g in found])


@every_network
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_outputs_and_gradients_are_as_accurate_as_the_hosts(name: str, dtype: torch.dtype) -> None:
    net = BUILD[name]().to(dtype)
    exact = copy.deepcopy(net).double()
    eager = [fn(net, dtype).detach() for fn in (call, gradients)]
    assert edm.patch(net).counts == COUNTS[name]
    for fn, before in zip((call, gradients), eager, strict=True):
        assert_within_eager(fn(net, dtype).detach(), before, fn(exact, torch.float64).detach(), factor=3.0)


@every_network
def test_unpatching_restores_the_network_and_patching_twice_is_patching_once(name: str) -> None:
    net = BUILD[name]()
    before, modules = call(net), [(m, type(m)) for m in net.modules()]
    assert edm.patch(net).counts == edm.patch(net).counts == COUNTS[name]
    edm.unpatch(net)
    assert all(m is n and type(m) is kind for m, (n, kind) in zip(net.modules(), modules, strict=True))
    assert_bitwise(call(net), before)


@every_network
def test_blocks_compile_into_one_graph(name: str) -> None:
    net = BUILD[name]()
    before = call(net)
    edm.patch(net)
    torch.testing.assert_close(call(torch.compile(net, fullgraph=True, backend="eager")), before)


def test_the_report_says_why_blocks_are_left() -> None:
    left = edm.patch(hosts.edm()).left
    reasons = [entry.reason for entry in left if entry.kind == "UNetBlock"]
    assert reasons == ["it has no attention; its norms are replaced one by one, its SiLUs are in its forward"]


class Packed(hosts.UNetBlock):
    """The parts of EDM's block with heads packed in another order."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        heads, self.num_heads = self.num_heads, 0
        x = super().forward(x, emb)
        self.num_heads = heads
        if not heads:
            return x
        q, k, v = self.qkv(self.norm2(x)).flatten(2).unflatten(1, (3, heads, -1)).unbind(1)
        attended = torch.einsum("bhqk,bhck->bhcq", torch.einsum("bhcq,bhck->bhqk", q, k / q.shape[2] ** 0.5).softmax(3), v)
        return (self.proj(attended.reshape(x.shape)) + x) * self.skip_scale


def test_another_packing_of_the_heads_is_noticed_and_left() -> None:
    net = hosts.edm()
    net.model.blocks[1] = Packed(8, 8, 16, 2)
    net.eval()
    before = call(net)
    assert edm.patch(net).counts == COUNTS["edm"] | {"UNetBlock": 1}
    torch.testing.assert_close(call(net), before)


class WithText(hosts.UNetBlock):
    def forward(self, x: Tensor, emb: Tensor, text: Tensor) -> Tensor:
        return super().forward(x, emb + text)


def test_a_block_that_takes_more_is_left() -> None:
    report = edm.patch(WithText(8, 8, 16, 2))
    assert report.counts == {"GroupNorm": 3}
    assert str(report.left[0].reason).startswith("it has the parts of EDMBlock and cannot be called as one: TypeError")


@every_network
def test_the_network_is_a_denoiser_with_its_raw_output(name: str) -> None:
    net = BUILD[name]()
    denoiser = edm.as_denoiser(net)
    x, labels = randn(2, 2, 4, 4), torch.tensor([1, 10])
    one_hot = torch.eye(11)[labels][:, :10]
    torch.testing.assert_close(denoiser(x, 0.7, class_labels=labels), net(x, torch.tensor([0.7, 0.7]), one_hot))
    v = 0.49 + 0.25
    rebuilt = 0.25 / v * x + 0.35 / math.sqrt(v) * denoiser.raw(x, 0.7, class_labels=labels)
    torch.testing.assert_close(denoiser(x, 0.7, class_labels=labels), rebuilt)


@every_network
@pytest.mark.parametrize("label_dim", [10, 0])
def test_without_labels_it_is_the_network_without_a_class(name: str, label_dim: int) -> None:
    """The host's preconditioner puts zeros in, which the raw network of a conditional one has to be given."""
    net = {"edm": hosts.edm, "edm shift": lambda label_dim: hosts.edm(False, label_dim), "edm2": hosts.edm2}[name](
        label_dim=label_dim
    ).eval()
    denoiser = edm.as_denoiser(net)
    x, sigma = randn(2, 2, 4, 4), torch.tensor([0.7, 0.7])
    v = 0.49 + 0.25
    rebuilt = 0.25 / v * x + 0.35 / math.sqrt(v) * denoiser.raw(x, 0.7)
    torch.testing.assert_close(rebuilt, net(x, sigma))
    torch.testing.assert_close(denoiser(x, 0.7), net(x, sigma))
    zeros = denoiser.raw(x, 0.7, class_labels=torch.tensor([label_dim, label_dim]))
    assert_bitwise(zeros, denoiser.raw(x, 0.7))


@every_network
def test_the_raw_output_trains(name: str) -> None:
    """Dropout differs between calls, and each call of EDM2 writes its weights, which a backward pass would find changed."""
    net = BUILD[name]().train()
    denoiser = edm.as_denoiser(net)
    denoiser.raw(randn(2, 2, 4, 4), 0.7).sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    assert all(module.training for module in net.modules())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_raw_network_gets_the_dtype_that_the_host_runs_it_in(device: str) -> None:
    net = hosts.edm().to(device)
    net.use_fp16 = True
    seen: list[torch.dtype] = []
    net.model.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    denoiser = edm.as_denoiser(net)
    denoiser.checked = True
    denoiser.raw(randn(2, 2, 4, 4).to(device), 0.7)
    assert seen == [torch.float32 if device == "cpu" else torch.float16]


def test_recipes_take_it() -> None:
    net = hosts.edm()
    edm.patch(net)
    denoiser = edm.as_denoiser(net).eval()
    schedule = optimize_schedule(denoiser, randn(4, 2, 4, 4), 3, sigma_min=0.1, sigma_max=5, knots=4, batch_size=2)
    assert sample(denoiser, randn(2, 2, 4, 4), schedule, solver="euler").nfe == 3
    assert math.isfinite(SIMDistiller(denoiser, sample_shape=(2, 4, 4)).step(2)["gap"])


def test_what_is_no_preconditioned_network_is_refused() -> None:
    with pytest.raises(TypeError, match=r"net must have sigma_data and a raw network, model or unet; Linear lacks one"):
        edm.as_denoiser(nn.Linear(1, 1))
    net = hosts.edm()
    net.sigma_data = 0.5
    denoiser = edm.as_denoiser(net)
    denoiser.sigma_data = 2.0
    with pytest.raises(RuntimeError, match="its preconditioning is not EDM's"):
        denoiser.raw(randn(2, 2, 4, 4) * 3, 2.0)
