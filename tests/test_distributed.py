"""DTensor: a batch split over two processes gives what one process gives, and the gradients of what samples share are partial sums."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor, init_device_mesh

import fastdiff_kernels.distributed  # noqa: F401  (registers the rules)
from fastdiff_kernels import ops
from tests.helpers import outputs_of

R, S = Replicate(), Shard(0)
X, Q, C = (4, 3, 8), (4, 5, 2, 8), (8,)

# What is called, the shapes and placements of its arguments.
CASES: dict[str, tuple[Callable, tuple, tuple]] = {
    "layer_norm_modulate": (ops.layer_norm_modulate, (X, C, (4, 8)), (S, R, S)),
    "gate_residual_norm_modulate": (ops.gate_residual_norm_modulate, (X, X, C, (4, 1, 8), (4, 8)), (S, S, R, S, S)),
    "rms_norm_modulate": (ops.rms_norm_modulate, (X, C), (S, R)),
    "group_norm_silu": (lambda x, w, b: ops.group_norm_silu(x, 2, w, b), ((4, 8, 3), C, C), (S, R, R)),
    "attention": (ops.attention, (Q, Q, Q), (S, S, S)),
    "qk_norm_rope": (ops.qk_norm_rope, (Q, Q, C, C), (S, S, R, R)),
    "denoising_loss": (lambda a, b: ops.denoising_loss(a, b, weight=2.0), (X, X), (S, S)),
    "sim_loss": (ops.sim_loss, (X, X, X), (S, S, S)),
    "guided_step": (lambda x, d: ops.guided_step(x, d, 2.0, 1.0), (X, X), (S, S)),
    "replicated": (ops.denoising_loss, (X, X), (R, R)),
    "seeded": (lambda s: ops.lcss_loss(s, 5, 0.5), (X,), (S,)),
}
INFERENCE: dict[str, tuple[Callable, tuple, tuple]] = {
    "third_order_difference": (ops.third_order_difference, (X, X, X, X), (S, S, S, S)),
    "incremental_cost": (lambda x, a, b: ops.incremental_cost(x, a, b, 0.5, 0.7), (X, X, X), (S, S, S)),
}


def _close(sharded: Tensor, whole: Tensor) -> None:
    torch.testing.assert_close(sharded.full_tensor(), whole)


def _compare(fn: Callable, shapes: tuple, placements: tuple, mesh: object, gradients: bool) -> list[Tensor]:
    tensors = [torch.randn(shape) for shape in shapes]
    whole = [t.clone().requires_grad_(gradients) for t in tensors]
    sharded = [distribute_tensor(t.clone(), mesh, [p]).requires_grad_(gradients) for t, p in zip(tensors, placements, strict=True)]
    expected, actual = outputs_of(fn(*whole)), outputs_of(fn(*sharded))
    for a, e in zip(actual, expected, strict=True):
        _close(a, e)
    if gradients:
        for outputs in (expected, actual):
            sum((o * o).sum() for o in outputs).backward()
        for a, e in zip(sharded, whole, strict=True):
            _close(a.grad, e.grad)
    return [*actual, *[s.grad for s in sharded if gradients]]


def _worker(rank: int, rendezvous: str) -> None:
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    results = {name: _compare(*case, mesh, gradients=True) for name, case in CASES.items()}
    results |= {name: _compare(*case, mesh, gradients=False) for name, case in INFERENCE.items()}
    y, grad_x, grad_shift, grad_scale = results["layer_norm_modulate"]
    assert y.placements == grad_x.placements == grad_scale.placements == (S,)
    assert grad_shift.placements == (Partial(),)
    assert results["attention"][0].placements == results["incremental_cost"][0].placements == (S,)
    # A shard does not know the index of its samples, so seeded noise is drawn for the whole batch.
    assert results["seeded"][0].placements == (R,)
    dist.destroy_process_group()


def test_a_split_batch_gives_the_same_results_and_gradients(tmp_path: Path):
    mp.spawn(_worker, args=(str(tmp_path / "rendezvous"),), nprocs=2)
