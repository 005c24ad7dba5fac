"""Any folder of class folders: ``ROOT/train/CLASS/*.jpg`` and ``ROOT/val/CLASS/*.jpg``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import Tensor

from workers.data import DataError, Split
from workers.data.decode import SUFFIXES, read_rgb


class ImageFolder:
    """Files in the order of their names; a class is a folder, its label the folder's place in the sorted list."""

    def __init__(self, folder: Path):
        self.folder = folder
        with os.scandir(folder) as entries:
            self.classes = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
        self.files = [
            (str(path.relative_to(folder)), label)
            for label, name in enumerate(self.classes)
            for path in sorted((folder / name).rglob("*"))
            if path.suffix.lower() in SUFFIXES
        ]
        if not self.files:
            raise DataError(f"{folder}: no pictures in class folders; expected {folder}/CLASS/PICTURE.jpg")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        name, label = self.files[index]
        return read_rgb(self.folder / name), label


def load(split: Split, root: Path | None = None, **_: Any) -> ImageFolder:
    if root is None:
        raise DataError("data=imagefolder: needs data_path=ROOT, with ROOT/train/CLASS/*.jpg and ROOT/val/CLASS/*.jpg")
    folder = root / split
    if not folder.is_dir():
        raise DataError(f"data_path={root}: has no folder {split!r}; expected {folder}/CLASS/PICTURE.jpg")
    return ImageFolder(folder)
