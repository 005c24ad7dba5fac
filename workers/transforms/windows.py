"""Rectangles cut from pictures and resized, a different one from each: (B, C, H, W) -> (B, C, size, size).

Bilinear with half-pixel centres; where a window is larger than what becomes of it, with anti-aliasing, as Pillow does.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .draws import check_range
from .step import Step

TRIES = 10  # torchvision's


class Cut(NamedTuple):
    windows: Tensor  # (B, 4) top, left, height, width; may reach beyond the picture, where there is zero
    flip: Tensor  # (B,) bool


def cut(images: Tensor, windows: Tensor, size: int, flip: Tensor | None = None, *, antialias: bool = True) -> Tensor:
    """``windows`` (B, 4) of top, left, height, width, resized to ``size`` x ``size``; mirrored where ``flip`` (B,)."""
    if bool((windows[:, 2:] < 1).any()):
        raise ValueError(f"window {windows[(windows[:, 2:] < 1).any(1)][0].tolist()}: height and width must be above 0")
    flip = torch.zeros(len(windows), dtype=torch.bool) if flip is None else flip
    smaller = (windows[:, 2:] > size).any(1).cpu() & antialias
    if bool(smaller.all()):
        return _shrunk(images, windows, size, flip)
    out = _sampled(images, windows, size, flip)
    if bool(smaller.any()):
        chosen = smaller.nonzero()[:, 0]
        out[chosen.to(out.device)] = _shrunk(images[chosen.to(images.device)], windows[chosen], size, flip[chosen])
    return out


def _sampled(images: Tensor, windows: Tensor, size: int, flip: Tensor) -> Tensor:
    height, width = images.shape[-2:]
    top, left, rows, columns = windows.double().unbind(1)
    steps = (torch.arange(size, dtype=torch.float64, device=windows.device) + 0.5) / size
    across = torch.where(flip[:, None].to(windows.device), steps.flip(0), steps)
    y = _places(top, rows, steps, height).to(images)
    x = _places(left, columns, across, width).to(images)
    shape = (len(images), size, size)
    grid = torch.stack([x[:, None].expand(shape), y[:, :, None].expand(shape)], dim=-1)
    return F.grid_sample(images, grid, align_corners=False)


def _places(start: Tensor, length: Tensor, steps: Tensor, of: int) -> Tensor:
    """Where the new pixels lie, in grid_sample's units: -1 and 1 are the edges of the picture."""
    inside = (steps * length[:, None]).clamp(torch.tensor(0.5).to(steps), (length - 0.5)[:, None])
    return (start[:, None] + inside) * 2 / of - 1


def _shrunk(images: Tensor, windows: Tensor, size: int, flip: Tensor) -> Tensor:
    """Both directions as a matrix for each picture."""
    top, left, rows, columns = windows.unbind(1)
    down = _matrix(top, rows, size, images.shape[-2]).to(images)
    across = _matrix(left, columns, size, images.shape[-1]).to(images)
    across = torch.where(flip.to(images.device)[:, None, None], across.flip(1), across)
    out: Tensor = down[:, None] @ images @ across[:, None].transpose(-1, -2)
    return out


def _matrix(start: Tensor, length: Tensor, size: int, of: int) -> Tensor:
    """(B, size, of): triangles as wide as the pixels that become one, normalised inside the window."""
    start, length = start.double()[:, None, None], length.double()[:, None, None]
    beyond = int(max(0, -start.min().item(), (start + length).max().item() - of))
    place = torch.arange(-beyond, of + beyond, dtype=torch.float64, device=start.device)
    step = torch.arange(size, dtype=torch.float64, device=start.device)[:, None] + 0.5
    scale = length / size
    weight = (1 - ((place + 0.5 - start) - step * scale).abs() / scale.clamp(min=1)).clamp(min=0)
    weight = weight * ((place >= start) & (place < start + length))
    weight = weight / weight.sum(-1, keepdim=True)
    return weight[..., beyond : beyond + of]


def random_windows(
    u: Tensor, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> Tensor:
    """Windows inside the picture: (B, 2 * TRIES + 2) uniform -> (B, 4).

    Area fraction uniform in ``scale``, aspect log-uniform in ``ratio``; ten tries, then the central one (torchvision).
    """
    h, w = shapes(u[:, :TRIES], u[:, TRIES : 2 * TRIES], height, width, scale, ratio)
    fits = (h >= 1) & (h <= height) & (w >= 1) & (w <= width)
    h, w, found = first(fits, h, w)
    top = (u[:, -2] * (height - h + 1)).floor().long().clamp(max=height)
    left = (u[:, -1] * (width - w + 1)).floor().long().clamp(max=width)
    chosen = torch.stack([top, left, h.long(), w.long()], dim=1)
    return torch.where(found[:, None], chosen, torch.tensor(central(height, width, ratio)))


def shapes(
    u: Tensor, v: Tensor, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Heights and widths of random area and aspect, whole numbers."""
    area = height * width * (scale[0] + u * (scale[1] - scale[0]))
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = (low + v * (high - low)).exp()
    return (area / aspect).sqrt().round(), (area * aspect).sqrt().round()


def first(good: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
    """Of each row of ``values`` (B, tries) the first that is good, and whether there is one (B,)."""
    at = good.int().argmax(1, keepdim=True)
    return *(each.gather(1, at)[:, 0] for each in values), good.any(1)


def central(height: int, width: int, ratio: tuple[float, float]) -> tuple[int, int, int, int]:
    """The largest central window whose aspect lies in ``ratio``."""
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w, h = min(width, round(height * aspect)), min(height, round(width / aspect))
    return (height - h) // 2, (width - w) // 2, h, w


class Window(Step):
    """The step that cuts a random window, or none (``scale=None``), and mirrors with probability ``flip``."""

    def __init__(
        self,
        size: int,
        scale: tuple[float, float] | None = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
    ):
        check_range("flip", flip, flip, 0, 1)
        if scale is not None:
            check_range("scale", *scale, 0, 1)
        check_range("ratio", *ratio, 1e-3, 1e3)
        self.size, self.scale, self.ratio, self.flip = size, scale, ratio, flip
        self.numbers = 1 + (2 * TRIES + 2 if scale else 0)

    def draw(self, u: Tensor, size: tuple[int, int], maps: Tensor | None = None) -> Cut:
        flip = u[:, 0] < self.flip
        if self.scale is None:
            return Cut(torch.tensor([[0, 0, *size]]).expand(len(u), 4), flip)
        return Cut(random_windows(u[:, 1:], *size, self.scale, self.ratio), flip)

    def apply(self, images: Tensor, draws: Cut) -> Tensor:
        if self.scale is None and images.shape[-2:] == (self.size, self.size):
            chosen = draws.flip.nonzero()[:, 0].to(images.device)
            return images.index_copy(0, chosen, images[chosen].flip(-1)) if len(chosen) else images
        return cut(images, draws.windows, self.size, draws.flip)

    def follow(self, maps: Tensor, draws: Cut) -> Tensor:
        return self.apply(maps, draws)

    def result(self, size: tuple[int, int]) -> tuple[int, int]:
        return self.size, self.size
