"""Losses between predicted and target latents of the patches of an image (Latent MIM; Wei, Gupta, Morgado; ECCV 2024).

All take (B, M, D) and compute in float32 at least, whatever the model's precision.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def infonce_patches(prediction: Tensor, target: Tensor, tau: float = 0.2, standardise: bool = True) -> Tensor:
    """Patch discrimination: each prediction must pick its own target among the M of its image. Scalar.

    2 tau mean_i CE(softmax_j(cos(y_i, t_j) / tau), i), where the predictions y are first standardised over the patches
    of their image, per channel (which needs M >= 2). The factor keeps the size of the gradient when tau changes.
    """
    y, target = _precise(prediction), _precise(target)
    if standardise:
        y = y - y.mean(1, keepdim=True)
        variance = y.square().sum(1, keepdim=True) / (y.shape[1] - 1)  # torch.std is ten times slower along this axis
        y = y / (variance.clamp_min(1e-30).sqrt() + 1e-4)
    with torch.autocast(y.device.type, enabled=False):
        logits = y @ F.normalize(target, dim=-1).transpose(1, 2) * (_inverse_norm(y) / tau)
    own = torch.arange(logits.shape[1], device=logits.device).repeat(len(logits))
    return 2 * tau * F.cross_entropy(logits.flatten(0, 1), own)


def norm_l2(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared distance to the targets, each standardised over its channels. Scalar."""
    prediction, target = _precise(prediction), _precise(target)
    var, mean = torch.var_mean(target, dim=-1, keepdim=True)
    return F.mse_loss(prediction, (target - mean) / (var + 1e-6).sqrt())


def pairwise_similarity(a: Tensor, b: Tensor | None = None) -> Tensor:
    """Mean cosine over all pairs (i, j), i = j too, of a token in ``a`` and one in ``b`` (None: ``a``), and over the
    leading axes: (..., N, D) -> scalar. As the product of the mean directions, so that no N x N table is made."""
    first = _mean_direction(_precise(a))
    second = first if b is None else _mean_direction(_precise(b))
    return (first * second).sum(-1).mean()


def _mean_direction(x: Tensor) -> Tensor:
    """(..., N, D) -> (..., 1, D)"""
    with torch.autocast(x.device.type, enabled=False):
        return _inverse_norm(x).transpose(-2, -1) @ x / x.shape[-2]


def _inverse_norm(x: Tensor) -> Tensor:
    """1 / |x|, with |x| at least 1e-12: (..., D) -> (..., 1)"""
    return x.square().sum(-1, keepdim=True).clamp_min(1e-24).rsqrt()


def _precise(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
