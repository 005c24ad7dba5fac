"""Where to look, from maps of how salient each pixel is: fixations and windows (Wang et al., SVRHM 2021,
arXiv 2112.07173). Maps are (B, 1, H, W), raw scores such as FastSal's log-odds, of the pictures' size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import windows
from .draws import check_range, pick
from .step import Step
from .windows import Cut

TRIES = 30


def density(maps: Tensor, temperature: float, border: int = 0) -> Tensor:
    """Unnormalised, exp(map / temperature), at most 1, 0 in a border: (B, 1, H, W) -> (B, H, W)."""
    check_temperature(temperature)
    height, width = maps.shape[-2:]
    if border < 0 or 2 * border >= min(height, width):
        raise ValueError(f"border={border}: leaves no pixel of {height} x {width} to look at")
    maps = maps[:, 0].float()
    out = ((maps - maps.amax((1, 2), keepdim=True)) / temperature).exp_()
    if border:
        inside = torch.zeros_like(out)
        inside[:, border : height - border, border : width - border] = 1
        out.mul_(inside)
    return out


def fixations(u: Tensor, maps: Tensor, temperature: float, border: int = 0) -> Tensor:
    """(B,) uniform, (B, 1, H, W) -> (B, 2) row, column. A flat map makes them uniform."""
    return torch.stack(_points(u[:, None], density(maps, temperature, border)), dim=-1)[:, 0]


def _points(u: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """(B, K), (B, H, W) -> rows and columns, each (B, K)."""
    try:
        place = pick(u, weights.flatten(1))
    except ValueError as error:
        raise ValueError(f"saliency: nothing to look at inside the border; {error}") from None
    return place // weights.shape[-1], place % weights.shape[-1]


def salient_windows(
    u: Tensor, weights: Tensor, scale: tuple[float, float] = (0.08, 1.0), ratio: tuple[float, float] = (3 / 4, 4 / 3)
) -> Tensor:
    """Windows with a centre from ``weights`` (B, H, W): (B, 3 * TRIES) uniform -> (B, 4), perhaps beyond the edges.

    The first of thirty whose share of the picture lies in ``scale``, else the central one.
    """
    height, width = weights.shape[-2:]
    h, w = windows.shapes(u[:, :TRIES], u[:, TRIES : 2 * TRIES], height, width, scale, ratio)
    row, column = _points(u[:, 2 * TRIES :], weights)
    top, left = row - (h / 2).floor(), column - (w / 2).floor()
    tall = (top + h).clamp(max=height) - top.clamp(min=0)
    wide = (left + w).clamp(max=width) - left.clamp(min=0)
    seen = tall * wide
    good = (scale[0] * height * width < seen) & (seen < scale[1] * height * width) & (tall > 0) & (wide > 0)
    top, left, h, w, found = windows.first(good, top, left, h, w)
    chosen = torch.stack([top, left, h, w], dim=1).long()
    return torch.where(found[:, None], chosen, torch.tensor(windows.central(height, width, ratio)))


def inside(chosen: Tensor, height: int, width: int, *, published: bool = False) -> Tensor:
    """What of the windows (B, 4) lies on the picture.

    ``published``: a window that reaches beyond the upper or left edge is moved, not cut; at the others it is cut.
    """
    top, left, h, w = chosen.unbind(1)
    y, x = top.clamp(min=0), left.clamp(min=0)
    if not published:
        h, w = h + top - y, w + left - x
    return torch.stack([y, x, h.minimum(height - y), w.minimum(width - x)], dim=1)


def wanted(maps: Tensor | None, size: tuple[int, int]) -> Tensor:
    """The maps. Raises ValueError where there are none, or of another size than the pictures."""
    if maps is None:
        raise ValueError("saliency: this transform looks where maps say, and was given none")
    if maps.ndim != 4 or maps.shape[1] != 1 or tuple(maps.shape[-2:]) != tuple(size):
        raise ValueError(
            f"saliency: maps of {' x '.join(map(str, maps.shape[1:]))}, expected 1 x {size[0]} x {size[1]}, "
            "as the pictures"
        )
    if not bool(maps.isfinite().all()):
        raise ValueError("saliency: a map has values that are not finite")
    return maps


def check_temperature(temperature: float) -> None:
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature={temperature}: must be above 0")


class SalientWindow(Step):
    """The step: a window around a salient point, resized; mirrored with probability ``flip``.

    ``uniform`` is the control, all points alike, which needs no maps; ``pad`` keeps what reaches beyond the picture as
    black, else it is cut off (``published``: as the published program does).
    """

    def __init__(
        self,
        size: int,
        temperature: float = 1.5,
        border: int = 0,
        *,
        uniform: bool = False,
        pad: bool = False,
        published: bool = False,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
    ):
        check_temperature(temperature)
        check_range("scale", *scale, 0, 1)
        check_range("ratio", *ratio, 1e-3, 1e3)
        check_range("flip", flip, flip, 0, 1)
        self.size, self.temperature, self.border, self.uniform = size, temperature, border, uniform
        self.pad, self.published, self.scale, self.ratio, self.flip = pad, published, scale, ratio, flip
        self.numbers = 1 + 3 * TRIES

    def draw(self, u: Tensor, size: tuple[int, int], maps: Tensor | None = None) -> Cut:
        maps = torch.ones(len(u), 1, *size) if self.uniform else wanted(maps, size)
        weights = density(maps, self.temperature, self.border)
        chosen = salient_windows(u[:, 1:], weights, self.scale, self.ratio)
        if not self.pad:
            chosen = inside(chosen, *size, published=self.published)
        return Cut(chosen, u[:, 0] < self.flip)

    def apply(self, images: Tensor, draws: Cut) -> Tensor:
        return windows.cut(images, draws.windows, self.size, draws.flip)

    def follow(self, maps: Tensor, draws: Cut) -> Tensor:
        return self.apply(maps, draws)

    def result(self, size: tuple[int, int]) -> tuple[int, int]:
        return self.size, self.size


def contrast(images: Tensor) -> Tensor:
    """A stand-in for a saliency model, without weights: how much a place differs in colour from the whole picture, and
    how near it is to the centre. (B, 3, H, W) in [0, 1] -> (B, 1, H, W), mean 0, standard deviation 1.

    No results of a paper were made with it; it shows what the transforms do where no maps are at hand.
    """
    height, width = images.shape[-2:]
    size = max(3, min(height, width) // 8 // 2 * 2 + 1)
    smooth = F.avg_pool2d(images, size, stride=1, padding=size // 2, count_include_pad=False)
    away = (smooth - images.mean((2, 3), keepdim=True)).square().sum(1, keepdim=True).sqrt()
    y, x = (torch.linspace(-1, 1, side, device=images.device) for side in (height, width))
    score = away / away.mean((2, 3), keepdim=True).clamp(min=1e-6) - (y[:, None] ** 2 + x**2)
    return (score - score.mean((2, 3), keepdim=True)) / score.std((2, 3), keepdim=True).clamp(min=1e-6)
