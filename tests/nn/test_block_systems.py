"""Blocks inside what people train with: the compiler, activation checkpointing, FSDP2, copies, state dicts, meta tensors, CUDA graphs."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import init_device_mesh
from torch.utils.checkpoint import checkpoint

from fastdiff_kernels.nn import DiT
from tests.nn.cases import CASES, NETWORKS, C, E, every_block, every_case, results, tensors_of


def assert_same(actual, expected, tolerance=1e-12):
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance * max(1.0, e.abs().max().item()))


@every_block
@pytest.mark.parametrize("policy", ["always", "never"])
def test_compiles_without_graph_breaks(case, policy):
    block = case.make(policy=policy)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    actual = results(compiled, list(block.parameters()), case.inputs())
    assert_same(actual, results(block, list(block.parameters()), case.inputs()))


def test_inductor_computes_every_block():
    """All in one graph: the C++ compiler is slow to start, and kernels that blocks share are compiled once."""
    cases = [CASES[name] for name in NETWORKS]
    blocks = torch.nn.ModuleList([case.make(policy="always") for case in cases])

    def network(inputs):
        return [y for block, x in zip(blocks, inputs, strict=True) for y in tensors_of(block(*x))]

    inputs = [case.inputs() for case in cases]
    with torch.no_grad():
        assert_same(torch.compile(network, fullgraph=True)(inputs), network(inputs))


def test_inductor_computes_gradients():
    case, block = CASES["edm2"], CASES["edm2"].make(policy="always")
    actual = results(torch.compile(block, fullgraph=True), list(block.parameters()), case.inputs())
    assert_same(actual, results(block, list(block.parameters()), case.inputs()))


def test_one_graph_serves_any_number_of_samples_and_tokens():
    block, backend = CASES["dit_layer"].make(), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, fullgraph=True, backend=backend, dynamic=True)
    counts = []
    for batch, tokens in ((3, 6), (2, 5), (3, 4)):
        inputs = torch.randn(batch, tokens, C, dtype=torch.float64), torch.randn(batch, E, dtype=torch.float64)
        assert_same(tensors_of(compiled(*inputs)), tensors_of(block(*inputs)))
        counts.append(backend.frame_count)
    assert counts[0] == counts[-1]


@every_block
def test_checkpointing_changes_nothing(case):
    block = case.make()
    parameters = list(block.parameters())
    expected = results(block, parameters, case.inputs())
    assert_same(results(lambda *a: checkpoint(block, *a, use_reentrant=False), parameters, case.inputs()), expected, 0.0)


@every_case
def test_copies_and_state_dicts_carry_everything(case):
    block, inputs = case.make(), case.inputs()
    expected = tensors_of(block(*inputs))
    assert_same(tensors_of(copy.deepcopy(block)(*inputs)), expected, 0.0)
    file = io.BytesIO()
    torch.save(block.state_dict(), file)
    file.seek(0)
    fresh = case.block(**case.widths, **case.options).double()
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert_same(tensors_of(fresh(*inputs)), expected, 0.0)


@every_case
def test_is_built_without_memory_on_the_meta_device(case):
    with torch.device("meta"):
        block = case.block(**case.widths, **case.options).double()
    assert all(p.is_meta for p in (*block.parameters(), *block.buffers()))
    whole, inputs = case.make(), case.inputs()
    shapes = [y.shape for y in tensors_of(block(*(x.to("meta") if isinstance(x, torch.Tensor) else x for x in inputs[: len(case.shapes)])))]
    assert shapes == [y.shape for y in tensors_of(whole(*inputs))]
    block.to_empty(device="cpu").load_state_dict(whole.state_dict())
    assert_same(tensors_of(block(*inputs)), tensors_of(whole(*inputs)), 0.0)


@every_case
def test_documents_its_state_dict(case):
    """Every name in the docstring's layout, and its last dimensions' letters, stand for a parameter and the other way round."""
    layout = case.block.__doc__.split("State dict:")[1].split("Raises:")[0]
    for name in case.make().state_dict():
        stem, _, kind = name.removeprefix("context_").rpartition(".")
        assert (f"{stem}.weight" if stem else kind) in layout, f"{name} is not in the docstring of {case.block.__name__}"


def shard(case, mesh, **options):
    block = case.make()
    fully_shard(block, mesh=mesh, **options)
    return block


def compare_sharded(case, mesh, rank):
    """Each rank takes its samples of the batch; gradients are averaged over ranks."""
    inputs = tuple(torch.cat([x, x[:1]]) if isinstance(x, torch.Tensor) else x for x in case.inputs())  # 4 samples
    whole, sharded = case.make(), shard(case, mesh)
    mine = tuple(x[2 * rank : 2 * rank + 2] if isinstance(x, torch.Tensor) else x for x in inputs)
    sum(y.square().sum() for y in tensors_of(whole(*inputs))).backward()
    sum(y.square().sum() for y in tensors_of(sharded(*mine))).backward()
    for (name, a), b in zip(sharded.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(2 * a.grad.full_tensor(), b.grad, msg=lambda m, name=name: f"{case.block.__name__}.{name}: {m}")


def compare_mixed(case, mesh):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    block = shard(case, mesh, mp_policy=policy)
    outputs = tensors_of(block(*case.inputs()))
    assert all(y.dtype == torch.bfloat16 for y in outputs)
    sum(y.float().square().sum() for y in outputs).backward()
    assert all(p.grad.full_tensor().isfinite().all() for p in block.parameters())


def compare_network(mesh, rank):
    """A DiT of sharded blocks, which hand sums not yet taken to each other."""
    torch.manual_seed(0)
    whole = DiT(2, dim=C, depth=2, num_heads=2).double()
    for parameter in whole.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    sharded = copy.deepcopy(whole)
    for block in (*sharded.blocks, sharded):
        fully_shard(block, mesh=mesh)
    x, level = torch.randn(4, 2, 4, 4, dtype=torch.float64), torch.linspace(-1, 1, 4)
    mine = slice(2 * rank, 2 * rank + 2)
    whole(x, level).square().sum().backward()
    sharded(x[mine], level[mine]).square().sum().backward()
    for a, b in zip(sharded.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(2 * a.grad.full_tensor(), b.grad)


def worker(rank: int, rendezvous: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for name in NETWORKS:
        compare_sharded(CASES[name], mesh, rank)
        compare_mixed(CASES[name], mesh)
    compare_network(mesh, rank)
    dist.destroy_process_group()


def test_fsdp2_gives_the_gradients_of_one_process(tmp_path: Path):
    mp.spawn(worker, args=(str(tmp_path / "rendezvous"),), nprocs=2)


@pytest.mark.gpu
@every_block
def test_a_captured_graph_computes_new_values(case):
    block = case.make(torch.float32).cuda()
    inputs = torch.utils._pytree.tree_map(lambda x: x.cuda(), case.inputs(torch.float32))
    leaves = [*block.parameters(), *(x.requires_grad_() for x in inputs[: len(case.shapes)])]

    def step():
        outputs = tensors_of(block(*inputs))
        return [*outputs, *torch.autograd.grad(outputs, leaves, [o.detach() for o in outputs])]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for held, new in zip(inputs, case.inputs(torch.float32, seed=9)[: len(case.shapes)], strict=False):
            held.copy_(new)
    graph.replay()
    torch.cuda.synchronize()
    assert_same(captured, step(), 1e-6)
