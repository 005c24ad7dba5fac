"""STL-10 (Coates et al., 2011), 96 x 96, read in its own binary files: 5,000 training, 8,000 test, 100,000 unlabelled.

A picture there is 3 x 96 x 96 bytes, channel by channel, each column by column; labels are 1 to 10.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from workers.data import UNLABELLED, DataError, Part, Split, needed, shown
from workers.data.decode import from_pixels
from workers.data.mapped import Mapped

FOLDER = "stl10_binary"
CLASSES = ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]
SIDE = 96


class Stl10:
    """Files one after the other; nothing is read before it is asked for."""

    def __init__(self, parts: list[tuple[Mapped, NDArray[np.int64]]]):
        self.parts, self.classes = parts, list(CLASSES)
        self.starts = np.cumsum([0, *(len(labels) for _, labels in parts)])
        self.labels = np.concatenate([labels for _, labels in parts])

    @property
    def listed(self) -> bytes:
        return b"".join(labels.tobytes() for _, labels in self.parts)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        part = int(np.searchsorted(self.starts, index, "right")) - 1
        pixels, labels = self.parts[part]
        at = index - int(self.starts[part])
        return from_pixels(np.ascontiguousarray(pixels.array[at].transpose(2, 1, 0))), int(labels[at])


def load(split: Split, root: Path | None = None, *, part: Part = "labelled", **_: Any) -> Stl10:
    """``part`` says what there is to train on; validation is the labelled test set, whatever it says."""
    root = needed(root, "stl10", f"{FOLDER}/train_X.bin and its neighbours (stl10_binary.tar.gz, unpacked) in it")
    if (root / FOLDER).is_dir():
        root = root / FOLDER
    parts = []
    if split == "val" or part != "unlabelled":
        name = "train" if split == "train" else "test"
        pixels = _pixels(root / f"{name}_X.bin")
        labels = Mapped(root / f"{name}_y.bin", pixels.shape[:1]).array.astype(np.int64) - 1
        if len(labels) and not 0 <= labels.min() <= labels.max() < len(CLASSES):
            raise DataError(f"{shown(root / f'{name}_y.bin')}: labels must be 1 to {len(CLASSES)}")
        parts.append((pixels, labels))
    if split == "train" and part != "labelled":
        pixels = _pixels(root / "unlabeled_X.bin")
        parts.append((pixels, np.full(pixels.shape[0], UNLABELLED, np.int64)))
    return Stl10(parts)


def _pixels(path: Path) -> Mapped:
    return Mapped(path, (-1, 3, SIDE, SIDE))
