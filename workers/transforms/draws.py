"""From uniform numbers to draws.

A picture brings a row of uniform numbers in [0, 1) that were drawn for its (seed, epoch, index), and every random
choice is a function of some of them: (B, K) float64 on the CPU -> parameters of the B pictures. So a choice depends
neither on loader processes, nor on the device, nor on the other pictures of the batch.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

Draws = TypeVar("Draws", bound=tuple[Tensor, ...])


def uniform(u: Tensor, low: float, high: float) -> Tensor:
    return low + u * (high - low)


def integers(u: Tensor, low: int | Tensor, high: int | Tensor) -> Tensor:
    """Of ``low``, ..., ``high`` - 1."""
    span = torch.as_tensor(high) - low
    return (low + (u * span).long().minimum(span - 1)).long()


def permutation(u: Tensor) -> Tensor:
    """(B, n) -> (B, n), each order of n things equally likely."""
    return u.argsort(dim=1)


def pick(u: Tensor, weights: Tensor) -> Tensor:
    """Places, with probabilities in proportion to ``weights``: (B, K), (B, N) -> (B, K). Never one of weight 0."""
    upto = weights.double().cumsum(1)
    total = upto[:, -1:]
    if not bool(((total > 0) & total.isfinite()).all()):
        raise ValueError(f"weights to draw from: sums from {total.min():g} to {total.max():g}, must be above 0, finite")
    wanted = (u.double() * total).minimum(torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(upto, wanted, right=True)


def check_range(name: str, low: float, high: float, least: float, most: float) -> None:
    """Raises ValueError unless ``least`` <= ``low`` <= ``high`` <= ``most``."""
    if not least <= low <= high <= most:
        raise ValueError(f"{name}={low:g}, {high:g}: expected a range within {least:g} to {most:g}")
