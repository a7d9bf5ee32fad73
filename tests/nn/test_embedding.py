from __future__ import annotations

import pytest
import torch

from fastdiff_kernels.nn import ConditionEmbedding, axial_rope, sincos_positions


def test_null_class_is_what_no_labels_mean():
    embedding, level = ConditionEmbedding(16, num_classes=5), torch.linspace(-1.5, 1, 4)
    assert torch.equal(embedding(level), embedding(level, torch.full((4,), 5)))
    assert not torch.equal(embedding(level), embedding(level, torch.full((4,), 4)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_noise_levels_are_told_apart(dtype):
    embedding, level, seen = ConditionEmbedding(64).to(dtype), torch.linspace(-1.6, 1.1, 200), []
    embedding.hidden.register_forward_pre_hook(lambda _, args: seen.append(args[0].float()))
    embedding(level)
    distance = torch.cdist(seen[0], seen[0]) + 10 * torch.eye(200)
    assert distance.min() > 0.1


def test_noise_levels_are_not_rounded_to_the_parameters_dtype():
    wide, narrow, seen = ConditionEmbedding(64), ConditionEmbedding(64).bfloat16(), []
    for embedding in (wide, narrow):
        embedding.hidden.register_forward_pre_hook(lambda _, args: seen.append(args[0].float()))
        embedding(torch.linspace(-1.6, 1.1, 200))
    # Waves in [-1, 1] are then rounded once.
    torch.testing.assert_close(seen[1], seen[0], rtol=2**-8, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_output_has_the_parameters_dtype(dtype):
    embedding = ConditionEmbedding(8, num_classes=2).to(dtype)
    assert embedding(torch.zeros(3), torch.tensor([0, 1, 2])).dtype == dtype


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (torch.tensor([0, 6]), ValueError, r"class_labels must lie in \[0, 5\], got values in \[0, 6\]"),
        (torch.tensor([-1, 0]), ValueError, r"class_labels must lie in \[0, 5\]"),
        (torch.tensor([0.0, 1.0]), TypeError, "class_labels must be int64, got torch.float32"),
        (torch.tensor([0]), ValueError, r"class_labels must have shape \[2\], got \[1\]"),
    ],
)
def test_bad_labels(labels, error, message):
    with pytest.raises(error, match=message):
        ConditionEmbedding(8, num_classes=5)(torch.zeros(2), labels)


def test_labels_need_classes():
    with pytest.raises(ValueError, match="num_classes=0"):
        ConditionEmbedding(8)(torch.zeros(2), torch.tensor([0, 0]))


@pytest.mark.parametrize(("height", "width"), [(3, 5), (1, 4)])
def test_positions_are_row_major_and_distinct(height, width):
    positions = sincos_positions(height, width, 16)
    assert positions.shape == (height * width, 16)
    rows, columns = positions.view(height, width, 2, 8).unbind(2)
    assert torch.equal(rows, rows[:, :1].expand_as(rows))
    assert torch.equal(columns, columns[:1].expand_as(columns))
    assert (torch.cdist(positions, positions) + 10 * torch.eye(height * width)).min() > 0.5


def test_rope_makes_attention_depend_on_displacements_alone():
    cos, sin = (table.view(4, 4, 4) for table in axial_rope(4, 4, 8))
    q, k = torch.randn(4, dtype=torch.complex64), torch.randn(4, dtype=torch.complex64)
    turn = torch.complex(cos, sin)

    def score(a, b):
        return (q * turn[a] * (k * turn[b]).conj()).real.sum()

    torch.testing.assert_close(score((0, 1), (1, 3)), score((2, 0), (3, 2)), rtol=1e-4, atol=1e-5)
    assert abs(score((0, 1), (1, 3)) - score((0, 1), (3, 1))) > 1e-3


@pytest.mark.parametrize(
    "make", [lambda: sincos_positions(2, 2, 6), lambda: axial_rope(2, 2, 6), lambda: ConditionEmbedding(7), lambda: ConditionEmbedding(0)]
)
def test_bad_sizes(make):
    with pytest.raises(ValueError, match=r"must be (divisible by|at least)"):
        make()
