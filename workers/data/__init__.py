"""One file per data set: ``data=digits`` is ``workers/data/digits.py``; its ``load(split, ...)`` gives ``Pictures``."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import Tensor

Split = Literal["train", "val"]


class DataError(Exception):
    """Pictures that cannot be found or read; one line that names the path and the mend."""


class Pictures(Protocol):
    """What a data set is to the rest of the code: labelled uint8 pictures of three channels."""

    classes: list[str]

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """((3, H, W) uint8, label)."""
        ...


def load(name: str, split: Split, root: Path | None, **options: Any) -> Pictures:
    """The pictures of one split. Raises DataError where they are not to be found."""
    pictures: Pictures = importlib.import_module(f"workers.data.{name}").load(split, root, **options)
    return pictures
