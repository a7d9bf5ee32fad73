"""Which attention masks become key lengths, and that the others stay masks."""

from __future__ import annotations

import copy

import pytest
import torch

from fastdiff_kernels.integrations.diffusers import _masks, patch
from fastdiff_kernels.integrations.diffusers import _processors as processors
from fastdiff_kernels.integrations.diffusers._masks import key_lengths
from tests.helpers import assert_within_eager
from tests.integrations.models import BY_NAME, randn

LENGTHS = torch.tensor([5, 2, 1])
ATTENDS = torch.arange(5) < LENGTHS[:, None]  # [3, 5]


@pytest.mark.parametrize("shape", [(3, 5), (3, 1, 5), (3, 1, 1, 5)])
@pytest.mark.parametrize("padding", [-10000.0, float("-inf"), torch.finfo(torch.float32).min, "bool", "bfloat16"])
def test_padding_behind_the_keys_is_a_length(shape: tuple[int, ...], padding: float | str) -> None:
    if padding == "bool":
        mask = ATTENDS
    elif padding == "bfloat16":
        mask = (1 - ATTENDS.to(torch.bfloat16)) * -10000.0
    else:
        mask = torch.zeros(3, 5).masked_fill(~ATTENDS, padding)
    found = key_lengths(mask.reshape(shape), 3, 5)
    assert found is not None
    assert torch.equal(found, LENGTHS)


@pytest.mark.parametrize(
    "mask",
    [
        ATTENDS.flip(1),  # padding in front
        ATTENDS & (torch.arange(5) < 0),  # nothing to attend to
        torch.zeros(3, 5).masked_fill(~ATTENDS, -5.0),  # a bias
        torch.zeros(3, 5).masked_fill(ATTENDS, 0.5),
        torch.zeros(3, 4, 5),  # one for each query
        torch.zeros(1, 5),
    ],
)
def test_every_other_mask_stays_a_mask(mask: torch.Tensor) -> None:
    assert key_lengths(mask, 3, 5) is None


def test_a_mask_is_looked_at_once_and_again_when_it_changes(monkeypatch) -> None:
    looks = []
    prove = _masks._prove
    monkeypatch.setattr(_masks, "_prove", lambda mask: looks.append(1) or prove(mask))
    mask = torch.zeros(3, 5).masked_fill(~ATTENDS, -1e4)
    for _ in range(3):
        assert key_lengths(mask, 3, 5).tolist() == [5, 2, 1]
    assert len(looks) == 1
    mask[1, 2] = 0
    assert key_lengths(mask, 3, 5).tolist() == [5, 3, 1]
    assert len(looks) == 2


@pytest.mark.parametrize("kind", ["padding", "bias"])
def test_masked_cross_attention_is_the_hosts(kind: str, monkeypatch) -> None:
    case = BY_NAME["PixArtTransformer2DModel"]
    model = case.model()
    inputs = case.inputs()
    if kind == "bias":
        inputs["encoder_attention_mask"] = randn(2, 1, 6)
    before = case.call(model, inputs=inputs)
    wide = {key: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for key, v in inputs.items()}
    truth = case.call(copy.deepcopy(model).double(), torch.float64, wide)
    patch(model)
    monkeypatch.setattr(processors, "_said", set())
    lengths = []
    attention = processors.ops.attention
    monkeypatch.setattr(processors.ops, "attention", lambda *a, **kw: lengths.append(kw["key_lengths"]) or attention(*a, **kw))
    if kind == "bias":
        with pytest.warns(UserWarning, match="an attention mask that is not padding behind the keys is left to diffusers' processor"):
            actual = case.call(model, inputs=inputs)
        assert lengths == [None, None]
    else:
        actual = case.call(model, inputs=inputs)
        assert [None if found is None else found.tolist() for found in lengths] == [None, [6, 3], None, [6, 3]]
    # See test_outputs_and_gradients_are_as_accurate_as_the_hosts.
    assert_within_eager(actual, before, truth, factor=2.2)


def test_a_mask_in_a_compiled_graph_is_the_hosts_and_said_to_be(monkeypatch) -> None:
    case = BY_NAME["PixArtTransformer2DModel"]
    model = case.model()
    before = case.call(model)
    patch(model)
    monkeypatch.setattr(processors, "_said", set())
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with pytest.warns(UserWarning, match="an attention mask in a compiled graph is left to diffusers' processor") as said:
        torch.testing.assert_close(case.call(compiled), before)
    assert len([w for w in said if "attention mask" in str(w.message)]) == 1
