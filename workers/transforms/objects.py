"""Objects in a picture, and what resizing and mirroring the picture does to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F


class Objects(NamedTuple):
    """n objects. Boxes are (left, top, right, bottom) in pixels from 0, the right and bottom edges not included."""

    boxes: Tensor  # (n, 4) float32
    labels: Tensor  # (n,) from 0
    difficult: Tensor  # (n,) bool: learned from, not measured (VOC)
    crowd: Tensor  # (n,) bool: many objects in one box, neither learned from nor measured (COCO)
    areas: Tensor  # (n,) float32, of the masks where there are any
    masks: Tensor | None = None  # (n, H, W) uint8 of 0 and 1

    def where(self, chosen: Tensor) -> Objects:
        """Those of a mask (n,) or of indices."""
        masks = None if self.masks is None else self.masks[chosen]
        boxes, labels, difficult, crowd, areas = (each[chosen] for each in self[:5])
        return Objects(boxes, labels, difficult, crowd, areas, masks)


class Seen(NamedTuple):
    """A picture as the network gets it, and where that is from."""

    image: Tensor  # (3, h, w) uint8
    objects: Objects  # boxes in its pixels; masks in those of the file, mirrored with it
    size: tuple[int, int]  # height and width in the file


class Shorter:
    """The shorter side becomes one of ``sides``, drawn evenly, unless the longer one would be above ``longest``;
    mirrored with a probability of ``hflip``. Detectron2's rule (ResizeShortestEdge); bilinear with anti-aliasing.
    """

    def __init__(self, sides: Sequence[int], longest: int, hflip: float = 0.0):
        self.sides, self.longest, self.hflip = list(sides), longest, hflip

    def __call__(self, scene: tuple[Tensor, Objects]) -> Seen:
        image, objects = scene
        height, width = image.shape[-2:]
        side = self.sides[int(torch.randint(len(self.sides), ()))]
        mirrored = bool(torch.rand(()) < self.hflip)
        new = self.size(height, width, side)
        image = F.resize(image, list(new), InterpolationMode.BILINEAR, antialias=True)
        scale = torch.tensor([new[1] / width, new[0] / height] * 2)
        boxes, masks = objects.boxes * scale, objects.masks
        if mirrored:
            image = image.flip(-1)
            boxes = torch.stack([new[1] - boxes[:, 2], boxes[:, 1], new[1] - boxes[:, 0], boxes[:, 3]], dim=1)
            masks = None if masks is None else masks.flip(-1)
        return Seen(image.contiguous(), objects._replace(boxes=boxes, masks=masks), (height, width))

    def size(self, height: int, width: int, side: int) -> tuple[int, int]:
        """(height, width) that a picture gets."""
        scale = side / min(height, width)
        if scale * max(height, width) > self.longest:
            scale = self.longest / max(height, width)
        return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))
