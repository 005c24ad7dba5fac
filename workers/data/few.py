"""A few labelled pictures of every class: low-shot splits that depend on a seed and on the pictures alone."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from workers.data import UNLABELLED, DataError, Pictures


class Few:
    """The pictures of another set at ``chosen`` places, in its order."""

    def __init__(self, pictures: Pictures, chosen: NDArray[np.int64], labels: NDArray[np.int64]):
        self.pictures, self.chosen, self.labels = pictures, chosen, labels
        self.classes = pictures.classes

    @property
    def listed(self) -> bytes:
        return getattr(self.pictures, "listed", b"") + self.chosen.tobytes()

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.pictures[int(self.chosen[index])]


def spread(pictures: Pictures, number: int) -> Pictures:
    """At most ``number`` pictures, at equal distances: of every class about as large a share."""
    if number >= len(pictures):
        return pictures
    chosen = np.arange(number, dtype=np.int64) * len(pictures) // number
    return Few(pictures, chosen, labels_of(pictures, chosen))


def few(pictures: Pictures, *, shots: int | None = None, fraction: float | None = None, seed: int = 0) -> Pictures:
    """``shots`` pictures of every class, or the ``fraction`` of every class (rounded, at least one); None: all of them.

    Which ones depends on (seed, class, name of the picture; its place where the data set has no names), so ranks,
    loader processes and the order of listing do not matter, and fewer shots of a seed are a part of more. Raises
    DataError, in one line, for classes with too few pictures.
    """
    if shots is None and fraction is None:
        return pictures
    if shots is not None and fraction is not None:
        raise ValueError(f"shots={shots} and fraction={fraction}: give one of the two")
    labels = labels_of(pictures)
    count = np.bincount(labels[labels != UNLABELLED], minlength=len(pictures.classes))
    if shots is not None:
        wanted = np.full(len(count), shots)
    else:
        assert fraction is not None
        wanted = np.maximum(1, np.rint(count * fraction).astype(np.int64))
    if short := [pictures.classes[c] for c in np.flatnonzero(count < wanted)]:
        asked = f"shots={shots}" if shots is not None else f"fraction={fraction}"
        named = ", ".join(map(repr, short[:5])) + (", ..." if len(short) > 5 else "")
        raise DataError(
            f"{asked}: {len(short)} of {len(count)} classes have too few pictures ({named}); "
            f"the smallest class has {count.min()}"
        )
    names = _names(pictures)
    chosen = []
    for label in range(len(count)):
        places = np.flatnonzero(labels == label)
        lot = sorted((_lot(seed, pictures.classes[label], names(int(place))), int(place)) for place in places)
        chosen += [place for _, place in lot[: wanted[label]]]
    found = np.array(sorted(chosen), np.int64)
    return Few(pictures, found, labels[found])


def labels_of(pictures: Pictures, places: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
    """All labels (n,), or those at ``places``; without reading pictures, for data sets that have a list of them."""
    places = np.arange(len(pictures), dtype=np.int64) if places is None else places
    known: Any = getattr(pictures, "labels", None)
    if known is None:
        return np.array([pictures[int(index)][1] for index in places], np.int64)
    return np.asarray(known.numpy() if isinstance(known, Tensor) else known, np.int64)[places]


def same_classes(train: Pictures, val: Pictures) -> None:
    """Raises DataError, in one line, where two splits do not have the same classes."""
    if len(train.classes) != len(val.classes):
        raise DataError(
            f"train has {len(train.classes)} classes, val has {len(val.classes)}: a classifier needs the same ones"
        )


def _names(pictures: Pictures) -> Any:
    """Place -> the bytes that stand for a picture, the same wherever the set lies."""
    name = getattr(pictures, "name_of", None)
    return name or (lambda place: str(place).encode())


def _lot(seed: int, name: str, picture: bytes) -> bytes:
    return hashlib.blake2b(repr((seed, name)).encode() + b"\0" + picture, digest_size=8).digest()
