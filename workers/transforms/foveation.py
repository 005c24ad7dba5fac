"""Foveation by a blur that grows with the distance from a fixation (Wang et al., SVRHM 2021, arXiv 2112.07173).

After the pooling regions of Freeman and Simoncelli (2011): rings of equal width in log eccentricity with raised-cosine
borders, whose weights sum to 1. Each ring is blurred with a Gaussian in proportion to the eccentricity of its centre.
At any pixel at most two rings have a weight, so each is blurred only where it is seen, and all rings of all pictures
that need kernels of about one size are blurred together.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .blur import gaussians, separable
from .draws import check_range, integers, uniform
from .step import Step

FAR = 0.75  # of a ring's spacing: where its weight ends
KERNEL, BOX = 8, 32  # kernels and boxes are padded to multiples of these
PAIRS = {"cpu": 16, "cuda": 2048}  # of picture and ring, blurred at once


class Fovea(NamedTuple):
    fixations: Tensor  # (B, 2) row, column
    radius: Tensor  # (B,) of the part that stays sharp, in pixels


def raised_cosine(x: Tensor) -> Tensor:
    """1 up to 1/4, then cos^2, 0 from 3/4; b(x) + b(x - 1) = 1 for x in [0, 1]."""
    return x.abs().mul_(-2).add_(1.5).clamp_(0, 1).mul_(math.pi / 2).sin_().square_()  # exactly 0 outside


def degrees(pixels: Tensor, height: int, width: int) -> Tensor:
    """Pixels as degrees of the visual field, if the picture's diagonal is 20 of them."""
    return pixels * 20 / math.hypot(height, width)


def rings_to_corner(fixations: Tensor, radius: Tensor, spacing: Tensor, height: int, width: int) -> Tensor:
    """How many rings reach the farthest corner, and one more (B,): as for random fixations."""
    row, column = fixations.double().unbind(1)
    far = torch.hypot(row.maximum(height - 1 - row), column.maximum(width - 1 - column))
    return ((far / radius).log() / spacing + 1).ceil().clamp(min=0).long()


def rings_at(fixations: Tensor, radius: Tensor, spacing: Tensor, height: int, width: int) -> Tensor:
    """The same in the published function for given fixations, which confuses height and width."""
    row, column = fixations.double().unbind(1)
    far = torch.hypot(row.maximum(width - row), column.maximum(height - column))
    return ((far / radius).log() / spacing).ceil().clamp(min=0).long()


def kernel_sizes(sigma: Tensor) -> Tensor:
    """The odd sizes of the published kernels, cut at about 1.5 sigma (the papers do not say where): 1 below 2/3."""
    size = (3 * sigma).floor().long()
    return size + (size % 2 == 0)


def foveate(
    images: Tensor,
    draws: Fovea,
    *,
    growth: float | Tensor = 0.06,
    spacing: float | Tensor = 0.2,
    rings: Tensor | None = None,
    clamp: bool = True,
) -> Tensor:
    """Sharp inside ``radius``, then blurred with sigma = ``growth`` x eccentricity, in rings e^``spacing`` apart.

    ``growth``, ``spacing`` and ``rings`` may be (B,); ``rings`` is ``rings_to_corner``. The published function for
    given fixations has other ``rings`` and no ``clamp``.
    """
    b, _, height, width = images.shape
    fixations, radius = draws.fixations.cpu(), draws.radius.cpu().double()
    check_fixations(fixations, height, width)
    if bool((radius <= 0).any()):
        raise ValueError(f"radius of the fovea: must be above 0, got {radius.min():g}")
    growth, spacing = (torch.as_tensor(x, dtype=torch.float64).cpu().expand(b) for x in (growth, spacing))
    number = rings_to_corner(fixations, radius, spacing, height, width) if rings is None else rings.cpu()

    ring = torch.arange(1, int(number.max()) + 1)
    sigma = growth[:, None] * radius[:, None] * (ring * spacing[:, None]).exp()
    sizes = torch.where(ring <= number[:, None], kernel_sizes(sigma), 0)
    sharp = (sizes == 1).sum(1)  # rings whose kernel is a single pixel belong to the fovea

    row, column = fixations.long().unbind(1)
    start = radius.log() / spacing
    x = _steps(images, row, column, height, width, spacing, start + sharp).clamp_(0, 1)
    out = images.contiguous() * raised_cosine(x)

    picture, which = (sizes > 1).nonzero(as_tuple=True)
    boxes = _boxes(row[picture], column[picture], radius[picture], which, spacing[picture], height, width)
    boxes[2:] = _rounded(boxes[2:], torch.tensor([[height], [width]]))
    size = sizes[picture, which]
    wide_enough = ((size - 2) // KERNEL + 1) * KERNEL + 1  # few different ones, for each costs a CPU some preparation
    area = boxes[2] * boxes[3]
    order = (wide_enough * height * width + area).argsort(descending=True)
    for pair in torch.split(order[area[order] > 0], PAIRS.get(images.device.type, PAIRS["cuda"])):
        of, nth = picture[pair], which[pair]
        tall, wide = boxes[2:, pair].amax(1).tolist()
        top, left = boxes[0, pair].clamp(max=height - tall), boxes[1, pair].clamp(max=width - wide)
        x = _steps(images, row[of] - top, column[of] - left, tall, wide, spacing[of], start[of] + nth + 1)
        taps = gaussians(sigma[of, nth], size[pair], int(wide_enough[pair[0]]))
        blurred = _blurred(images, of, top, left, tall, wide, taps)
        _add(out, blurred.mul_(raised_cosine(x)), of, top, left)
    return out.clamp_(0, 1) if clamp else out


def _boxes(
    row: Tensor, column: Tensor, radius: Tensor, which: Tensor, spacing: Tensor, height: int, width: int
) -> Tensor:
    """(4, P) top, left, height, width of what is seen of rings around row, column; nothing if they miss the picture."""
    inner, outer = (radius * ((which + 1 + far) * spacing).exp() for far in (-FAR, FAR))
    found = []
    for at, across, side, other in ((row, column, height, width), (column, row, width, height)):
        # lines that lie wholly inside the ring do not count; beyond an edge there is no other side of it
        hole = (inner**2 - across.maximum(other - 1 - across) ** 2).clamp(min=0).sqrt()
        first = torch.where(at < hole, at + hole, (at - outer).clamp(min=0)).floor()
        last = torch.where(side - 1 - at < hole, at - hole, (at + outer).clamp(max=side - 1)).ceil()
        found += [first, (last - first + 1).clamp(min=0)]
    return torch.stack([found[0], found[2], found[1], found[3]]).long()


def _rounded(sides: Tensor, most: Tensor) -> Tensor:
    """The next multiple of BOX, at most ``most``; 0 stays."""
    return ((sides + BOX - 1) // BOX * BOX).minimum(most)


def _steps(images: Tensor, row: Tensor, column: Tensor, tall: int, wide: int, spacing: Tensor, start: Tensor) -> Tensor:
    """ln(eccentricity) / spacing - start of the pixels of boxes in which the fixations lie at row, column: (P, 1, tall,
    wide), -inf at the fixation."""
    y = torch.arange(tall, device=images.device) - _column(row, images)[..., 0]
    x = torch.arange(wide, device=images.device) - _column(column, images)[..., 0]
    squared = (y**2)[..., None] + (x**2)[..., None, :]
    return squared.log_().mul_(_column(0.5 / spacing, images)).sub_(_column(start, images))


def _column(x: Tensor, like: Tensor) -> Tensor:
    return x.to(like)[:, None, None, None]


def _blurred(images: Tensor, of: Tensor, top: Tensor, left: Tensor, tall: int, wide: int, taps: Tensor) -> Tensor:
    """Boxes (P, C, tall, wide) of the pictures, each blurred with its kernel; the picture goes on as in a mirror."""
    c, height, width = images.shape[1:]
    edge = taps.shape[1] // 2
    rows = _mirrored(top[:, None] + torch.arange(-edge, tall + edge), height)
    columns = _mirrored(left[:, None] + torch.arange(-edge, wide + edge), width)
    places = _places(of, c, rows, columns, images)
    return separable(images.reshape(-1).index_select(0, places.flatten()).view(places.shape), taps)


def _mirrored(places: Tensor, length: int) -> Tensor:
    period = max(2 * length - 2, 1)
    places = places.abs() % period
    return places.minimum(period - places)


def _places(of: Tensor, c: int, rows: Tensor, columns: Tensor, images: Tensor) -> Tensor:
    """Where the pixels of pictures ``of`` lie in the flat batch: (P, C, rows, columns)."""
    height, width = images.shape[-2:]
    lines = ((of[:, None] * c + torch.arange(c)) * height)[..., None] + rows[:, None]
    return (lines * width).to(images.device)[..., None] + columns.to(images.device)[:, None, None]


def _add(out: Tensor, boxes: Tensor, of: Tensor, top: Tensor, left: Tensor) -> None:
    """Add boxes (P, C, tall, wide) to their pictures. At most two numbers other than 0 meet in a pixel, and those in
    any order make the same sum: the result is the same every time, on a GPU too."""
    c, tall, wide = boxes.shape[1:]
    places = _places(of, c, top[:, None] + torch.arange(tall), left[:, None] + torch.arange(wide), out)
    out.view(-1).scatter_add_(0, places.flatten(), boxes.flatten())


def check_fixations(fixations: Tensor, height: int, width: int) -> None:
    """Raises ValueError if one of (B, 2) lies outside the picture."""
    outside = (fixations < 0).any(1) | (fixations[:, 0] >= height) | (fixations[:, 1] >= width)
    if bool(outside.any()):
        row, column = fixations[outside][0].tolist()
        raise ValueError(f"fixation row {row:g}, column {column:g}: outside the picture of {height} x {width} pixels")


class Foveation(Step):
    """The step: a uniform fixation, ``border`` pixels away from the edges, and a fovea whose share of the picture's
    area is uniform in ``area``."""

    numbers = 3

    def __init__(
        self,
        area: tuple[float, float] = (0.01, 0.5),
        growth: float = 0.06,
        spacing: float = 0.2,
        border: int = 12,
    ):
        check_range("area", *area, 1e-6, 1)
        check_range("growth", growth, growth, 1e-6, 1)
        check_range("spacing", spacing, spacing, 0.01, 10)
        self.area, self.growth, self.spacing, self.border = area, growth, spacing, border

    def draw(self, u: Tensor, size: tuple[int, int], maps: Tensor | None = None) -> Fovea:
        fixations = uniform_fixations(u[:, :2], *size, self.border)
        return Fovea(fixations, (uniform(u[:, 2], *self.area) * size[0] * size[1] / math.pi).sqrt())

    def apply(self, images: Tensor, draws: Fovea) -> Tensor:
        return foveate(images, draws, growth=self.growth, spacing=self.spacing)


def uniform_fixations(u: Tensor, height: int, width: int, border: int) -> Tensor:
    """(B, 2) uniform -> (B, 2) row, column, at least ``border`` pixels away from the edges."""
    if border < 0 or 2 * border >= min(height, width):
        raise ValueError(f"border={border}: leaves no pixel of {height} x {width} to look at")
    row = integers(u[:, 0], border, height - border)
    return torch.stack([row, integers(u[:, 1], border, width - border)], dim=1)
