"""Decoded pictures, kept: decoding is four fifths of what a loader does. A cache never changes a pixel.

``CACHE/KEY/`` holds ``pixels.bin`` (H x W x 3 bytes, picture after picture), ``index.npy`` (n, 3) with the start,
height and width of each (height 0: it could not be read), and ``about.json`` for people. The key is made of the folder
of the pictures, their names and labels, and the size: a picture that is replaced under its own name is not noticed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from workers.data import DataError, Pictures, Unreadable, fingerprint, shown
from workers.data.decode import from_pixels, shrink
from workers.data.files import Files
from workers.data.mapped import Mapped

log = logging.getLogger(__name__)

FORMAT = 1
PIXELS, INDEX, ABOUT = "pixels.bin", "index.npy", "about.json"
PROGRESS_S = 20.0


class Shrunk:
    """Pictures whose shorter side is at most ``side``."""

    def __init__(self, pictures: Pictures, side: int | None):
        self.pictures, self.side, self.classes = pictures, side, pictures.classes
        for known in ("labels", "name_of"):
            if hasattr(pictures, known):
                setattr(self, known, getattr(pictures, known))

    @property
    def listed(self) -> bytes:
        return getattr(self.pictures, "listed", b"")

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.pictures[index]
        return image if self.side is None else shrink(image, self.side), label


class Decoded:
    """The pictures of a cache, with the labels of the files that they were read from."""

    def __init__(self, folder: Path, files: Files):
        self.folder, self.files, self.classes = folder, files, files.classes
        self.labels, self.name_of = files.labels, files.name_of
        try:
            self.index: NDArray[np.int64] = np.load(folder / INDEX)
            total = int(self.index.prod(1, where=[False, True, True]).sum()) * 3
            self.pixels = Mapped(folder / PIXELS, (total,))
            if self.index.shape != (len(files), 3):
                raise ValueError(f"an index of {self.index.shape} for {len(files)} pictures")
        except (OSError, ValueError, DataError) as error:
            raise DataError(f"{shown(folder)}: a damaged cache ({error}); delete this folder") from None

    @property
    def listed(self) -> bytes:
        return self.files.listed

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        start, height, width = self.index[index].tolist()
        if not height:
            raise Unreadable(f"{shown(self.files.path(index))}: was not readable when {shown(self.folder)} was made")
        pixels = np.array(self.pixels.array[start : start + height * width * 3])
        return from_pixels(pixels.reshape(height, width, 3)), int(self.files.labels[index])


def decoded(files: Files, side: int | None, cache: Path, *, on_error: str = "stop", workers: int = 0) -> Decoded:
    """The pictures of ``cache``, which is made first if need be: by one process, while others wait.

    A build that dies leaves nothing that is used; the next one begins again. Raises DataError where a picture cannot be
    read (``on_error="stop"``) or the disk is too small.
    """
    what = f"{FORMAT} {files.root.resolve()} {fingerprint(files)} {side}"
    folder = cache / hashlib.sha256(os.fsencode(what)).hexdigest()[:16]
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_suffix(".lock"))
        try:
            lock.acquire(blocking=False)
        except Timeout:
            log.info("%s: another process makes this cache; waiting for it", shown(folder))
            lock.acquire(poll_interval=0.5)
        try:
            if folder not in cache.iterdir():  # a look that NFS does not answer from memory
                _build(Shrunk(files, side), files, folder, on_error, workers)
        finally:
            lock.release()
    log.info("%s: decoded pictures of %s", shown(folder), shown(files.root))
    return Decoded(folder, files)


def _build(pictures: Shrunk, files: Files, folder: Path, on_error: str, workers: int) -> None:
    part = folder.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)  # of a build that was killed
    part.mkdir()
    try:
        index = np.zeros((len(files), 3), np.int64)
        with (part / PIXELS).open("wb") as file:
            begun = told = time.monotonic()
            loader = DataLoader(_Reading(pictures, on_error), batch_size=None, num_workers=workers)
            for n, pixels in enumerate(loader):
                index[n] = file.tell(), *pixels.shape[:2]
                file.write(pixels.numpy().data)
                if n == 99 or time.monotonic() - told > PROGRESS_S:
                    told = time.monotonic()
                    _tell(n + 1, len(files), file.tell(), told - begun, folder)
            file.flush()
            os.fsync(file.fileno())
        np.save(part / INDEX, index)
        bad = [str(files.path(int(n))) for n in np.flatnonzero(index[:, 1] == 0)]
        about = {"pictures": str(files.root), "number": len(files), "shorter_side": pictures.side, "unreadable": bad}
        (part / ABOUT).write_text(json.dumps(about, indent=1))
        part.rename(folder)
    except OSError as error:
        raise DataError(f"data.cache={shown(folder.parent)}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


class _Reading(Dataset[Any]):
    """(H, W, 3) pictures in order; an empty one in place of one that cannot be read, if that is to be skipped."""

    def __init__(self, pictures: Shrunk, on_error: str):
        self.pictures, self.on_error = pictures, on_error

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Tensor:
        try:
            return self.pictures[index][0].permute(1, 2, 0).contiguous()
        except Unreadable:
            if self.on_error == "stop":
                raise
            return torch.zeros(0, 0, 3, dtype=torch.uint8)


def _tell(n: int, of: int, written: int, seconds: float, folder: Path) -> None:
    """A line of progress. Raises DataError as soon as it shows that the disk will not hold the rest."""
    gigabytes = written / n * of / 1e9
    free = shutil.disk_usage(folder.parent).free / 1e9
    if gigabytes - written / 1e9 > free:
        raise DataError(
            f"data.cache={shown(folder.parent)}: needs about {gigabytes:.3g} GB, {free:.3g} GB are left; "
            "set data.shorter_side, or another folder"
        )
    # a warning: the process that happens to make the cache need not be rank 0, which alone tells more than warnings
    log.warning("%s: %d of %d pictures, %.0f/s, about %.3g GB in all", shown(folder), n, of, n / seconds, gigabytes)
