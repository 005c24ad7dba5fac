"""Views of pictures: a few steps one after the other, batched, on whatever device the pictures are.

How to use it::

    view = views.build(96, **settings.view_options())      # contract.settings.views: augment=simclr, foveation, ...
    loader = pictures.shuffled(settings, train, views.Numbered(96, view.numbers, n_views=2), batch_size)
    for (images, u), labels, index in loader:              # uint8 (B, 3, 96, 96); float64 (B, 2, numbers)
        x = view.all(images.to(device), u, maps)           # (2 * B, 3, 96, 96) in [0, 1]: all first views, all second

Every picture brings its own uniform numbers, which the loader draws from the generator that it seeds with (seed, epoch,
index). ``draw`` makes parameters of them, on the CPU, and ``apply`` is a pure function of pictures and parameters; so a
view depends neither on loader processes, nor on the batch, nor on whether it is made before the upload or after.

Maps (saliency, certainties of a segmentation; (B, 1, H, W), row i of picture i) are read by ``draw`` on the CPU, and
``follow`` every crop, flip and warp: a later step sees them where the pixels have gone. ``view.needs_maps`` tells
whether there must be some. ``hide.EyeMovement`` has ``numbers``, ``draw``, ``apply`` and ``follow`` too, so Numbered
serves it, and gives (sample, target, mask) instead of a view.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .blur import GaussianBlur
from .color import ColorJitter
from .crops import ResizeCenterCrop
from .foveation import Foveation
from .magnification import Magnification
from .saliency import SalientWindow
from .step import Step
from .windows import Window

SIDE = 96  # of the published programs' pictures: lengths in pixels that are not given grow with the side


class Numbered:
    """For the loader: uint8 (3, h, w) -> (it, square, of ``size`` pixels a side; (n_views, numbers) uniform)."""

    def __init__(self, size: int, numbers: int, n_views: int = 1):
        self.resize, self.shape = ResizeCenterCrop(size, crop=1.0), (n_views, numbers)

    def __call__(self, image: Tensor) -> tuple[Tensor, Tensor]:
        return self.resize(image), torch.rand(self.shape, dtype=torch.float64)


class View:
    """Steps in turn. ``still_maps``: maps stay where they were when a step moves the pixels."""

    def __init__(self, steps: Sequence[Step], *, needs_maps: bool = False, still_maps: bool = False):
        self.steps, self.needs_maps, self.still_maps = tuple(steps), needs_maps, still_maps
        self.numbers = sum(step.numbers for step in self.steps)

    def draw(self, u: Tensor, size: tuple[int, int], maps: Tensor | None = None) -> list[Any]:
        """(B, numbers) uniform, the pictures' (H, W), their maps -> what every step drew, on the CPU."""
        if u.shape[1:] != (self.numbers,):
            raise ValueError(f"uniform numbers of shape {tuple(u.shape)}: expected (B, {self.numbers})")
        maps = maps.cpu() if maps is not None and self.needs_maps else None
        drawn: list[Any] = []
        for step, mine in zip(
            self.steps, torch.split(u.cpu(), [step.numbers for step in self.steps], dim=1), strict=True
        ):
            drawn.append(step.draw(mine, size, maps))
            size = step.result(size)
            if maps is not None and not self.still_maps:
                maps = step.follow(maps, drawn[-1])
        return drawn

    def apply(self, images: Tensor, draws: Sequence[Any]) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, 3, size, size)."""
        for step, drawn in zip(self.steps, draws, strict=True):
            images = step.apply(images, drawn)
        return images

    def follow(self, maps: Tensor, draws: Sequence[Any]) -> Tensor:
        for step, drawn in zip(self.steps, draws, strict=True):
            maps = step.follow(maps, drawn)
        return maps

    def __call__(self, images: Tensor, u: Tensor, maps: Tensor | None = None) -> Tensor:
        """Pictures, uint8 or in [0, 1], and their (B, numbers) -> (B, 3, size, size)."""
        images = to_unit(images)
        if images.shape[1] != 3:
            raise ValueError(f"pictures of {images.shape[1]} channels: views are made of 3 channels, red, green, blue")
        if maps is not None and len(maps) != len(images):
            raise ValueError(f"saliency: {len(maps)} maps for {len(images)} pictures")
        height, width = images.shape[-2:]
        return self.apply(images, self.draw(u, (height, width), maps))

    def all(self, images: Tensor, u: Tensor, maps: Tensor | None = None) -> Tensor:
        """Pictures and their (B, V, numbers) -> (V * B, 3, size, size), all first views first."""
        images = to_unit(images)
        return torch.cat([self(images, each, maps) for each in u.unbind(1)])


def to_unit(images: Tensor) -> Tensor:
    """uint8 as floating point in [0, 1]; that which is already is left alone."""
    return images if images.is_floating_point() else images.float().div_(255)


def build(
    size: int,
    *,
    crop: Literal["none", "random", "salient", "uniform"] = "random",
    min_crop: float = 0.08,
    hflip: float = 0.5,
    crop_temperature: float = 1.5,
    crop_border: int = 0,
    crop_pad: bool = False,
    published_crop: bool = False,
    jitter: float = 1.0,
    jitter_prob: float = 0.8,
    gray_prob: float = 0.2,
    foveation: bool = False,
    fovea_area: Sequence[float] = (0.01, 0.5),
    blur_growth: float = 0.06,
    ring_spacing: float = 0.2,
    fovea_border: int | None = None,
    blur: bool = True,
    magnification: Literal["none", "quadratic", "exponential"] = "none",
    fixations: Literal["uniform", "salient"] = "uniform",
    sample_temperature: float = 1.5,
    sample_border: int | None = None,
    cover_ratio: Sequence[float] = (0.05, 0.7),
    fov_size: float | None = None,
    fov_fall: float | None = None,
    slope: Sequence[float] = (1.5,),
    still_maps: bool = False,
) -> View:
    """The views of SimCLR and of its biological variants: crop, flip, jitter, gray, foveation, blur, magnification.

    Lengths in pixels that are None are the published ones for pictures of 96 pixels, in proportion. A range of one
    number is that number. ``crop=uniform`` is the control of ``salient``: centres anywhere, windows beyond the edges.
    """
    grown = size / SIDE
    steps: list[Step] = []
    if crop in ("salient", "uniform"):
        steps.append(
            SalientWindow(
                size,
                crop_temperature,
                crop_border,
                uniform=crop == "uniform",
                pad=crop_pad,
                published=published_crop,
                scale=(min_crop, 1.0),
                flip=hflip,
            )
        )
    else:
        steps.append(Window(size, (min_crop, 1.0) if crop == "random" else None, flip=hflip))
    strength = 0.8 * jitter
    steps.append(ColorJitter(strength, strength, strength, 0.2 * jitter, probability=jitter_prob, gray=gray_prob))
    if foveation:
        border = round(12 * grown) if fovea_border is None else fovea_border
        steps.append(Foveation(_range(fovea_area), blur_growth, ring_spacing, border))
    if blur:
        steps.append(GaussianBlur())
    if magnification != "none":
        steps.append(
            Magnification(
                magnification,
                _range(cover_ratio),
                fovea=20 * grown if fov_size is None else fov_size,
                fall=20 * grown if fov_fall is None else fov_fall,
                slope=_range(slope),
                border=round(16 * grown) if sample_border is None else sample_border,
                salient=fixations == "salient",
                temperature=sample_temperature,
            )
        )
    needs_maps = crop == "salient" or (magnification != "none" and fixations == "salient")
    return View(steps, needs_maps=needs_maps, still_maps=still_maps)


def _range(values: Sequence[float]) -> tuple[float, float]:
    return values[0], values[-1]
