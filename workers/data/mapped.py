"""Big files of bytes that are read where they lie, by as many processes as there are."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workers.data import DataError, shown


class Mapped:
    """A file as a uint8 array of ``shape``, whose first size may be -1. Travels to other processes as a path."""

    def __init__(self, path: Path, shape: tuple[int, ...]):
        try:
            size = path.stat().st_size
        except OSError as error:
            raise DataError(f"{shown(path)}: {error.strerror}") from None
        one = int(np.prod(shape[1:], dtype=np.int64))
        if size % one or (shape[0] >= 0 and size != one * shape[0]):
            expected = f"a multiple of {one}" if shape[0] < 0 else str(one * shape[0])
            raise DataError(
                f"{shown(path)}: has {size} bytes, expected {expected}; the file is cut or not what it says"
            )
        self.path, self.shape = path, (size // one, *shape[1:])

    @functools.cached_property
    def array(self) -> NDArray[np.uint8]:
        if not self.shape[0]:
            return np.zeros(self.shape, np.uint8)  # an empty file cannot be mapped
        return np.memmap(self.path, np.uint8, mode="r", shape=self.shape)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "shape": self.shape}
