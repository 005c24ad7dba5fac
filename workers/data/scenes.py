"""Pictures with objects in them: what ``data=voc``, ``coco`` and ``digits_on_photos`` give instead of one label each.

Annotations are checked when they are listed. Boxes that reach beyond the picture are cut at its edge; boxes that are
outside of it, or have no area, are left out: both are counted, and told in the log. What cannot be meant is refused.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor
from torch.utils.data import DataLoader

from workers.data import DataError, Pictures, Unreadable, shown
from workers.data.decode import read_rgb
from workers.data.loader import Fold, InOrder, Shuffled, Transform, Views
from workers.transforms.objects import Objects

log = logging.getLogger(__name__)

RLE = dict[str, Any]  # {"size": [H, W], "counts": bytes}, as pycocotools has it


class Thing(NamedTuple):
    """One object as an annotation has it, its box as in ``Objects``."""

    label: int
    box: tuple[float, float, float, float]
    difficult: bool = False
    crowd: bool = False
    area: float | None = None
    segmentation: Any = None  # COCO's polygons or run lengths


class Scenes:
    """Pictures in files below ``root`` and their objects, packed such that loader processes share them.

    ``metric`` is the rule by which the data set's own program measures detections; ``known`` tells its pictures from
    those of another, for the log and the fingerprint.
    """

    def __init__(self, root: Path, classes: list[str], *, metric: str, masks: bool = False):
        self.root, self.classes, self.metric, self.has_masks = root, classes, metric, masks
        self.names: list[str] = []
        self.sizes: list[tuple[int, int]] = []  # height, width
        self.cut = self.left_out = 0
        self._rows: list[tuple[float, ...]] = []  # box, label, difficult, crowd, area
        self._starts = [0]
        self._shapes: list[bytes] = []  # JSON

    def add(self, name: str, height: int, width: int, things: list[Thing], where: str) -> None:
        """Raises DataError, naming ``where``, for a size or a box that cannot be meant."""
        if height < 1 or width < 1:
            raise DataError(f"{where}: a picture of {width} x {height} pixels; expected its width and height")
        for thing in things:
            left, top, right, bottom = thing.box
            if not all(map(math.isfinite, thing.box)) or right < left or bottom < top:
                raise DataError(
                    f"{where}: the box {_said(thing.box)} of a {self.classes[thing.label]}; expected left <= right and "
                    f"top <= bottom"
                )
            inside = (max(left, 0.0), max(top, 0.0), min(right, float(width)), min(bottom, float(height)))
            if inside[2] <= inside[0] or inside[3] <= inside[1]:
                self.left_out += 1
                continue
            self.cut += inside != thing.box
            area = (inside[2] - inside[0]) * (inside[3] - inside[1]) if thing.area is None else thing.area
            self._rows.append((*inside, thing.label, thing.difficult, thing.crowd, area))
            self._shapes.append(json.dumps(thing.segmentation).encode() if self.has_masks else b"")
        self.names.append(name)
        self.sizes.append((height, width))
        self._starts.append(len(self._rows))

    def sealed(self) -> Scenes:
        """After the last one. Raises DataError where there is none; says in the log what was changed."""
        if not self.names:
            raise DataError(f"{shown(self.root)}: no pictures are listed")
        self.rows = np.array(self._rows, np.float64).reshape(-1, 8)
        self.starts = np.array(self._starts)
        self.shapes, self.ends = b"".join(self._shapes), np.cumsum([0, *map(len, self._shapes)])
        self._rows, self._shapes = [], []
        empty = int((np.diff(self.starts) == 0).sum())
        log.info(
            "%s: %d pictures, %d objects of %d classes; %d pictures without any, %d boxes cut at the edge, "
            "%d outside or without area left out",
            shown(self.root), len(self), len(self.rows), len(self.classes), empty, self.cut, self.left_out,
        )  # fmt: skip
        return self

    @property
    def listed(self) -> bytes:
        return "\n".join(self.names).encode("utf-8", "surrogateescape") + self.rows.tobytes()

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """((picture (3, H, W) uint8, its objects), 0)."""
        image, name = self.picture(index), self.root / self.names[index]
        if image.shape[1:] != self.sizes[index]:
            (height, width), (said_height, said_width) = image.shape[1:], self.sizes[index]
            raise DataError(
                f"{shown(name)}: {width} x {height} pixels, but its annotation says {said_width} x {said_height}"
            )
        return (image, self.objects(index)), 0

    def picture(self, index: int) -> Tensor:
        return read_rgb(self.root / self.names[index])

    def objects(self, index: int, *, masks: bool | None = None) -> Objects:
        """Those of one picture; with masks where there are any, unless told otherwise."""
        rows = torch.from_numpy(self.rows[self.starts[index] : self.starts[index + 1]])
        found = Objects(
            rows[:, :4].float(), rows[:, 4].long(), rows[:, 5] > 0, rows[:, 6] > 0, areas=rows[:, 7].float()
        )
        if not (self.has_masks if masks is None else masks):
            return found
        decoded = [torch.from_numpy(coco_mask.decode(each)) for each in self.run_lengths(index)]
        height, width = self.sizes[index]
        return found._replace(masks=torch.stack(decoded) if decoded else torch.zeros(0, height, width).byte())

    def run_lengths(self, index: int) -> list[RLE]:
        """The masks of a picture's objects, compressed."""
        height, width = self.sizes[index]
        found = []
        for n in range(self.starts[index], self.starts[index + 1]):
            shape = json.loads(self.shapes[self.ends[n] : self.ends[n + 1]])
            found.append(run_length(shape, height, width, f"{self.root / self.names[index]}"))
        return found


def run_length(shape: Any, height: int, width: int, where: str) -> RLE:
    """COCO's polygons, or run lengths as numbers or text, compressed. Raises DataError."""
    try:
        if isinstance(shape, Mapping):
            if list(shape["size"]) != [height, width]:
                raise ValueError(f"a mask of {shape['size']}")
            if isinstance(shape["counts"], str):
                return {"size": [height, width], "counts": shape["counts"].encode()}
            compressed: RLE = coco_mask.frPyObjects(dict(shape), height, width)
            return compressed
        if not shape or any(len(polygon) < 6 or len(polygon) % 2 for polygon in shape):
            raise ValueError("a polygon of fewer than three points")
        whole: RLE = coco_mask.merge(coco_mask.frPyObjects(shape, height, width))
        return whole
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{where}: a segmentation that cannot be read ({error}); expected COCO's") from None


class Learnable:
    """The pictures that have something to learn from, without their crowds."""

    def __init__(self, scenes: Scenes):
        self.scenes, self.classes = scenes, scenes.classes
        good = np.add.reduceat(np.append(scenes.rows[:, 6] == 0, False), scenes.starts[:-1])
        good[np.diff(scenes.starts) == 0] = 0  # reduceat gives an empty part its first neighbour
        self.places = np.flatnonzero(good)
        if not len(self.places):
            raise DataError(f"{shown(scenes.root)}: no picture has an object to learn from")
        log.info("%d of %d pictures have objects to learn from", len(self.places), len(scenes))

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        (image, objects), label = self.scenes[int(self.places[index])]
        return (image, objects.where(~objects.crowd)), label


class Stream(Shuffled):
    """``batches`` batches as one pass: order after order of all pictures, dealt out to the ranks, none left out."""

    def __init__(self, length: int, batch_size: int, batches: int, **others: Any):
        super().__init__(length, batch_size, **others)
        self.batches = batches

    def __iter__(self) -> Iterator[tuple[int, int]]:
        drawn, order = -1, torch.zeros(0)
        for n in range(self.skip, len(self)):
            turn, place = divmod(n * self.world + self.rank, self.length)
            if turn != drawn:
                generator = torch.Generator().manual_seed(self.fold(self.seed, turn))
                drawn, order = turn, torch.randperm(self.length, generator=generator)
            yield turn, int(order[place])

    def __len__(self) -> int:
        return self.batches * self.batch_size


def streamed(
    pictures: Pictures,
    transform: Transform,
    batch_size: int,
    batches: int,
    *,
    seed: int,
    rank: int,
    world: int,
    fold: Fold,
    workers: int = 0,
) -> DataLoader[Any]:
    """Batches, as lists of (what ``transform`` gives, 0, index), as many as are asked for."""
    sampler = Stream(len(pictures), batch_size, batches, seed=seed, rank=rank, world=world, fold=fold)
    views = Views(pictures, transform, seed, fold)
    return DataLoader(views, batch_size, sampler=sampler, num_workers=workers, collate_fn=list)


def one_by_one(
    pictures: Pictures, transform: Transform, *, rank: int, world: int, fold: Fold, workers: int = 0
) -> DataLoader[Any]:
    """Every picture once over all ranks, alone: what is padded to another's size would be seen a little otherwise."""
    sampler = InOrder(len(pictures), rank=rank, world=world)
    return DataLoader(Views(pictures, transform, 0, fold), 1, sampler=sampler, num_workers=workers, collate_fn=list)


def read_text(path: Path, what: str) -> bytes:
    """Raises DataError, saying ``what`` was expected there."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{shown(path)}: {error.strerror}; expected {what}") from None


def check_there(root: Path, names: list[str]) -> None:
    """Raises Unreadable, naming the first, where pictures that are listed are not in their folders."""
    folders = {folder: {p.name for p in (root / folder).glob("*")} for folder in {str(Path(n).parent) for n in names}}
    missing = [name for name in names if Path(name).name not in folders[str(Path(name).parent)]]
    if missing:
        raise Unreadable(f"{shown(root / missing[0])}: no such file; {len(missing)} of {len(names)} are missing")


def _said(box: tuple[float, ...]) -> str:
    return "[" + ", ".join(f"{v:g}" for v in box) + "]"
