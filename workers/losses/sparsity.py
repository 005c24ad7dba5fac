"""How a representation spreads over its units, and the loss on what was hidden (Weiler et al., arXiv 2404.08526).

Representations are (B, ...), any shape behind the batch; they are taken in float32. No matrix here is larger than the
representations themselves or B x B.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-7  # in the sparsities
STD_EPS = 1e-5  # added to the units' standard deviations


def hidden_error(predicted: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Squared error of (B, C, H, W) where ``weight`` (B, 1, H, W) is above 0: one weighted mean over the whole batch.

    0, not NaN, where nothing in the batch is to be predicted.
    """
    error = (predicted.float() - target.float()).square().mean(1, keepdim=True)
    weight = weight.float()
    return (error * weight).sum() / weight.sum().clamp(min=torch.finfo(torch.float32).tiny)


def covariance(x: Tensor, divisor: int | None = None) -> Tensor:
    """Squared correlations of different units: their sum over the number of units, as VICReg penalises it.

    The sum of squares of Z^T Z, which is D x D, is that of Z Z^T, which is B x B; its diagonal takes another line.
    ``divisor`` is B - 1 unless the published program's number is wanted.
    """
    x = x.flatten(1).float()
    std, mean = torch.std_mean(x, dim=0)
    z = (x - mean) / (std + STD_EPS)
    diagonal = z.square().sum(0)
    off = (z @ z.T).square().sum(dtype=torch.float64) - diagonal.square().sum(dtype=torch.float64)
    return (off / (divisor or len(x) - 1) ** 2 / x.shape[1]).float()


def unit_sparsity(x: Tensor) -> Tensor:
    """1 - mean^2 / mean of squares over the pictures, of every unit: 0 where it always answers alike, or never."""
    return _sparsity(x.float(), 0)


def population_sparsity(x: Tensor) -> Tensor:
    """The same over the units, of every picture: (B,)."""
    return _sparsity(x.flatten(1).float(), 1)


def _sparsity(x: Tensor, dim: int) -> Tensor:
    return 1 - (x.mean(dim).square() + EPS) / (x.square().mean(dim) + EPS)
