"""Crops of one picture. They take and give uint8 (3, H, W); randomness comes from torch's generator."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F


class RandomResizedCrop:
    """A box of random area and aspect, resized to ``size`` x ``size``, flipped with probability ``hflip``.

    Area fraction uniform in ``scale``, aspect log-uniform in ``ratio``; ten tries, then the central box (torchvision's
    rule). Bicubic with anti-aliasing.
    """

    interpolation = InterpolationMode.BICUBIC

    def __init__(
        self,
        size: int,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        hflip: float = 0.5,
    ):
        self.size, self.scale, self.ratio, self.hflip = size, scale, ratio, hflip

    def __call__(self, image: Tensor) -> Tensor:
        top, left, height, width = self.box(image.shape[-2], image.shape[-1])
        size = [self.size, self.size]
        out: Tensor = F.resized_crop(image, top, left, height, width, size, self.interpolation, antialias=True)
        return out.flip(-1) if self.hflip and torch.rand(()).item() < self.hflip else out

    def box(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Draw (top, left, height, width)."""
        log_ratio = math.log(self.ratio[0]), math.log(self.ratio[1])
        for _ in range(10):
            u, v, y, x = torch.rand(4).tolist()
            area = height * width * (self.scale[0] + u * (self.scale[1] - self.scale[0]))
            aspect = math.exp(log_ratio[0] + v * (log_ratio[1] - log_ratio[0]))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                return int(y * (height - h + 1)), int(x * (width - w + 1)), h, w
        aspect = min(max(width / height, self.ratio[0]), self.ratio[1])
        w, h = min(width, round(height * aspect)), min(height, round(width / aspect))
        return (height - h) // 2, (width - w) // 2, h, w


class BilinearCrop(RandomResizedCrop):
    """SimMIM's: torchvision's default."""

    interpolation = InterpolationMode.BILINEAR


class OneShotCrop(RandomResizedCrop):
    """MAE's own variant for linear probing: a single try, cut to the picture; so the aspect may leave ``ratio``."""

    def box(self, height: int, width: int) -> tuple[int, int, int, int]:
        area = height * width * torch.empty(1).uniform_(*self.scale).item()
        aspect = math.exp(torch.empty(1).uniform_(math.log(self.ratio[0]), math.log(self.ratio[1])).item())
        w, h = min(width, round(math.sqrt(area * aspect))), min(height, round(math.sqrt(area / aspect)))
        w, h = max(w, 1), max(h, 1)
        top = int(torch.randint(0, height - h + 1, (1,)).item())
        return top, int(torch.randint(0, width - w + 1, (1,)).item()), h, w


class ResizeCenterCrop:
    """Resize the shorter side to ``size / crop``, cut the central ``size`` x ``size``. Bicubic with anti-aliasing."""

    interpolation = InterpolationMode.BICUBIC

    def __init__(self, size: int, crop: float = 0.875):
        self.size, self.resize = size, int(size / crop)

    def __call__(self, image: Tensor) -> Tensor:
        if min(image.shape[-2:]) != self.resize:
            image = F.resize(image, [self.resize], self.interpolation, antialias=True)
        if image.shape[-2:] != (self.size, self.size):
            image = F.center_crop(image, [self.size, self.size])
        return image


class BilinearCenterCrop(ResizeCenterCrop):
    """torchvision's default, as MoCo's linear classification has it."""

    interpolation = InterpolationMode.BILINEAR
