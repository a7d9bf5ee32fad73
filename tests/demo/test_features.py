"""Fréchet distance and the fixed features."""

import numpy as np
import pytest
import scipy.linalg
import torch

from fastdiff_kernels.demo.data import load_digits, stratified_split
from fastdiff_kernels.demo.features import NUM_FEATURES, frechet_distance, train_feature_extractor


def textbook(a, b):
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    mean = a.mean(0) - b.mean(0)
    return mean @ mean + np.trace(cov_a + cov_b - 2 * np.real(scipy.linalg.sqrtm(cov_a @ cov_b)))


@pytest.mark.parametrize(("n", "m", "features"), [(200, 150, 8), (60, 90, 32)])
def test_is_the_textbook_formula(n, m, features):
    rng = np.random.default_rng(1)
    a = rng.normal(size=(n, features)) @ rng.normal(size=(features, features))
    b = rng.normal(size=(m, features)) + 0.3
    assert frechet_distance(a, b) == pytest.approx(textbook(a, b), rel=1e-8)
    assert frechet_distance(b, a) == pytest.approx(frechet_distance(a, b), rel=1e-10)


def test_gaussians_with_known_distance():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(200_000, 3))
    b = 2 * rng.normal(size=(200_000, 3)) + 1
    assert frechet_distance(a, b) == pytest.approx(3 * (1 + 1), rel=0.02)


def test_of_a_set_with_itself_is_zero_even_with_a_singular_covariance():
    a = np.random.default_rng(0).normal(size=(20, 32))
    assert abs(frechet_distance(a, a)) < 1e-10
    shifted = a.copy()
    shifted[:, 0] += 2
    assert frechet_distance(a, shifted) == pytest.approx(4, rel=1e-9)


def test_bad_input_is_refused():
    a = np.zeros((5, 3))
    with pytest.raises(ValueError, match="b must have 3 features, as a has, got 2"):
        frechet_distance(a, np.zeros((5, 2)))
    with pytest.raises(ValueError, match=r"a must be \[n, features\] with n >= 2, got shape"):
        frechet_distance(np.zeros(5), a)
    with pytest.raises(ValueError, match="b must be finite, got"):
        frechet_distance(a, np.full((5, 3), np.nan))


def test_the_extractor_is_fixed_by_its_seed_and_recognises_held_out_digits():
    data = load_digits()
    split = stratified_split(data.labels, 0)
    train, held_out = split.train, split.held_out
    state = torch.get_rng_state()
    first = train_feature_extractor(data.images[train], data.labels[train], 10, epochs=6, seed=3)
    again = train_feature_extractor(data.images[train], data.labels[train], 10, epochs=6, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    features = first.features(data.images[held_out])
    assert features.shape == (len(held_out), NUM_FEATURES)
    assert features.dtype == np.float64
    np.testing.assert_array_equal(features, again.features(data.images[held_out]))
    assert first.accuracy(data.images[held_out], data.labels[held_out]) > 0.7


def test_one_class_is_told_apart_by_rotation():
    images = torch.zeros(64, 1, 8, 8)
    images[:, :, 0] = 1 + 0.1 * torch.randn(64, 1, 8, generator=torch.Generator().manual_seed(0))
    extractor = train_feature_extractor(images, torch.zeros(64, dtype=torch.int64), 1, epochs=20)
    assert extractor.accuracy(images, torch.zeros(64, dtype=torch.int64)) > 0.9
