"""What a block leaves to the compiler: the graph that torch.compile sees tells."""

from __future__ import annotations

import pytest
import torch

from fastdiff_kernels import _choices
from fastdiff_kernels.nn import DiT, UNet, _policy
from fastdiff_kernels.nn._policy import apply
from tests.nn.cases import CASES, NETWORKS


def ops_seen(module, *inputs) -> set[str]:
    """The names of our ops in the one graph of a compiled call."""
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph

    torch.compile(module, fullgraph=True, backend=keep, dynamic=False)(*inputs)
    (graph,) = graphs
    return {node.target._schema.name.removeprefix("fastdiff::") for node in graph.graph.nodes if "fastdiff" in str(node.target)}


def row(op, backend, mode="compiled", rows=(0, float("inf")), width=(0, float("inf")), device="cpu"):
    return _choices.Choice(op, device, mode, rows, width, backend, "made up", 2)


@pytest.fixture
def table(monkeypatch):
    """Makes the given rows the table of choices."""

    def fill(*rows):
        monkeypatch.setattr(_choices, "table", lambda: rows)

    fill()
    return fill


@pytest.mark.parametrize("mode", ["compiled", "compiled_inference"])
def test_the_table_has_a_row_for_every_op_that_blocks_call_on_a_cpu(mode):
    called = set().union(*(ops_seen(CASES[name].make(policy="always"), *CASES[name].inputs()) for name in CASES))
    measured = {choice.op for choice in _choices.table() if (choice.device, choice.mode) == ("cpu", mode)}
    assert called
    assert called | {"qk_norm_rope interleaved"} <= measured


@pytest.mark.parametrize("name", NETWORKS)
def test_always_shows_ops_and_never_none(name):
    case = CASES[name]
    assert ops_seen(case.make(policy="always"), *case.inputs()) & {"attention", "attention_packed"}
    assert ops_seen(case.make(policy="never"), *case.inputs()) == set()


@pytest.mark.parametrize(
    ("network", "shape"),
    [(DiT(1, dim=16, depth=2, num_heads=2, policy="never"), (2, 1, 4, 4)), (UNet(1, channels=8, policy="never"), (2, 1, 4, 4))],
)
def test_networks_hand_their_policy_on(network, shape):
    assert ops_seen(network, torch.randn(shape), torch.zeros(2)) == set()


def test_auto_asks_the_table(table):
    table(row("layer_norm_modulate", "inductor"), row("attention_packed", "fastdiff"))
    seen = ops_seen(CASES["dit"].make(policy="auto"), *CASES["dit"].inputs())
    assert seen == {"attention_packed", "gate_residual", "gate_residual_norm_modulate"}


@pytest.mark.parametrize("left", ["qk_norm_rope", "qk_norm_rope interleaved"])
def test_a_rotated_norm_has_rows_of_its_own(table, left):
    table(row(left, "inductor"))
    block, (x, condition, rope) = CASES["dit_rms_rope"].make(), CASES["dit_rms_rope"].inputs()
    assert ("qk_norm_rope" in ops_seen(block, x, condition)) == (left != "qk_norm_rope")
    assert ("qk_norm_rope" in ops_seen(block, x, condition, rope)) == (left == "qk_norm_rope")


def test_the_form_of_a_call_is_seen_however_its_angles_are_given():
    x, angles = torch.ones(1, 1, 1, 2), torch.ones(1, 1)
    by_position, by_name = (None, None, angles, angles), {"cos": angles, "sin": angles}
    assert _policy.form("qk_norm_rope", x, x, *by_position, norm="rms") == "qk_norm_rope interleaved"
    assert _policy.form("qk_norm_rope", x, x, **by_name, rope="half") == "qk_norm_rope half"
    assert _policy.form("qk_norm_rope", x, x, None, None, None, None, rope="half") == "qk_norm_rope"
    assert _policy.form("pixel_norm", x) == "pixel_norm"


def test_graphs_without_gradients_have_rows_of_their_own(table):
    table(row("layer_norm_modulate", "inductor", mode="compiled_inference"), row("gate_residual", "inductor"))
    block, inputs = CASES["dit"].make(), CASES["dit"].inputs()
    trained = ops_seen(block, *inputs)
    assert ("layer_norm_modulate" in trained, "gate_residual" in trained) == (True, False)
    for without_gradients in (torch.no_grad(), torch.inference_mode()):
        with without_gradients:
            inferred = ops_seen(block, *inputs)
        assert ("layer_norm_modulate" in inferred, "gate_residual" in inferred) == (False, True)


@pytest.mark.parametrize(
    ("choice", "left"),
    [
        ({"rows": (18, 18)}, True),  # 3 samples of 6 tokens
        ({"rows": (19, 100)}, False),
        ({"width": (16, 16)}, True),
        ({"width": (0, 15)}, False),
        ({"mode": "eager"}, False),
        ({"device": "cuda"}, False),
    ],
)
def test_rows_hold_for_their_sizes_and_device(table, choice, left):
    table(row("layer_norm_modulate", "inductor", **choice))
    assert ("layer_norm_modulate" not in ops_seen(CASES["dit"].make(), *CASES["dit"].inputs())) == left


def test_the_first_fitting_row_decides(table):
    table(row("layer_norm_modulate", "fastdiff", rows=(18, 18)), row("layer_norm_modulate", "inductor"))
    assert "layer_norm_modulate" in ops_seen(CASES["dit"].make(), *CASES["dit"].inputs())


def test_eager_runs_the_op_whatever_the_policy(monkeypatch):
    called = []
    monkeypatch.setattr(_policy.ops, "gate_residual", lambda *args: called.append(args))
    for policy in _policy.POLICIES:
        apply(policy, "gate_residual", torch.ones(1, 1, 1))
    assert len(called) == 3


@pytest.mark.parametrize("lengths", [[0, 2, 4], [9, 1, 3]])
def test_attention_left_to_the_compiler_keeps_its_promises(lengths):
    q, k, v = torch.randn(3, 3, 5, 2, 8, dtype=torch.float64).unbind(1)
    k, v, lengths = k[:, :4], v[:, :4].clone(), torch.tensor(lengths)
    v[1, 2:] = float("nan") if lengths[1] <= 2 else 0
    torch.testing.assert_close(_policy._attention(q, k, v, key_lengths=lengths), _policy.ops.attention(q, k, v, key_lengths=lengths))


def test_every_function_of_the_ops_has_a_definition_for_the_compiler():
    assert set(_policy._DEFINITIONS) >= {
        "attention",
        "gate_residual",
        "gate_residual_norm_modulate",
        "group_norm_silu",
        "layer_norm_modulate",
        "pixel_norm",
        "qk_norm_rope",
        "qkv_pixel_norm",
        "rms_norm_modulate",
    }
