"""One judge for every row: samples against held-out data, equal n and equal label counts everywhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .data import ImageData, Split, stratified_split
from .features import FeatureExtractor, frechet_distance


@dataclass(frozen=True)
class Verdict:
    """Fréchet distance, its mean and standard deviation over the sample sets; network calls (the most of any set); the first set."""

    frechet: float
    frechet_std: float
    sets: int
    calls: int
    ms_per_sample: float
    samples: Tensor

    def as_row(self) -> dict[str, float | int]:
        return {name: value for name, value in self.__dict__.items() if name != "samples"}


class Judge:
    """Holds the split, the fixed features, the held-out statistics and the noise of the sample sets."""

    def __init__(self, data: ImageData, extractor: FeatureExtractor, *, seed: int, sets: int, floor_splits: int) -> None:
        self.data, self.extractor, self.seed, self.sets = data, extractor, seed, sets
        split = stratified_split(data.labels, seed)
        self.held_out_index = split.held_out
        self.images, self.train_labels = data.images[split.train], data.labels[split.train]
        self.labels = data.labels[split.held_out]
        features = extractor.features(data.images)
        self.held_out_features = features[split.held_out.numpy()]
        self.floor = self._floor(features, split)
        self.floor_over_splits = [self._floor(features, stratified_split(data.labels, seed + 1 + i)) for i in range(floor_splits)]
        self.accuracy = extractor.accuracy(data.images[split.held_out], self.labels)

    @staticmethod
    def _floor(features: np.ndarray, split: Split) -> float:
        return frechet_distance(features[split.matched.numpy()], features[split.held_out.numpy()])

    def noise(self, index: int) -> Tensor:
        """Standard normals of sample set `index`, [n, C, H, W]: the same for every row."""
        generator = torch.Generator().manual_seed(1_000_003 * (self.seed + 1) + index)
        return torch.randn(len(self.labels), *self.data.sample_shape, generator=generator)

    def frechet(self, samples: Tensor) -> float:
        """Distance of as many samples as there are held-out images, in the order of `labels`."""
        if samples.shape[0] != len(self.labels):
            raise ValueError(f"samples must be {len(self.labels)}, one for each held-out image, got {samples.shape[0]}")
        return frechet_distance(self.extractor.features(samples), self.held_out_features)

    def judge(self, sampler: Callable[[Tensor, int], tuple[Tensor, int]], sets: int | None = None) -> Verdict:
        """`sampler(noise, index of the set)` -> (samples, network calls), judged on every set; the fastest set gives the time."""
        distances, seconds, calls, drawn = [], [], [], []
        for index in range(self.sets if sets is None else sets):
            noise = self.noise(index)
            start = time.perf_counter()
            samples, nfe = sampler(noise, index)
            seconds.append(time.perf_counter() - start)
            calls.append(nfe)
            distances.append(self.frechet(samples))
            drawn.append(samples)
        ms_per_sample = 1e3 * min(seconds) / len(self.labels)
        return Verdict(float(np.mean(distances)), float(np.std(distances)), len(distances), max(calls), ms_per_sample, drawn[0])

    def summary(self) -> dict[str, object]:
        return {
            "samples_per_set": len(self.labels),
            "label_counts": self.labels.bincount(minlength=self.data.num_classes).tolist(),
            "floor": self.floor,
            "floor_over_splits_mean": float(np.mean(self.floor_over_splits)),
            "floor_over_splits_std": float(np.std(self.floor_over_splits)),
            "floor_over_splits_max": float(np.max(self.floor_over_splits)),
            "feature_extractor_held_out_accuracy": self.accuracy,
        }
