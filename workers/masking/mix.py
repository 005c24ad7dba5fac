"""Masks that fill a picture with another one instead of erasing it (MixMask: Vishniakov, Xing, Shen; 2022).

A mask is a square grid of cells, True where the other picture is seen. What is random comes from ``Draws``, in a fixed
order, so that recorded numbers can be played back.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LEAST_AREA = 4  # cells of a rectangle, unless fewer are left to keep
ASPECT = (0.3, 1 / 0.3)
ATTEMPTS = 10  # at a rectangle that fits
REDRAWS = 10_000  # of a mask that hides everything or nothing


class Draws:
    """Random numbers from torch's generator on the CPU, so that a GPU never waits for one."""

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), dtype=torch.float64).item()

    def integer(self, low: int, high: int) -> int:
        """Both ends included."""
        return int(torch.randint(low, high + 1, ()).item())

    def grid(self, side: int) -> Tensor:
        """(side, side) uniform in [0, 1)."""
        return torch.rand(side, side)

    def beta(self, a: float, b: float) -> float:
        return torch.distributions.Beta(a, b).sample().item()

    def permutation(self, n: int) -> Tensor:
        return torch.randperm(n)


def block_mask(draws: Draws, side: int, kept: int, *, redraw: bool = True) -> Tensor:
    """At most ``kept`` cells keep their picture, in rectangles (the generator of BEiT: Bao et al., ICLR 2022).

    -> (side, side) bool. It falls short of ``kept`` where ten attempts in a row find no place. ``redraw`` throws away
    a mask that keeps nothing; the published program trains on it.
    """
    for _ in range(REDRAWS):
        seen = torch.zeros(side, side, dtype=torch.bool)
        while (missing := kept - int(seen.sum())) > 0 and _add_rectangle(draws, seen, missing):
            pass
        if not redraw or seen.any():
            return ~seen
    raise ValueError(f"kept={kept}: no rectangle of so few cells of {side} x {side} was found")


def _add_rectangle(draws: Draws, seen: Tensor, missing: int) -> bool:
    """Set a rectangle that brings at most ``missing`` new cells. False: gave up."""
    side = len(seen)
    for _ in range(ATTEMPTS):
        area = draws.uniform(LEAST_AREA, missing)
        aspect = math.exp(draws.uniform(*(math.log(each) for each in ASPECT)))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height < side and width < side:
            top, left = draws.integer(0, side - height), draws.integer(0, side - width)
            box = seen[top : top + height, left : left + width]
            if 0 < box.numel() - int(box.sum()) <= missing:
                box.fill_(True)
                return True
    return False


def discrete_mask(draws: Draws, side: int, ratio: float) -> Tensor:
    """Every cell shows the other picture with probability ``ratio``; drawn anew while all or none do. (side, side)."""
    for _ in range(REDRAWS):
        mask = draws.grid(side) <= ratio
        if mask.any() and not mask.all():
            return mask
    raise ValueError(f"ratio={ratio}: all of {side} x {side} cells are hidden, or none, time after time")


def enlarged(mask: Tensor, height: int, width: int) -> Tensor:
    """The nearest cell of every pixel, at any size: (side, side) -> (height, width)."""
    rows, columns = (torch.arange(n) * len(mask) // n for n in (height, width))
    return mask[rows][:, columns]
