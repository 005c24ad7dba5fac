"""What of a picture is hidden, in pixels, and what is shown there instead (Weiler et al., arXiv 2404.08526).

Masks are bool, (B, 1, H, W) or (1, 1, H, W), True where hidden.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from . import pyramid
from .blur import blur
from .color import ColorJitter, Jitter
from .draws import check_range, integers, permutation, pick
from .windows import Cut, Window

BLUR_SIZE, BLUR_SIGMA = 33, 100.0  # practically the mean of a square

Mode = Literal["none", "random_patches", "periphery", "foveate"]
BlurMode = Literal["off", "replace", "published"]


def patches(order: Tensor, hidden: int, patch: int, height: int, width: int) -> Tensor:
    """The first ``hidden`` squares of ``patch`` pixels in ``order`` (B, N), counted along the rows."""
    rows, columns = height // patch, width // patch
    if order.shape[1] != rows * columns or height % patch or width % patch:
        raise ValueError(
            f"patches of {patch}: pictures of {height} x {width} have {height / patch:g} x {width / patch:g}, "
            f"not whole ones, {order.shape[1]} in all"
        )
    cells = torch.zeros(order.shape, dtype=torch.bool, device=order.device)
    cells.scatter_(1, order[:, :hidden], value=True)
    cells = cells.view(-1, 1, rows, 1, columns, 1).expand(-1, 1, rows, patch, columns, patch)
    return cells.reshape(-1, 1, height, width)


def disc_radius(ratio: float, height: int, width: int) -> int:
    """Of a disc that leaves ``ratio`` of the picture hidden."""
    check_range("ratio", ratio, ratio, 0, 1)
    return int(math.sqrt(height * width * (1 - ratio) / math.pi))


def periphery(radius: int, height: int, width: int, centres: Tensor | None = None) -> Tensor:
    """What lies outside discs around ``centres`` (B, 2) row, column; None: around the middle, (1, 1, H, W)."""
    centres = torch.tensor([[height // 2, width // 2]]) if centres is None else centres
    row, column = centres[:, :, None, None].unbind(1)
    y = torch.arange(height, device=centres.device)[:, None] - row
    x = torch.arange(width, device=centres.device) - column
    return (y**2 + x**2 > radius**2)[:, None]


def fill_mean(images: Tensor, mask: Tensor) -> Tensor:
    """The hidden part in the colour of the picture's mean, the hidden part included."""
    return shown(images, images.mean((2, 3), keepdim=True), mask)


def shown(images: Tensor, instead: Tensor, mask: Tensor) -> Tensor:
    """``torch.where(mask, instead, images)``, several times as fast on a CPU."""
    return torch.lerp(images, instead, mask.to(images.dtype))


def heavy_blur(images: Tensor) -> Tensor:
    return blur(images, torch.full((len(images),), BLUR_SIGMA), BLUR_SIZE)


class Masked(NamedTuple):
    sample: Tensor  # (B, 3, H, W), what is seen
    target: Tensor  # (B, 3, H, W), what is to be predicted
    mask: Tensor  # (B, 1, H, W) bool, where


class Gaze(NamedTuple):
    cut: Cut
    jitter: Jitter | None
    order: Tensor  # (B, patches), the first of which are hidden
    centres: Tensor  # (B, 2) row, column of the second disc


class EyeMovement:
    """The whole of what a picture goes through before the network: crop, jitter, blur, mask, fill.

    ``crop``: a random window, which stands for the eye movement. ``ratio`` of the picture is hidden; ``foveate`` and
    ``none`` have none. ``attention``: a second disc is visible, at a random place, or at the most certain place of a
    segmentation map. ``blur``: the hidden part is a heavy blur instead of the mean colour; ``published`` does what the
    released program does, which overwrites that with the mean colour.
    """

    def __init__(
        self,
        size: int,
        mode: Mode = "random_patches",
        ratio: float = 0.6,
        *,
        crop: bool = True,
        jitter: bool = False,
        blur: BlurMode = "off",
        attention: bool = False,
        patch: int = 8,
        antialias: bool = False,
        clamp_weights: bool = False,
    ):
        check_range("ratio", ratio, ratio, 0, 1)
        self.size, self.mode, self.blur, self.attention, self.patch = size, mode, blur, attention, patch
        self.antialias, self.clamp_weights = antialias, clamp_weights
        self.window = Window(size, (0.08, 1.0) if crop else None, flip=0)
        self.jitter = ColorJitter(gray=0) if jitter else None
        self.patches, self.hidden, self.radius = 0, 0, 0
        if mode == "random_patches":
            if size % patch:
                raise ValueError(f"patch={patch}: must divide the {size} pixels of a side")
            self.patches = (size // patch) ** 2
            self.hidden = int(self.patches * ratio)
            if not 0 < self.hidden < self.patches:
                raise ValueError(f"ratio={ratio}: hides {self.hidden} of {self.patches} patches; hide some, not all")
        elif mode == "periphery":
            self.radius = disc_radius(ratio, size, size)
            middle = size // 2
            if self.radius < 1 or self.radius**2 >= 2 * middle**2:
                raise ValueError(
                    f"ratio={ratio}: a disc of radius {self.radius} shows nothing, or all, of {size} pixels"
                )
        if attention and mode != "periphery":
            raise ValueError(f"attention: a second disc, of mode periphery only, not of {mode}")
        self.numbers = self.window.numbers + (self.jitter.numbers if self.jitter else 0) + self.patches + 2

    def draw(self, u: Tensor, size: tuple[int, int], maps: Tensor | None = None) -> Gaze:
        """``u`` (B, numbers); ``maps`` (B, 1, H, W), certainties of a segmentation, are read with ``attention``."""
        u, rest = torch.split(u, [self.window.numbers, u.shape[1] - self.window.numbers], dim=1)
        window = self.window.draw(u, size)
        jitter = None
        if self.jitter is not None:
            jitter = self.jitter.draw(rest[:, : self.jitter.numbers], size)
            rest = rest[:, self.jitter.numbers :]
        row, column = (integers(rest[:, i], 0, self.size) for i in (-2, -1))
        if self.attention and maps is not None:
            certain = self.window.apply(maps, window).flatten(1)
            place = pick(rest[:, -1:], certain == certain.amax(1, keepdim=True))[:, 0]
            row, column = place // self.size, place % self.size
        return Gaze(window, jitter, permutation(rest[:, :-2]), torch.stack([row, column], dim=1))

    def apply(self, images: Tensor, draws: Gaze) -> Masked:
        target = self.window.apply(images, draws.cut)
        if self.jitter is not None and draws.jitter is not None:
            target = self.jitter.apply(target, draws.jitter)
        sample, mask = self.see(target, draws)
        return Masked(sample, target, mask.expand(len(target), -1, -1, -1))

    def see(self, target: Tensor, draws: Gaze) -> tuple[Tensor, Tensor]:
        """Of pictures that have been cropped: what is seen, and what is hidden."""
        mask, sample = self.mask(draws).to(target.device), target
        if self.mode == "foveate":
            sample, mask = pyramid.foveate(target, antialias=self.antialias, clamp_weights=self.clamp_weights)
        if self.blur != "off":
            sample = shown(sample, heavy_blur(target), mask)
        if self.mode in ("random_patches", "periphery") and self.blur != "replace":
            sample = fill_mean(sample, mask)
        return sample, mask

    def mask(self, draws: Gaze) -> Tensor:
        """(B or 1, 1, H, W); in mode ``none`` all of it, for there all is to be predicted."""
        if self.mode == "random_patches":
            mask = patches(draws.order, self.hidden, self.patch, self.size, self.size)
        elif self.mode == "periphery":
            mask = periphery(self.radius, self.size, self.size)
        else:
            return torch.ones(1, 1, self.size, self.size, dtype=torch.bool)
        if self.attention:
            mask = mask & periphery(self.radius, self.size, self.size, draws.centres)
        return mask

    def follow(self, maps: Tensor, draws: Gaze) -> Tensor:
        """Maps (B, 1, H, W), through the same crop."""
        return self.window.apply(maps, draws.cut)
