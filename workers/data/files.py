"""Pictures in files: what every data set that is a folder is made of. Listing one costs no ``stat`` per file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from workers.data import DataError, Split, shown
from workers.data.decode import SUFFIXES, read_rgb


class Files:
    """Labelled pictures below ``root``. The names lie in one block of bytes, which loader processes share."""

    def __init__(self, root: Path, names: Iterable[str], labels: Sequence[int] | NDArray[np.int64], classes: list[str]):
        self.root, self.classes = root, classes
        encoded = [os.fsencode(name) for name in names]
        self.labels = np.asarray(labels, np.int64)
        self.names = b"\0".join(encoded)
        self.ends = np.cumsum([len(name) + 1 for name in encoded], dtype=np.int64) - 1
        if len(self.ends) != len(self.labels):
            raise ValueError(f"{len(self.ends)} names, {len(self.labels)} labels")

    @property
    def listed(self) -> bytes:
        return self.names + self.labels.tobytes()

    def name_of(self, index: int) -> bytes:
        """What tells a picture from the others, wherever the folder lies."""
        start = self.ends[index - 1] + 1 if index else 0
        return self.names[start : self.ends[index]]

    def path(self, index: int) -> Path:
        return self.root / os.fsdecode(self.name_of(index))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return read_rgb(self.path(index)), int(self.labels[index])


def subfolders(folder: Path) -> list[str]:
    """Names of the folders in a folder, sorted; hidden ones are left out."""
    try:
        with os.scandir(folder) as entries:
            return sorted(e.name for e in entries if not e.name.startswith(".") and e.is_dir())
    except OSError as error:
        raise DataError(f"{shown(folder)}: {error.strerror}; expected a folder of class folders") from None


def pictures_in(folder: Path) -> list[str]:
    """Relative names of the pictures in a folder and in the folders below it, sorted; hidden ones are left out."""
    found, left = [], [""]
    while left:
        inside = left.pop()
        try:
            with os.scandir(folder / inside) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        left.append(f"{inside}{entry.name}/")
                    elif entry.name.lower().endswith(SUFFIXES):
                        found.append(inside + entry.name)
        except OSError as error:
            raise DataError(f"{shown(folder / inside)}: {error.strerror}") from None
    return sorted(found)


def class_folders(root: Path, split: Split, chosen: list[str] | None = None) -> Files:
    """``ROOT/SPLIT/CLASS/**``: a label is a class's place among ``chosen``, or among all training classes, sorted.

    A validation split may lack classes, unless they were chosen; one that training does not know is an error.
    """
    folder = root / split
    if not folder.is_dir():
        raise DataError(f"data_path={shown(root)}: has no folder {split!r}; expected {split}/CLASS/PICTURE.jpg")
    here = subfolders(folder)
    classes = chosen or (subfolders(root / "train") if (root / "train").is_dir() else here)
    if chosen and (missing := [name for name in chosen if name not in set(here)]):
        raise DataError(f"{shown(folder)}: {len(missing)} of {len(chosen)} class folders are missing: {_some(missing)}")
    if not chosen and (unknown := [name for name in here if name not in set(classes)]):
        raise DataError(f"{shown(folder)}: classes that train/ does not have: {_some(unknown)}")
    present = set(here)
    found = {name: pictures_in(folder / name) if name in present else [] for name in classes}
    if split == "train" and (empty := [name for name, pictures in found.items() if not pictures]):
        raise DataError(f"{shown(folder)}: class folders without pictures: {_some(empty)}")
    if not any(found.values()):
        raise DataError(f"{shown(folder)}: no pictures in class folders; expected {split}/CLASS/PICTURE.jpg")
    labels = np.repeat(np.arange(len(classes)), [len(pictures) for pictures in found.values()])
    names = (f"{name}/{picture}" for name, pictures in found.items() for picture in pictures)
    return Files(folder, names, labels, list(classes))


def file_name(name: str, source: Path) -> str:
    """``name``, if it is the bare name of a file. Raises DataError: an annotation file cannot point elsewhere."""
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise DataError(f"{shown(source)}: {name!r} is not the name of a file beside it")
    return name


def _some(names: list[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (", ..." if len(names) > 5 else "")
