"""Fixed features and the Fréchet distance between two sets of them."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUM_FEATURES = 32


class FeatureExtractor(nn.Module):
    """A small convolutional classifier whose ``NUM_FEATURES`` penultimate activations are the features.

    With fewer than two classes the label is one of four rotations of the image, so that the features still mean something.
    """

    def __init__(self, channels: int, num_classes: int, width: int = 32):
        super().__init__()
        self.rotations = num_classes < 2
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(8 * width, NUM_FEATURES),
            nn.Tanh(),
        )
        self.head = nn.Linear(NUM_FEATURES, 4 if self.rotations else num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images))

    @torch.no_grad()
    def features(self, images: Tensor) -> np.ndarray:
        """[B, C, H, W] -> float64 [B, NUM_FEATURES], in evaluation mode."""
        self.eval()
        return torch.cat([self.body(chunk) for chunk in images.split(1024)]).double().numpy()

    @torch.no_grad()
    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """Share of images whose own label (or whose zero rotation) is recognised."""
        self.eval()
        target = torch.zeros_like(labels) if self.rotations else labels
        return float((self(images).argmax(1) == target).double().mean())


def _augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift by at most one pixel and add a little noise: keeps the features from memorising the training images."""
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    dy, dx = torch.randint(0, 3, (2,), generator=generator).tolist()
    height, width = images.shape[-2:]
    shifted = padded[..., dy : dy + height, dx : dx + width]
    return shifted + 0.1 * torch.randn(shifted.shape, generator=generator)


def train_feature_extractor(images: Tensor, labels: Tensor, num_classes: int, *, epochs: int = 30, seed: int = 0) -> FeatureExtractor:
    """The extractor every distance of one run uses: trained once, on training images alone, from a fixed seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = FeatureExtractor(images.shape[1], num_classes)
        generator = torch.Generator().manual_seed(seed)
        batches = max(1, len(images) // 64)
        optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-2)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=epochs * batches)
        network.train()
        for _ in range(epochs):
            for index in torch.randperm(len(images), generator=generator).chunk(batches):
                batch, target = _augment(images[index], generator), labels[index]
                if network.rotations:
                    target = torch.randint(0, 4, (len(index),), generator=generator)
                    batch = torch.stack([torch.rot90(image, int(k), (1, 2)) for image, k in zip(batch, target, strict=True)])
                optimizer.zero_grad()
                F.cross_entropy(network(batch), target, label_smoothing=0.1).backward()
                optimizer.step()
                scheduler.step()
    return network.eval()


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """``|mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2))`` of two feature sets [n, F], [m, F] in float64.

    The trace of the square root is the sum of singular values of ``A B^T / sqrt((n-1)(m-1))``, where A and B are the centred
    features: no square root of a matrix, stable when a covariance is singular.
    """
    for name, value in (("a", a), ("b", b)):
        if value.ndim != 2 or len(value) < 2:
            raise ValueError(f"{name} must be [n, features] with n >= 2, got shape {list(value.shape)}")
        if not np.isfinite(value).all():
            raise ValueError(f"{name} must be finite, got {int((~np.isfinite(value)).sum())} features that are not")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"b must have {a.shape[1]} features, as a has, got {b.shape[1]}")
    a, b = a.astype(np.float64), b.astype(np.float64)
    mean = a.mean(0) - b.mean(0)
    root_a = np.linalg.qr(a - a.mean(0), mode="r") / np.sqrt(len(a) - 1)  # cov_a = root_a^T root_a
    root_b = np.linalg.qr(b - b.mean(0), mode="r") / np.sqrt(len(b) - 1)
    cross = np.linalg.svd(root_a @ root_b.T, compute_uv=False).sum()
    return float(mean @ mean + (root_a**2).sum() + (root_b**2).sum() - 2 * cross)
