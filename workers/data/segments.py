"""Masks of the main object beside the pictures of a data set: certainties in [0, 1], kept as a byte a pixel.

A folder holds either ``segments.npy`` (N, h, w) uint8 with ``kept.npy`` (N,) bool, which ``worker=segment_objects``
makes, or the published layout: ``segmentation_INDEX.pt``, a float (h, w) tensor for each picture that has one. INDEX is
the place in the training split as it is loaded.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workers.data import DataError, Pictures, Unreadable, shown
from workers.transforms.crops import ResizeCenterCrop

FOLDER, MASKS, KEPT = "segments", "segments.npy", "kept.npy"
PUBLISHED = re.compile(r"segmentation_(\d+)\.pt")


class Segments:
    """The masks of a folder, or of a run that made them. ``present`` (n,) bool says which pictures have one."""

    def __init__(self, path: Path, number: int):
        folder = path / FOLDER if (path / FOLDER).is_dir() else path
        if not folder.is_dir():
            raise DataError(f"segments_path={shown(path)}: no such folder")
        self.folder = folder
        self.masks: NDArray[np.uint8] | None = None
        if (folder / MASKS).is_file() and (folder / KEPT).is_file():
            try:
                self.masks = np.load(folder / MASKS, mmap_mode="r")
                self.present = np.load(folder / KEPT)
            except (ValueError, OSError, EOFError) as error:
                raise DataError(f"{shown(folder)}: cannot be read ({error})") from None
            if self.masks.ndim != 3 or self.masks.dtype != np.uint8 or self.present.shape != self.masks.shape[:1]:
                raise DataError(
                    f"{shown(folder / MASKS)}: {self.masks.dtype} {self.masks.shape}, {KEPT} {self.present.shape}; "
                    f"expected uint8 (N, h, w) and (N,)"
                )
            if len(self.masks) != number:
                raise DataError(f"segments_path={shown(path)}: of {len(self.masks)} pictures, but there are {number}")
        else:
            self.present = np.zeros(number, bool)
            places = [int(m[1]) for each in os.scandir(folder) if (m := PUBLISHED.fullmatch(each.name))]
            if not places:
                raise DataError(
                    f"segments_path={shown(path)}: no masks in it; expected {MASKS} with {KEPT}, or segmentation_0.pt "
                    f"and others"
                )
            if max(places) >= number:
                raise DataError(
                    f"segments_path={shown(path)}: has segmentation_{max(places)}.pt, but there are {number} pictures"
                )
            self.present[places] = True
        if not self.present.any():
            raise DataError(f"segments_path={shown(path)}: no picture has a mask; the filter kept none")

    def mask(self, index: int, side: int) -> Tensor:
        """(1, side, side) uint8. Raises DataError where it has another size, Unreadable where it shows no object."""
        if self.masks is not None:
            where = f"{shown(self.folder / MASKS)}[{index}]"
            found = torch.from_numpy(np.array(self.masks[index]))
        else:
            path = self.folder / f"segmentation_{index}.pt"
            where, found = shown(path), read_published(path)
        if found.shape != (side, side):
            size = " x ".join(map(str, found.shape))
            raise DataError(f"{where}: {size} pixels, but image_size={side}; make masks of that size")
        if int(found.min()) == int(found.max()):
            raise Unreadable(f"{where}: {int(found.min()) / 255:g} everywhere, so it shows no object; delete it")
        return found[None]


def read_published(path: Path) -> Tensor:
    """``segmentation_INDEX.pt`` -> (h, w) uint8."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file may raise anything
        raise Unreadable(f"{shown(path)}: cannot be read ({first_line(error)})") from None
    if not isinstance(found, Tensor) or found.ndim != 2 or not found.is_floating_point():
        raise Unreadable(f"{shown(path)}: expected a float tensor (h, w)")
    if not 0 <= float(found.min()) <= float(found.max()) <= 1:
        raise Unreadable(f"{shown(path)}: from {found.min():g} to {found.max():g}; expected certainties in [0, 1]")
    return as_bytes(found)


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def as_bytes(mask: Tensor) -> Tensor:
    """[0, 1] -> 0 to 255."""
    return (mask * 255).round().to(torch.uint8)


class Segmented:
    """Square pictures with the mask as a fourth channel: (4, side, side) uint8, and the label.

    A picture without a mask has one of ones; with ``remove_missing`` it is left out, the order of the others stays.
    """

    def __init__(self, pictures: Pictures, segments: Segments, side: int, *, remove_missing: bool = False):
        self.pictures, self.segments, self.side = pictures, segments, side
        self.classes, self.resize = pictures.classes, ResizeCenterCrop(side, crop=1.0)
        self.chosen = np.flatnonzero(segments.present) if remove_missing else np.arange(len(pictures))
        with contextlib.suppress(Unreadable):  # that of another is seen when it is read
            segments.mask(int(np.flatnonzero(segments.present)[0]), side)

    @property
    def listed(self) -> bytes:
        marks: bytes = self.segments.present.tobytes()
        return bytes(getattr(self.pictures, "listed", b"")) + marks

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        index = int(self.chosen[place])
        image, label = self.pictures[index]
        image = self.resize(image)
        has = bool(self.segments.present[index])
        mask = self.segments.mask(index, self.side) if has else torch.full_like(image[:1], 255)
        return torch.cat([image, mask]), label


def enough(masks: Tensor, min_pixels: int, min_confidence: float) -> Tensor:
    """Certainties (B, h, w) -> (B,) bool: the published filter, and nothing constant."""
    confident = (masks >= min_confidence).sum((1, 2))
    return (confident >= min_pixels) & (masks.amax((1, 2)) > masks.amin((1, 2)))
