"""Definitions where they stand for kernels: on machines without a kernel, or by backend("reference")."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fastdiff_kernels import backend, ops

from .helpers import outputs_of
from .test_contract import CALLS, call_of, sample


def turned(x: object) -> object:
    """A tensor of the same numbers whose memory runs the other way; anything else as it is."""
    if not isinstance(x, Tensor) or x.dim() < 2:
        return x
    backwards = list(reversed(range(x.dim())))
    return x.permute(backwards).contiguous().permute(backwards)


def layouts(outputs) -> list:
    return [(tuple(o.shape), o.stride(), o.dtype) for o in outputs_of(outputs)]


@pytest.mark.parametrize(("op", "index"), CALLS)
@pytest.mark.parametrize("lay", [lambda x: x, turned], ids=["as they are", "turned"])
def test_outputs_have_the_layout_that_compiled_code_relies_on(op, index, lay):
    args = [lay(a) for a in sample(op, index)]
    with backend("reference"):
        found = outputs_of(call_of(op)(*args))
    promised = outputs_of(op.fake(*args))
    assert layouts(found) == layouts(promised)
    given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
    assert not any(o.numel() and o.untyped_storage().data_ptr() in given for o in found)


def _only_q():
    q = torch.randn(2, 5, 2, 8, requires_grad=True)
    return sum(x.sum() for x in ops.qk_norm_rope(q, torch.randn(2, 5, 2, 8))), q


def _only_scale():
    scale, x = torch.randn(2, 8, requires_grad=True), torch.randn(2, 5, 8)
    return sum(o.square().sum() for o in ops.gate_residual_norm_modulate(x, x, None, scale, scale)), scale


def _only_v():
    q, v = torch.randn(2, 5, 2, 8), torch.randn(2, 5, 2, 8, requires_grad=True)
    return sum(o.square().sum() for o in ops.attention(q, q, v, return_lse=True)), v


def _lse_of_v():
    q, v = torch.randn(2, 5, 2, 8), torch.randn(2, 5, 2, 8, requires_grad=True)
    return ops.attention(q, q, v, return_lse=True)[1].sum(), v


@pytest.mark.parametrize("make", [_only_q, _only_scale, _only_v, _lse_of_v])
def test_an_output_need_not_depend_on_what_requires_grad(make):
    found = []
    for name in ("cpu", "reference"):
        torch.manual_seed(0)
        with backend(name):
            found.append(torch.autograd.grad(*make())[0])
    torch.testing.assert_close(found[1], found[0])


def constants():
    x, y = torch.randn(3, 5), torch.randn(3, 5)
    low, high = torch.rand(3), 1 + torch.rand(3)
    return {
        "denoising_loss": lambda: ops.denoising_loss(x, y, weight=high),
        "posterior_sample": lambda: ops.posterior_sample(x, y, low, high, 3),
        "incremental_cost": lambda: ops.incremental_cost(x, y, x, low, high, sigma_data=0.5),
        "integrate_schedule": lambda: ops.integrate_schedule(torch.linspace(0, 1, 5).double(), torch.ones(4).double(), 3),
        "third_order_skip": lambda: ops.third_order_skip(low, high, low, high[0]),
    }


@pytest.mark.parametrize("name", list(constants()))
def test_numbers_are_not_asked_of_tensors_that_have_none(name):
    with FakeTensorMode():
        found = constants()[name]()
    assert layouts(found) == layouts(constants()[name]())


def test_constants_can_be_traced_and_mapped():
    x, weight = torch.randn(3, 5), torch.rand(3)

    def loss(weight):
        return ops.denoising_loss(x, -x, weight=weight)

    assert torch.equal(make_fx(loss)(weight)(2 * weight), loss(2 * weight))
    torch.testing.assert_close(torch.vmap(loss)(torch.stack([weight, 2 * weight])), torch.stack([loss(weight), loss(2 * weight)]))


def test_constants_may_require_grad_where_none_is_recorded():
    x, weight = torch.randn(3, 5), torch.rand(3, requires_grad=True)
    with torch.no_grad():
        assert torch.equal(ops.denoising_loss(x, -x, weight=weight), ops.denoising_loss(x, -x, weight=weight.detach()))
    with pytest.raises(ValueError, match="weight is a constant and must not require grad"):
        ops.denoising_loss(x, -x, weight=weight)
