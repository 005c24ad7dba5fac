"""One file per data set: ``data=digits`` is ``workers/data/digits.py``; its ``load(split, ...)`` gives ``Pictures``."""

from __future__ import annotations

import hashlib
import importlib
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import Tensor

Split = Literal["train", "val"]
Part = Literal["labelled", "unlabelled", "all"]
UNLABELLED = -1  # the label of a picture that has none


class DataError(Exception):
    """Pictures that cannot be found or read; one line that names the path and the mend."""

    def __str__(self) -> str:
        # of an error in a loader process torch makes a text that ends in "Traceback ... NAME: MESSAGE"
        return super().__str__().rpartition(f"{type(self).__name__}: ")[2].strip()


class Unreadable(DataError):
    """One picture that is missing or damaged, while the rest may be well: what ``data.on_error=skip`` skips."""


class Pictures(Protocol):
    """What a data set is to the rest of the code: labelled uint8 pictures of three channels."""

    classes: list[str]

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """((3, H, W) uint8, label); the label is -1 where there is none."""
        ...


def load(name: str, split: Split, root: Path | None, **options: Any) -> Pictures:
    """The pictures of one split. Raises DataError where they are not to be found."""
    pictures: Pictures = importlib.import_module(f"workers.data.{name}").load(split, root, **options)
    return pictures


def fingerprint(pictures: Pictures) -> str:
    """16 hex digits of what is listed: classes, number, file names with their labels. No picture is read."""
    listed = getattr(pictures, "listed", b"")
    return hashlib.sha256(repr((pictures.classes, len(pictures))).encode() + listed).hexdigest()[:16]


def shown(path: Path) -> str:
    """A path for a message: one line, whatever its name holds."""
    text = str(path)
    return text if text.isprintable() else ascii(text)


def needed(root: Path | None, name: str, layout: str) -> Path:
    """``root``, if it was given and is there. Raises DataError, which says how the files must lie."""
    if root is None:
        raise DataError(f"data={name}: needs data_path=ROOT, with {layout}")
    if not root.is_dir():
        raise DataError(f"data_path={shown(root)}: no such folder; expected {layout}")
    return root
