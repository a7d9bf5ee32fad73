"""Real images for the demo: scikit-learn's digits, or any folder of pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

SIGMA_DATA = 0.5
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})
MIN_IMAGES = 64
MIN_PER_CLASS = 3


@dataclass(frozen=True)
class ImageData:
    """Images at standard deviation ``SIGMA_DATA``, with what is needed to show them again.

    ``images`` float32 [N, C, H, W] contiguous, mean 0; ``labels`` int64 [N] in [0, len(class_names));
    a pixel in [0, 1] is ``images * scale + shift``.
    """

    name: str
    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    scale: float
    shift: float

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return tuple(self.images.shape[1:])

    def to_pixels(self, images: Tensor) -> Tensor:
        """Model space -> [0, 1], clipped."""
        return (images * self.scale + self.shift).clamp(0, 1)


def _standardise(name: str, pixels: Tensor, labels: Tensor, class_names: tuple[str, ...]) -> ImageData:
    mean, std = float(pixels.double().mean()), float(pixels.double().std())
    if std == 0:
        raise ValueError(f"data must hold images that differ, got '{name}', whose every pixel is {mean}")
    scale = std / SIGMA_DATA
    return ImageData(name, (pixels - mean) / scale, labels, class_names, scale, mean)


def load_digits() -> ImageData:
    """The 1,797 8x8 grey digits of scikit-learn (UCI optical recognition of handwritten digits), ten classes."""
    from sklearn.datasets import load_digits as sklearn_digits

    digits = sklearn_digits()
    pixels = torch.from_numpy(digits.images.astype(np.float32) / 16).unsqueeze(1)  # [N, 1, 8, 8]
    return _standardise("digits", pixels, torch.from_numpy(digits.target.astype(np.int64)), tuple("0123456789"))


def _pixels(path: Path, size: int) -> Tensor:
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            whole, white = _full_range(image, path)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"data must hold images that can be read, got '{path}': {error}") from error
    square = (
        np.asarray(ImageOps.fit(whole, (size, size), Image.Resampling.BOX), dtype=np.float32) / white
    )  # [size, size] or [size, size, 3]
    return torch.from_numpy(square).reshape(size, size, -1).permute(2, 0, 1).expand(3, size, size)


def _full_range(image: Image.Image, path: Path) -> tuple[Image.Image, float]:
    """The picture in a mode that holds all its values, and the value of white."""
    from PIL import Image

    # Pillow clips these to 255 on their way to RGB. A 16-bit PNG or PGM may come in mode I as well.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in {"PNG", "PPM"}):
        return Image.fromarray(np.asarray(image).astype(np.float32)), 65535.0
    if image.mode in {"I", "F"}:
        raise ValueError(f"data must hold images of 8 or 16 bits a channel, got '{path}' of 32, whose value of white is unknown")
    return image.convert("RGB"), 255.0


def load_folder(folder: str | Path, size: int = 16) -> ImageData:
    """Every image below ``folder``, cropped to its central square and resized to ``size`` x ``size``.

    Sub-folders are the classes; without any, all images are one class. Grey pictures become one channel.
    Raises ValueError if there are fewer than 64 images, or a class with fewer than three, or images beside class folders, or an image
    that cannot be read or has 32 bits a channel.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"data must be a folder of images, got '{folder}', which is no folder")
    if size < 8 or size % 4:
        raise ValueError(f"size must be a multiple of 4, at least 8, got {size}")
    classes = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    if len(paths) < MIN_IMAGES:
        raise ValueError(f"data must hold at least {MIN_IMAGES} images, got {len(paths)} in '{folder}'")
    top = [p.relative_to(folder).parts[0] for p in paths]
    used = [c for c in classes if c in set(top)]
    loose = sum(t not in set(used) for t in top)
    if used and loose:
        raise ValueError(f"data must hold class folders or images, got folders {used[:5]} and {loose} images beside them in '{folder}'")
    class_names = tuple(used) or (folder.resolve().name,)
    labels = torch.tensor([used.index(t) if used else 0 for t in top])
    counts = labels.bincount(minlength=len(class_names))
    fewest = int(counts.min())
    if fewest < MIN_PER_CLASS:
        name = class_names[int(counts.argmin())]
        raise ValueError(f"data must hold at least {MIN_PER_CLASS} images of each class, got {fewest} of '{name}'")
    pixels = torch.stack([_pixels(p, size) for p in paths])  # [N, 3, size, size]
    if bool((pixels == pixels[:, :1]).all()):
        pixels = pixels[:, :1].contiguous()
    return _standardise(folder.resolve().name, pixels, labels, class_names)


@dataclass(frozen=True)
class Split:
    """Indices into the data, each part sorted by class.

    ``train`` is what networks learn from, ``held_out`` what samples are judged against, and ``matched`` a part of ``train`` with as many
    images of every class as ``held_out``: Fréchet distances depend on n and on the label counts, so all that is compared has exactly these.
    """

    train: Tensor
    matched: Tensor
    held_out: Tensor


def stratified_split(labels: Tensor, seed: int, held_out_share: float = 1 / 3) -> Split:
    """A random third (rounded down) of every class is held out."""
    generator = torch.Generator().manual_seed(seed)
    train, matched, held_out = [], [], []
    for label in range(int(labels.max()) + 1):
        members = (labels == label).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        count = int(len(members) * held_out_share)
        held_out.append(members[:count])
        matched.append(members[count : 2 * count])
        train.append(members[count:])
    return Split(torch.cat(train), torch.cat(matched), torch.cat(held_out))
