"""The counter-based normals that noise is made of."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff_kernels import ops
from fastdiff_kernels.reference import philox

from ..helpers import FLOATS, assert_bitwise
from .normals import SEED, definition, noise, ulps

COUNT = 1 << 18


# The known answers published with Random123 (Salmon et al., SC 2011): counter, key, words.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def _signed(high, low):
    return torch.tensor(np.array([(high << 32) | low], dtype=np.uint64).view(np.int64)[0])


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_gives_the_published_words(counter, key, words):
    block, stream, *sample = (int(word, 16) for word in counter.split())
    seed = [int(word, 16) for word in key.split()]
    found = philox.philox_words(_signed(*reversed(seed)), stream, _signed(*reversed(sample)), torch.tensor(block))
    assert " ".join(f"{word.item():08x}" for word in found) == words


@pytest.mark.parametrize(("seed", "sample"), [(0, 0), (-1, 3), (2**63 - 1, 2**33 + 1), (-(2**63), 2**62)])
def test_normals_are_box_muller_of_the_words(seed, sample):
    words = philox.philox_words(torch.tensor(seed), philox.STREAMS["lcss"], torch.tensor(sample), torch.arange(16))
    expected = []
    for radius_word, angle_word in (words[:2], words[2:]):
        u = (radius_word.float() * 2.0**-32 + 2.0**-33).double()
        radius, angle = (-2 * u.log()).sqrt(), 2 * math.pi * (angle_word.float() * 2.0**-32).double()
        expected += [radius * angle.cos(), radius * angle.sin()]
    assert ulps(noise(1, 64, seed=seed, offset=sample), torch.stack(expected, 1).reshape(1, 64).float()) <= 2


@pytest.mark.parametrize(("seed", "offset"), [(0, 0), (SEED, 0), (-1, 2**40), (2**62 + 12345, 7)])
def test_kernel_equals_the_definition_to_two_ulp(seed, offset):
    assert ulps(noise(3, 100003, seed=seed, offset=offset), definition(3, 100003, seed=seed, offset=offset)) <= 2


@pytest.mark.parametrize("instruction_set", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_draws_the_same_numbers(instruction_set, tmp_path):
    """Equal words, or nothing would agree; what is left are roundings of the polynomials. Unsupported sets run the best one there is."""
    script = "import sys, torch; from fastdiff_kernels import ops; torch.save(ops.lcss_noise(torch.empty(2, 65537), 5), sys.argv[1])"
    path = tmp_path / "noise.pt"
    environment = {**os.environ, "FASTDIFF_ISA": instruction_set}
    subprocess.run([sys.executable, "-c", script, path], check=True, env=environment, cwd=os.getcwd(), timeout=120)
    assert ulps(torch.load(path), definition(2, 65537, seed=5)) <= 2


@pytest.mark.parametrize("seed", [0, 1, SEED])
def test_moments_are_normal_to_the_sixth(seed):
    z = noise(4, COUNT, seed=seed).double().flatten()
    for order, (mean, variance) in enumerate([(0, 1), (1, 2), (0, 15), (3, 96), (0, 945), (15, 10170)], start=1):
        assert abs((z**order).mean() - mean) < 4 * math.sqrt(variance / z.numel()), f"moment {order}"


@pytest.mark.parametrize("seed", [0, 1, SEED])
def test_distribution_and_tails(seed):
    z = noise(1, COUNT, seed=seed).flatten().numpy()
    assert scipy.stats.kstest(z, "norm").pvalue > 1e-3
    for threshold in (3.0, 4.0, 4.5):
        expected = 2 * COUNT * scipy.stats.norm.sf(threshold)
        assert abs((np.abs(z) > threshold).sum() - expected) < 4 * math.sqrt(expected)


def test_normals_are_never_infinite_or_nan():
    """The smallest and the largest uniform word there is: the first keeps its half step, the second rounds to 1."""
    words = torch.tensor([0, 1, 2**31, 2**32 - 1])
    for angle in words:
        for radius in words:
            z = torch.stack(philox._box_muller(radius, angle))
            assert z.isfinite().all()
            assert z.norm() <= math.sqrt(2 * 33 * math.log(2)) * (1 + 1e-12)


def _correlation(a, b):
    a, b = a.double().flatten(), b.double().flatten()
    return abs(((a - a.mean()) * (b - b.mean())).mean() / (a.std() * b.std())).item()


BOUND = 4.5 / math.sqrt(COUNT)


@pytest.mark.parametrize("power", [1, 2])
def test_samples_seeds_and_streams_are_uncorrelated(power):
    z = noise(4, COUNT) ** power
    others = {
        "next sample": z.roll(1, 0),
        "far sample": noise(4, COUNT, offset=2**32) ** power,
        "next seed": noise(4, COUNT, seed=SEED + 1) ** power,
        "seed's high half": noise(4, COUNT, seed=SEED + 2**32) ** power,
        "other stream": definition(4, COUNT, stream="posterior") ** power,
    }
    for name, other in others.items():
        assert _correlation(z, other) < BOUND, name


@pytest.mark.parametrize("power", [1, 2])
def test_elements_are_uncorrelated(power):
    """Also the two normals of one Box-Muller pair and the four of one counter, whose squares share a radius or none."""
    z = noise(1, COUNT).flatten() ** power
    for lag in (1, 2, 3, 4, 5, 8, 64, 1024):
        assert _correlation(z[lag:], z[:-lag]) < BOUND * 1.01, f"lag {lag}"
    blocks = z.reshape(-1, 4)
    for i in range(4):
        for j in range(i):
            assert _correlation(blocks[:, i], blocks[:, j]) < 2 * BOUND, f"elements {i} and {j} of a counter"


@pytest.mark.parametrize("dtype", FLOATS)
def test_noise_is_rounded_from_float32(dtype):
    assert_bitwise(noise(2, 3, 37, dtype=dtype), noise(2, 3, 37).to(dtype))


def test_noise_does_not_depend_on_strides_or_shape_or_length():
    z = noise(4, 6, 10)
    strided = torch.empty(4, 10, 6).transpose(1, 2)
    assert_bitwise(ops.lcss_noise(strided, SEED), z)
    assert ops.lcss_noise(strided, SEED).is_contiguous()
    assert_bitwise(noise(4, 60), z.flatten(1))
    assert_bitwise(noise(4, 2000)[:, :60], z.flatten(1))
    assert_bitwise(noise(4), z[:, 0, 0])


@settings(max_examples=20, deadline=None)
@given(split=st.integers(0, 7), elements=st.integers(1, 3000), seed=st.integers(-(2**63), 2**63 - 1), offset=st.integers(0, 2**40))
def test_offset_keeps_micro_batches_and_ranks_apart(split, elements, seed, offset):
    whole = noise(7, elements, seed=seed, offset=offset)
    parts = [noise(split, elements, seed=seed, offset=offset), noise(7 - split, elements, seed=seed, offset=offset + split)]
    assert_bitwise(torch.cat(parts), whole)
    assert_bitwise(noise(7, elements, seed=torch.tensor(seed), offset=offset), whole)
