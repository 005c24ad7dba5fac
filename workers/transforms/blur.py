"""Gaussian blur of pictures (B, C, H, W), each with a width of its own: separable, reflected at the edges."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .draws import check_range, uniform
from .step import Step

TOGETHER = 16  # pictures at once on a CPU: what is computed stays in its cache


class Blur(NamedTuple):
    sigma: Tensor  # (B,) pixels


def gaussians(sigma: Tensor, size: int | Tensor, width: int | None = None) -> Tensor:
    """(B,) -> (B, K): normalised kernels of an odd ``size`` each, zero beyond it; K is ``width``, or the largest."""
    sizes = torch.as_tensor(size).expand(len(sigma))
    if bool((sizes % 2 == 0).any()) or bool((sigma <= 0).any()):
        raise ValueError(f"blur: sizes must be odd and sigma above 0, got {sizes.tolist()[:8]}, {sigma.tolist()[:8]}")
    radius = (int(sizes.max()) if width is None else width) // 2
    away = torch.arange(-radius, radius + 1, dtype=torch.float64)
    weight = (-0.5 * (away / sigma.double().cpu()[:, None]) ** 2).exp()
    weight = weight * (away.abs() <= sizes.cpu()[:, None] // 2)
    return weight / weight.sum(1, keepdim=True)


def separable(padded: Tensor, kernels: Tensor) -> Tensor:
    """(B, C, H + K - 1, W + K - 1), (B, K) -> (B, C, H, W): down, then across."""
    b, c, h, w = padded.shape
    taps = kernels.to(padded).repeat_interleave(c, 0)[:, None]
    x = F.conv2d(padded.reshape(1, b * c, h, w), taps[..., None], groups=b * c)
    x = F.conv2d(x, taps[:, :, None], groups=b * c)
    return x.view(b, c, *x.shape[-2:])


def blur(images: Tensor, sigma: Tensor, size: int) -> Tensor:
    """Every picture with its ``sigma`` (B,), kernels of ``size`` x ``size``."""
    if size // 2 >= min(images.shape[-2:]):
        raise ValueError(f"blur of size {size}: pictures of {images.shape[-2]} x {images.shape[-1]} are too small")
    if size == 1:
        return images
    taps = gaussians(sigma, size).to(images)
    together = TOGETHER if images.device.type == "cpu" else len(images)
    parts = [
        separable(F.pad(some, [size // 2] * 4, mode="reflect"), kernels)
        for some, kernels in zip(torch.split(images, together), torch.split(taps, together), strict=True)
    ]
    return torch.cat(parts)


def simclr_size(side: int) -> int:
    """The kernel's size for pictures of this side: a tenth, made odd: 9 for 96, 3 for 32."""
    return 2 * (int(0.1 * side) // 2) + 1


class GaussianBlur(Step):
    """The step: ``sigma`` uniform in a range, a kernel of ``size`` (None: SimCLR's), with a probability."""

    numbers = 2

    def __init__(self, sigma: tuple[float, float] = (0.1, 2.0), size: int | None = None, probability: float = 1.0):
        check_range("sigma", *sigma, 1e-6, 1e6)
        check_range("probability", probability, probability, 0, 1)
        self.sigma, self.size, self.probability = sigma, size, probability

    def draw(self, u: Tensor, size: tuple[int, int], maps: Tensor | None = None) -> Blur:
        sigma = uniform(u[:, 0], *self.sigma)
        return Blur(torch.where(u[:, 1] < self.probability, sigma, 1e-6))  # so narrow that nothing changes

    def apply(self, images: Tensor, draws: Blur) -> Tensor:
        size = simclr_size(min(images.shape[-2:])) if self.size is None else self.size
        return blur(images, draws.sigma, size)
