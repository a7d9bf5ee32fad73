"""The original DiT: blocks, last layer and attention replaced by what they are made of."""

from __future__ import annotations

import copy
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from benchmarks import hosts
from fastdiff_kernels.integrations import dit
from tests.helpers import assert_bitwise, assert_within_eager
from tests.integrations.counting import attends

COUNTS = {"DiTBlock": 2, "Attention": 2, "FinalLayer": 1}


def randn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def call(model: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    return model(randn(2, 4, 6, 6).to(dtype), torch.tensor([700.0, 3.0]), torch.tensor([1, 10]))


def gradients(model: nn.Module, dtype: torch.dtype) -> Tensor:
    output = call(model, dtype)
    found = torch.autograd.grad(output, [p for p in model.parameters() if p.requires_grad], randn(*output.shape, seed=5).to(dtype))
    return torch.cat([g.flatten() for g in found])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("qk_norm", [False, True])
def test_outputs_and_gradients_are_as_accurate_as_the_hosts(dtype: torch.dtype, qk_norm: bool) -> None:
    model = hosts.DiT(qk_norm=qk_norm).to(dtype)
    exact = copy.deepcopy(model).double()
    eager = [fn(model, dtype).detach() for fn in (call, gradients)]
    assert dit.patch(model).counts == COUNTS
    for fn, before in zip((call, gradients), eager, strict=True):
        assert_within_eager(fn(model, dtype).detach(), before, fn(exact, torch.float64).detach(), factor=3.0)


def test_unpatching_restores_the_model_and_patching_twice_is_patching_once() -> None:
    model = hosts.DiT()
    before, modules = call(model), [(m, type(m)) for m in model.modules()]
    keys = list(model.state_dict())
    first, second = dit.patch(model), dit.patch(model)
    assert first.counts == second.counts == COUNTS
    assert list(model.state_dict()) == keys
    assert_bitwise(call(copy.deepcopy(model)), call(model))
    dit.unpatch(model)
    assert all(m is n and type(m) is kind for m, (n, kind) in zip(model.modules(), modules, strict=True))
    assert_bitwise(call(model), before)


def test_blocks_compile_into_one_graph_and_keep_their_hooks() -> None:
    model = hosts.DiT()
    before, seen = call(model), []
    model.blocks[0].register_forward_hook(lambda *args: seen.append(1))
    dit.patch(model)
    torch.testing.assert_close(call(model), before)
    assert seen == [1]
    torch.testing.assert_close(call(torch.compile(model, fullgraph=True, backend="eager")), before)


def test_autocast_keeps_the_streams_dtype() -> None:
    model = hosts.DiT()
    exact = copy.deepcopy(model).double()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = call(model)
        dit.patch(model)
        after = call(model)
    assert after.dtype == before.dtype
    assert_within_eager(after, before, call(exact, torch.float64), factor=3.0)


def test_a_mask_goes_to_the_hosts_attention() -> None:
    attention = hosts.Attention(12, 2)
    x, mask = randn(2, 5, 12), torch.ones(5, 5).tril().bool()
    before = attention(x, attn_mask=mask)
    assert dit.patch(attention).counts == {"Attention": 1}
    assert_bitwise(attention(x, attn_mask=mask), before)


def test_timms_blocks_which_pass_every_argument_attend_by_the_op() -> None:
    block, x = hosts.Block(12, 2), randn(2, 5, 12)
    before, causal = block(x), block(x, is_causal=True)
    assert dit.patch(block).counts == {"Attention": 1}
    with attends(1):
        after = block(x)
    torch.testing.assert_close(after, before)
    with attends(0):
        after = block(x, is_causal=True)
    assert_bitwise(after, causal)


class ScaleFirst(hosts.DiTBlock):
    """The parts of a DiT block in another order."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        scale, shift, gate, *rest = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate[:, None] * self.attn(hosts.modulate(self.norm1(x), shift, scale))
        return x + rest[2][:, None] * self.mlp(hosts.modulate(self.norm2(x), rest[0], rest[1]))


def test_what_looks_alike_and_computes_something_else_is_left() -> None:
    model = hosts.DiT()
    model.blocks[1] = ScaleFirst(36, 2)
    before = call(model)
    report = dit.patch(model)
    assert report.counts == {"DiTBlock": 1, "Attention": 2, "FinalLayer": 1}
    assert [entry.reason for entry in report.left if entry.kind == "ScaleFirst"] == [
        "it has the parts of AdaLNBlock and computes something else"
    ]
    torch.testing.assert_close(call(model), before)


def test_the_model_is_a_denoiser() -> None:
    model = hosts.DiT()
    denoiser = dit.as_denoiser(model)
    x, labels = randn(2, 4, 6, 6), torch.tensor([1, 2])
    abar = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)[500]
    sigma = float(((1 - abar) / abar).sqrt())
    noise = model(x / (1 + sigma**2) ** 0.5, torch.full((2,), 500.0), labels)[:, :4]
    torch.testing.assert_close(denoiser(x, sigma, class_labels=labels), x - sigma * noise, rtol=1e-4, atol=1e-4)
    guided = dit.as_denoiser(model, guidance=2.0, null_class=10)
    conditional, absent = denoiser(x, sigma, class_labels=labels), denoiser(x, sigma, class_labels=torch.tensor([10, 10]))
    torch.testing.assert_close(guided(x, sigma, class_labels=labels), 2 * conditional - absent, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="guidance needs null_class"):
        dit.as_denoiser(model, guidance=2.0)


def test_betas_are_those_of_the_process() -> None:
    model, x, labels = hosts.DiT(), randn(2, 4, 6, 6), torch.tensor([1, 2])
    same = dit.as_denoiser(model, betas=torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))
    other = dit.as_denoiser(model, betas=torch.linspace(1e-4, 0.01, 1000))
    usual = dit.as_denoiser(model)(x, 2.0, class_labels=labels)
    torch.testing.assert_close(same(x, 2.0, class_labels=labels), usual)
    assert not torch.allclose(other(x, 2.0, class_labels=labels), usual)


@pytest.mark.parametrize(
    ("betas", "error", "message"),
    [
        ([0.1, 0.2], TypeError, "betas must be a floating-point tensor, got list"),
        (torch.tensor([1, 1]), TypeError, r"betas must be a floating-point tensor, got torch\.int64"),
        (torch.tensor(0.1), ValueError, r"betas must have shape \[T\] with T >= 2, got \[\]"),
        (torch.tensor([0.1]), ValueError, r"betas must have shape \[T\] with T >= 2, got \[1\]"),
        (torch.tensor([0.25, 0.0]), ValueError, r"betas must lie in \(0, 1\], got 0.0"),
        (torch.tensor([0.25, float("nan")]), ValueError, r"betas must lie in \(0, 1\], got nan"),
    ],
)
def test_betas_that_are_none_are_refused(betas: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        dit.as_denoiser(hosts.DiT(), betas=cast(Any, betas))


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got int"):
        dit.patch(3)
