"""Cortical magnification: pictures as a retina with a fixation would sample them (Wang et al., SVRHM 2021,
arXiv 2112.07173).

The pixels of a grid around the fixation move along their rays by a profile F(R) of the distance R; the farthest corner
of the grid comes to lie at sqrt(``cover``) of the distance to the farthest corner of the picture.
"""

from __future__ import annotations

import functools
import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import saliency
from .draws import check_range, uniform
from .foveation import check_fixations, uniform_fixations
from .step import Step


class Retina(NamedTuple):
    fixations: Tensor  # (B, 2) row, column
    cover: Tensor  # (B,)
    slope: Tensor  # (B,), of the exponential profile


def grid(height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows u (H, 1), columns v (1, W) and distances R (H, W) from the centre; an odd side loses a pixel."""
    u = torch.arange(height // 2 * 2, dtype=torch.float64)[:, None] + 0.5 - height // 2
    v = torch.arange(width // 2 * 2, dtype=torch.float64) + 0.5 - width // 2
    return u, v[None], torch.hypot(u, v)


def quadratic(r: Tensor, fovea: float, fall: float) -> Tensor:
    """As it is within ``fovea`` pixels, then quadratic, continuous in value and slope; ``fall``=0 falls off fastest."""
    beyond = (r + fall) ** 2 / (2 * (fovea + fall)) + fovea - (fovea + fall) / 2
    return torch.where(r <= fovea, r, beyond)  # at r = fovea the published program has 0, which no grid meets


def exponential(r: Tensor, slope: Tensor, farthest: float) -> Tensor:
    """Distances (n,), slopes (B,) -> (B, n). Slope 0.5 hardly distorts, 3 does strongly."""
    return torch.expm1(slope[:, None] * (r / farthest))


@functools.lru_cache(maxsize=8)
def _rays(height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Directions (H, 2 * W), x and y by turns, of length 1; the distances (n,); whose is which (H * W,)."""
    u, v, r = grid(height, width)
    distances, which = torch.unique(r, return_inverse=True)
    return torch.stack([v / r, u / r], dim=-1).flatten(1), distances, which.flatten()


@functools.lru_cache(maxsize=8)
def _quadratic_rays(height: int, width: int, fovea: float, fall: float) -> Tensor:
    """(H, 2 * W) float32, the farthest of length 1."""
    rays, distances, which = _rays(height, width)
    profile = quadratic(distances, fovea, fall)
    long = (profile / profile[-1])[which].view(len(rays), -1)
    return (rays * long.repeat_interleave(2, 1)).float()


def farthest_corner(fixations: Tensor, height: int, width: int) -> Tensor:
    row, column = fixations.double().unbind(1)
    return torch.hypot(row.maximum(height - row), column.maximum(width - column))


def looks(
    draws: Retina,
    height: int,
    width: int,
    form: Literal["quadratic", "exponential"] = "quadratic",
    fovea: float = 20,
    fall: float = 20,
    device: torch.device | None = None,
) -> Tensor:
    """Where to look, (B, H, W, 2) of x, y in grid_sample's units: -1 and 1 are the edges of the picture."""
    check_fixations(draws.fixations, height, width)
    if bool((draws.cover <= 0).any()):
        raise ValueError(f"cover={draws.cover.min():g}: must be above 0")
    reach = farthest_corner(draws.fixations, height, width) * draws.cover.sqrt()
    unit = torch.tensor([2 / width, 2 / height], dtype=torch.float64)
    start, scale = draws.fixations.flip(1) * unit - 1, reach[:, None] * unit
    columns = width // 2 * 2
    start, scale = (x.float().to(device).repeat(1, columns)[:, None] for x in (start, scale))  # as the rays: quicker
    if form == "quadratic":
        places = torch.addcmul(start, scale, _quadratic_rays(height, width, fovea, fall).to(device))
    else:
        rays, distances, which = _rays(height, width)
        slope, diagonal = draws.slope.float().to(device), math.hypot(height // 2, width // 2)
        profile = exponential(distances.float().to(device), slope, diagonal)
        profile = (profile / profile[:, -1:]).index_select(1, which.repeat_interleave(2).to(device))
        places = profile.view(-1, *rays.shape).mul_(rays.float().to(device)).mul_(scale).add_(start)
    return places.view(len(places), -1, columns, 2)


def ticks(middle: float, length: int, steps: Tensor) -> Tensor:
    """One axis of a separable grid: ``steps`` (length // 2,), the spacing from the fixation outwards."""
    left = middle / steps.sum() * steps.flip(0).cumsum(0)
    return torch.cat([left, middle + (length - middle) / steps.sum() * steps.cumsum(0)])


def separable(
    fixation: tuple[int, int], height: int, width: int, form: str, cutoff: float = 2.25
) -> tuple[Tensor, Tensor]:
    """Y and X (H, W) as above, of the two forms that magnify each axis by itself: ``linear`` or ``normal``, whose
    spacing is the inverse of a normal density up to ``cutoff`` standard deviations."""

    def steps(n: int) -> Tensor:
        if form == "linear":
            return torch.arange(1, n + 1, dtype=torch.float64)
        return (torch.linspace(0, cutoff, n, dtype=torch.float64) ** 2 / 2).exp()

    y = ticks(fixation[0], height, steps(height // 2))
    x = ticks(fixation[1], width, steps(width // 2))
    return y[:, None].expand(-1, len(x)).float(), x.expand(len(y), -1).float()


def pixels(places: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """(B, H, W, 2) as Y and X, in pixels counted from the picture's upper left edge."""
    return (places[..., 1] + 1) * height / 2, (places[..., 0] + 1) * width / 2


def places(y: Tensor, x: Tensor, height: int, width: int) -> Tensor:
    """The inverse."""
    return torch.stack([x * (2 / width) - 1, y * (2 / height) - 1], dim=-1)


def sample(images: Tensor, where: Tensor) -> Tensor:
    """Bilinear at (B, H, W, 2) of x, y in grid_sample's units; black outside."""
    return F.grid_sample(images, where.to(images), align_corners=False)


class Magnification(Step):
    """The step. The fixation is uniform, ``border`` pixels away from the edges, or drawn from a saliency map with a
    ``temperature``; ``cover`` and ``slope`` are uniform in their ranges."""

    numbers = 4

    def __init__(
        self,
        form: Literal["quadratic", "exponential"] = "quadratic",
        cover: tuple[float, float] = (0.05, 0.7),
        fovea: float = 20,
        fall: float = 20,
        slope: tuple[float, float] = (1.5, 1.5),
        border: int = 16,
        salient: bool = False,
        temperature: float = 1.5,
    ):
        check_range("cover", *cover, 1e-6, 100)
        check_range("slope", *slope, 1e-6, 100)
        check_range("fovea", fovea, fovea, 1e-6, 1e6)
        check_range("fall", fall, fall, 0, 1e6)
        saliency.check_temperature(temperature)
        self.form, self.cover, self.fovea, self.fall, self.slope = form, cover, fovea, fall, slope
        self.border, self.salient, self.temperature = border, salient, temperature

    def draw(self, u: Tensor, size: tuple[int, int], maps: Tensor | None = None) -> Retina:
        if self.salient:
            fixations = saliency.fixations(u[:, 0], saliency.wanted(maps, size), self.temperature, self.border)
        else:
            fixations = uniform_fixations(u[:, :2], *size, self.border)
        return Retina(fixations, uniform(u[:, 3], *self.cover), uniform(u[:, 2], *self.slope))

    def apply(self, images: Tensor, draws: Retina) -> Tensor:
        height, width = images.shape[-2:]
        return sample(images, looks(draws, height, width, self.form, self.fovea, self.fall, images.device))

    def follow(self, maps: Tensor, draws: Retina) -> Tensor:
        return self.apply(maps, draws)

    def result(self, size: tuple[int, int]) -> tuple[int, int]:
        return size[0] // 2 * 2, size[1] // 2 * 2
