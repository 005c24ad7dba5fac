"""Two views of one picture, as MoCo draws them: cropped by the loader, coloured in batches on the device."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .blur import GaussianBlur
from .color import ColorJitter
from .crops import BilinearCrop
from .views import View

Augment = Literal["crop", "v1", "v2"]


class TwoViews:
    """For the loader: uint8 (3, H, W) -> crops (2, 3, size, size), the query's and the key's, and (2, numbers) uniform.

    The flip comes with the crop instead of after the colours, which changes nothing.
    """

    def __init__(self, size: int, scale: tuple[float, float], hflip: float, numbers: int):
        self.crop, self.numbers = BilinearCrop(size, scale=scale, hflip=hflip), numbers

    def __call__(self, image: Tensor) -> tuple[Tensor, Tensor]:
        return torch.stack([self.crop(image) for _ in range(2)]), torch.rand(2, self.numbers, dtype=torch.float64)


def colours(augment: Augment, size: int) -> View:
    """``v2`` jitters colours, perhaps drops them, and perhaps blurs (MoCo v2); ``v1`` perhaps drops colours, then
    jitters what is left; ``crop`` leaves them."""
    if augment == "crop":
        return View([])
    if augment == "v1":
        return View([ColorJitter(probability=0, gray=0.2), ColorJitter(0.4, 0.4, 0.4, 0.4, probability=1, gray=0)])
    kernel = max(1, min(13, 2 * ((size - 1) // 2) - 1))  # three of the widest sigma on each side, if they fit
    return View(
        [
            ColorJitter(0.4, 0.4, 0.4, 0.1, probability=0.8, gray=0.2),
            GaussianBlur(sigma=(0.1, 2.0), size=kernel, probability=0.5),
        ]
    )


def coloured(view: View, views: Tensor, u: Tensor) -> Tensor:
    """uint8 (B, 2, 3, H, W) and (B, 2, numbers) -> (B, 2, 3, H, W) in [0, 1], on the device of the pictures."""
    flat = view(views.flatten(0, 1), u.flatten(0, 1))
    return flat.reshape(views.shape)
