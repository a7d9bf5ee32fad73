"""Progress bars, where they are asked for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")


def progress_bar(items: Sequence[T], enabled: bool, description: str) -> Iterable[T]:
    """`items`, with a bar on stderr when enabled."""
    if not enabled:
        return items
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("progress=True needs tqdm: pip install 'fastdiff-kernels[train]'") from error
    return tqdm(items, desc=description)
