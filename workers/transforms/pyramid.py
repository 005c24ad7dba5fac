"""A foveated picture from a resolution pyramid, blended by eccentricity (Geisler and Perry, 1998), as in MIM across eye
movements (Weiler et al., arXiv 2404.08526).

Every level is linear in the picture and the same for rows and columns, so it is a pair of matrices; the levels that no
pixel needs are left out. All constants are the published program's.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .foveation import check_fixations

LEVELS, SIGMA, PIXELS_PER_DEGREE, ALPHA = 6, 0.248, 3.5, 2.5


def foveate(
    images: Tensor, fixations: Tensor | None = None, *, antialias: bool = False, clamp_weights: bool = False
) -> tuple[Tensor, Tensor]:
    """Pictures (B, C, H, W) and fixations (B, 2) row, column (None: the centres) -> foveated ones, and what of them is
    not as sharp as it was, (B or 1, 1, H, W) bool.

    ``antialias``: halve with anti-aliasing, as torchvision does from 0.17 on; the paper's own version did not.
    ``clamp_weights``: blend between the levels; as published, weights lie in [-0.36, 1.36] and sharpen at the outer
    borders of the levels.
    """
    height, width = images.shape[-2:]
    table = level_weights(height, width, clamp_weights).to(images)
    if fixations is None:
        fixations = torch.tensor([[height // 2, width // 2]])
    fixations = fixations.cpu()
    check_fixations(fixations, height, width)
    rows = (height - 1 - fixations[:, 0])[:, None] + torch.arange(height)
    columns = (width - 1 - fixations[:, 1])[:, None] + torch.arange(width)
    rows, columns = rows.to(images.device), columns.to(images.device)
    weights = table[:, rows[:, :, None], columns[:, None]].transpose(0, 1)[:, :, None]  # (B or 1, levels, 1, H, W)
    used = (weights != 0).flatten(2).any(2).any(0)
    sharp = weights[:, 0]
    out = images * sharp
    for level in range(1, len(used)):
        if used[level]:
            (down, up), (across, back) = (matrices(side, level, antialias) for side in (height, width))
            small = _both(images, down.to(images), across.to(images))
            out.addcmul_(_both(small, up.to(images), back.to(images)), weights[:, level])
    return out.clamp_(0, 1), sharp != 1


def _both(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    return torch.matmul(rows, images @ columns.T)


@functools.lru_cache(maxsize=64)
def matrices(side: int, level: int, antialias: bool) -> tuple[Tensor, Tensor]:
    """One axis of a level: (small, side), ``level`` times blurred and halved, and (side, small), doubled as often."""
    sides = [side]
    down = torch.eye(side, dtype=torch.float64)
    for _ in range(level):
        if sides[-1] < 4:
            raise ValueError(f"foveation of {side} pixels: too few to halve {level} times")
        sides.append(sides[-1] // 2)
        down = _resized(_smoothed(down), sides[-1], antialias)
    up = torch.eye(sides[-1], dtype=torch.float64)
    for small in [*(sides[-1] * 2**i for i in range(1, level)), side]:
        up = _resized(up, small, antialias)
    return down, up


def _smoothed(columns: Tensor) -> Tensor:
    """(n, K): every column by the pyramid's Gaussian of five pixels, reflected."""
    away = torch.arange(-2, 3, dtype=torch.float64)
    taps = (-0.5 * (away / SIGMA) ** 2).exp()
    padded = F.pad(columns.T[:, None], (2, 2), mode="reflect")
    return F.conv1d(padded, (taps / taps.sum())[None, None])[:, 0].T


def _resized(columns: Tensor, size: int, antialias: bool) -> Tensor:
    """(n, K) -> (size, K)."""
    k = columns.shape[1]  # as the columns of one picture, whose width stays
    return F.interpolate(columns[None, None], (size, k), mode="bilinear", antialias=antialias)[0, 0]


@functools.lru_cache(maxsize=8)
def level_weights(height: int, width: int, clamp: bool = False) -> Tensor:
    """(LEVELS, 2H - 1, 2W - 1): of a pixel that lies so far below and to the right of the fixation."""
    rows = torch.arange(1 - height, height, dtype=torch.float64)[:, None]
    columns = torch.arange(1 - width, width, dtype=torch.float64)
    acuity = ALPHA / (torch.hypot(rows, columns) / PIXELS_PER_DEGREE + ALPHA)

    pass_through = [(-0.5 * (2.0 ** (i - 3) * acuity / SIGMA) ** 2).exp() for i in range(1, LEVELS)]
    pass_through.append(torch.zeros_like(acuity))
    bands = torch.tensor([*(SIGMA * math.sqrt(2 * math.log(2)) / 2 ** (i - 3) for i in range(1, LEVELS)), 0.0])
    bands = (bands.double() - bands.min()) / (bands.max() - bands.min())
    edges = bands.tolist()

    weights = torch.zeros(LEVELS, *acuity.shape, dtype=torch.float64)
    for i in range(1, LEVELS):
        layer = (acuity >= edges[i]) & (acuity <= edges[i - 1])
        if i + 1 < LEVELS:
            layer &= acuity > edges[i]  # a tie belongs to the coarser layer
        if i == 1:
            weights[0][layer] = 1
            continue
        here, next_ = pass_through[i - 1], pass_through[i]
        finer = (0.5 - next_) / (here - next_ + 1e-5)
        if clamp:
            finer = finer.clamp(0, 1)
        weights[i - 1][layer] = (1 - finer)[layer]
        weights[i - 2][layer] = finer[layer]
    return weights
