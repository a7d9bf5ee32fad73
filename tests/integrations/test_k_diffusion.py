"""k-diffusion's wrappers as denoisers, denoisers in a loop of its kind, and blocks of HDiT replaced."""

from __future__ import annotations

import copy
import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from benchmarks import hosts
from fastdiff_kernels.diffusion import EDMPrecond, Schedule, optimize_schedule, sample
from fastdiff_kernels.integrations import k_diffusion
from tests.helpers import assert_bitwise, assert_within_eager


class Wrapper(nn.Module):
    """A denoiser wrapper: inner_model(x c_in, sigma) with EDM's scalings, for data N(0, 0.7^2)."""

    sigma_data = 0.5

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, sigma: Tensor, **extra_args: object) -> Tensor:
        s = sigma.view(-1, 1, 1, 1)
        return x * 0.49 / (0.49 + s**2) + self.weight.to(x.dtype)


def sample_euler(model, x: Tensor, sigmas: Tensor, extra_args: dict | None = None) -> Tensor:
    for sigma, following in pairwise(sigmas):
        denoised = model(x, sigma * x.new_ones(x.shape[0]), **(extra_args or {}))
        x = x + (x - denoised) / sigma * (following - sigma)
    return x


def test_a_wrapper_is_a_denoiser_with_the_raw_output_of_edm() -> None:
    denoiser = k_diffusion.as_denoiser(Wrapper())
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(denoiser(x, 1.5), x * 0.49 / (0.49 + 2.25))
    v = 2.25 + 0.25
    torch.testing.assert_close(denoiser.raw(x, 1.5) * 0.75 / math.sqrt(v) + 0.25 / v * x, denoiser(x, 1.5).detach())
    assert denoiser.sigma_data == 0.5
    assert k_diffusion.as_denoiser(Wrapper(), sigma_data=2.0).sigma_data == 2.0


def test_a_schedule_is_optimised_from_it_and_sampled_in_their_loop() -> None:
    denoiser = k_diffusion.as_denoiser(Wrapper())
    schedule = optimize_schedule(denoiser, 0.7 * torch.randn(64, 3, 4, 4), 6, sigma_min=0.05, sigma_max=20, knots=16)
    noise = torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        theirs = sample_euler(Wrapper(), noise * float(schedule.sigmas[0]), schedule.to_k_diffusion())
    torch.testing.assert_close(sample(denoiser, noise, schedule, solver="euler").samples, theirs, rtol=1e-4, atol=1e-5)


def test_a_denoiser_of_ours_runs_in_their_loop() -> None:
    class Network(nn.Module):
        def forward(self, x: Tensor, noise_level: Tensor, class_labels: Tensor) -> Tensor:
            return x * class_labels.view(-1, 1, 1, 1)

    denoiser, schedule = EDMPrecond(Network()), Schedule.karras(5, 0.1, 10.0)
    labels, noise = torch.tensor([0.1, 0.2]), torch.randn(2, 3, 4, 4)
    theirs = sample_euler(denoiser, noise * 10.0, schedule.to_k_diffusion(), {"class_labels": labels})
    ours = sample(denoiser, noise, schedule, solver="euler", conditioning={"class_labels": labels}).samples
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)


def test_what_is_no_wrapper_is_refused() -> None:
    with pytest.raises(TypeError, match=r"wrapper must be a torch.nn.Module, got function"):
        k_diffusion.as_denoiser(sample_euler)
    with pytest.raises(ValueError, match="sigma_data must be positive"):
        k_diffusion.as_denoiser(Wrapper(), sigma_data=-1.0)


HDIT_COUNTS = {"AdaRMSNorm": 6, "SelfAttentionBlock": 2}


def call(model: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(1))
    return model(x.to(dtype), torch.tensor([0.3, 5.0]))


def gradients(model: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    output = call(model, dtype)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(5)).to(dtype)
    return torch.cat([g.flatten() for g in torch.autograd.grad(output, list(model.parameters()), upstream)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("d_head", [16, 8])
def test_patched_hdit_is_as_accurate_as_the_hosts(dtype: torch.dtype, d_head: int) -> None:
    model = hosts.HDiT(d_head=d_head).to(dtype)
    exact = copy.deepcopy(model).double()
    eager = [fn(model, dtype).detach() for fn in (call, gradients)]
    assert k_diffusion.patch(model).counts == HDIT_COUNTS
    for fn, before in zip((call, gradients), eager, strict=True):
        assert_within_eager(fn(model, dtype).detach(), before, fn(exact, torch.float64).detach(), factor=3.0)


def test_unpatching_restores_hdit_and_patching_twice_is_patching_once() -> None:
    model = hosts.HDiT()
    before, modules, keys = call(model), [(m, type(m)) for m in model.modules()], list(model.state_dict())
    first, second = k_diffusion.patch(model), k_diffusion.patch(model)
    assert first.counts == second.counts == HDIT_COUNTS
    assert list(model.state_dict()) == keys
    assert_bitwise(call(copy.deepcopy(model)), call(model))
    k_diffusion.unpatch(model)
    assert all(m is n and type(m) is kind for m, (n, kind) in zip(model.modules(), modules, strict=True))
    assert_bitwise(call(model), before)


def test_attention_to_neighbours_is_left_and_its_norm_replaced() -> None:
    report = k_diffusion.patch(hosts.HDiT())
    assert [entry.reason for entry in report.left if entry.kind == "NeighborhoodSelfAttentionBlock"] == [
        "it attends within a kernel_size of 3, which no op here does; its norm is replaced"
    ]
    assert "layers.0.self_attn.norm" in [entry.module for entry in report.replaced]


class Squared(hosts.SelfAttentionBlock):
    """The parts of the block, and another similarity."""

    def inverse_length(self, y: Tensor) -> Tensor:
        return super().inverse_length(y).square()


def test_a_block_that_looks_alike_and_computes_something_else_is_left() -> None:
    model = hosts.HDiT()
    model.layers[1].self_attn = Squared(32, 16, 6)
    report = k_diffusion.patch(model)
    assert report.counts == {"AdaRMSNorm": 6, "SelfAttentionBlock": 1}
    assert "it has the parts of HDiTAttention and computes something else" in repr(report)


def test_hdit_compiles_into_one_graph_and_keeps_its_hooks() -> None:
    model = hosts.HDiT()
    before, seen = call(model), []
    model.layers[1].self_attn.norm.register_forward_hook(lambda *args: seen.append(1))
    k_diffusion.patch(model)
    torch.testing.assert_close(call(model), before)
    assert seen == [1]
    torch.testing.assert_close(call(torch.compile(model, fullgraph=True, backend="eager")), before)


def test_what_is_no_module_is_not_patched() -> None:
    for fn in (k_diffusion.patch, k_diffusion.unpatch):
        with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got int"):
            fn(3)
