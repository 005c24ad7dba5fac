"""Colour jitter and grayscale, of pictures (B, 3, H, W) in [0, 1].

What torchvision does to one Pillow picture, in floating point; the published programs round to 8 bits after every step.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .draws import check_range, permutation, uniform
from .step import Step

LUMA = (0.299, 0.587, 0.114)
TOGETHER = 16  # pictures at once on a CPU: what is computed stays in its cache


class Jitter(NamedTuple):
    order: Tensor  # (B, 4) of 0 brightness, 1 contrast, 2 saturation, 3 hue
    factors: Tensor  # (B, 4) of each, in the order brightness, contrast, saturation, hue
    jittered: Tensor  # (B,) bool
    gray: Tensor  # (B,) bool


def luma(images: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, 1, H, W)."""
    r, g, b = torch.split(images, 1, dim=1)
    gray: Tensor = (r * LUMA[0]).add_(g, alpha=LUMA[1]).add_(b, alpha=LUMA[2])
    return gray


def jitter(images: Tensor, draws: Jitter) -> Tensor:
    """The four changes in each picture's own order, then gray. Those of one order go through it together."""
    out = images.clone()
    order = draws.order.cpu() @ torch.tensor([64, 16, 4, 1])
    for code in sorted(set(order[draws.jittered.cpu()].tolist())):
        alike = ((order == code) & draws.jittered.cpu()).nonzero()[:, 0]
        steps = [code // 64, code // 16 % 4, code // 4 % 4, code % 4]
        for some in alike.split(TOGETHER if images.device.type == "cpu" else len(alike)):
            factors = draws.factors[some].to(images)[:, :, None, None, None]
            some = some.to(images.device)
            x = images[some]
            for step in steps:
                x = CHANGES[step](x, factors[:, step])
            out[some] = x
    if bool(draws.gray.any()):
        gray = draws.gray.nonzero()[:, 0].to(images.device)
        out[gray] = luma(out[gray]).expand(-1, 3, -1, -1)
    return out


def brightness(x: Tensor, factor: Tensor) -> Tensor:
    return x.mul_(factor).clamp_(0, 1)


def contrast(x: Tensor, factor: Tensor) -> Tensor:
    mean = luma(x.mean((2, 3), keepdim=True))
    return x.mul_(factor).add_((1 - factor) * mean).clamp_(0, 1)


def saturation(x: Tensor, factor: Tensor) -> Tensor:
    gray = luma(x).mul_(1 - factor)
    return x.mul_(factor).add_(gray).clamp_(0, 1)


def hue(x: Tensor, turn: Tensor) -> Tensor:
    """Turn the colour circle by ``turn`` of it; brightest and darkest channel stay as they are."""
    high, low = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    span = high - low
    r, g, b = torch.split(x, 1, dim=1)
    scale = span.clamp(min=1e-12).mul_(6).reciprocal_()
    of_b = torch.sub(r, g).mul_(scale).add_(4 / 6)
    of_g = torch.sub(b, r).mul_(scale).add_(2 / 6)
    angle = torch.where(high == g, of_g, of_b)
    angle = torch.where(high == r, torch.sub(g, b).mul_(scale), angle).add_(turn + 2)  # above 0, for frac
    offsets = torch.tensor([0.0, 4 / 6, 2 / 6], device=x.device, dtype=x.dtype).view(3, 1, 1)
    share = (angle + offsets).frac_().mul_(6).sub_(3).abs_().sub_(1).clamp_(0, 1)
    return torch.addcmul(low, span, share)


CHANGES = (brightness, contrast, saturation, hue)


class ColorJitter(Step):
    """The step: brightness, contrast, saturation and hue by random amounts in random order, then perhaps gray."""

    numbers = 10

    def __init__(
        self,
        brightness: float = 0.8,
        contrast: float = 0.8,
        saturation: float = 0.8,
        hue: float = 0.2,
        probability: float = 0.8,
        gray: float = 0.2,
    ):
        for name, value in (("probability", probability), ("gray", gray), ("brightness", brightness)):
            check_range(name, value, value, 0, 1)
        check_range("hue", hue, hue, 0, 0.5)
        self.amounts, self.hue, self.probability, self.gray = (brightness, contrast, saturation), hue, probability, gray

    def draw(self, u: Tensor, size: tuple[int, int], maps: Tensor | None = None) -> Jitter:
        factors = [uniform(u[:, i], max(0, 1 - a), 1 + a) for i, a in enumerate(self.amounts)]
        factors.append(uniform(u[:, 3], -self.hue, self.hue))
        on, gray = u[:, 8] < self.probability, u[:, 9] < self.gray
        return Jitter(permutation(u[:, 4:8]), torch.stack(factors, dim=1), on, gray)

    def apply(self, images: Tensor, draws: Jitter) -> Tensor:
        return jitter(images, draws)
