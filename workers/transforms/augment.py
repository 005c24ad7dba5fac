"""RandAugment (Cubuk et al., 2020) as timm has it, on uint8 (3, H, W).

It draws from Python's and numpy's generators; the loader seeds both for every picture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torchvision.transforms.v2 import functional as F


class RandAugment:
    """``config`` is timm's, such as ``rand-m9-mstd0.5-inc1``; what is moved in from outside has the mean colour."""

    def __init__(self, config: str, size: int, mean: Sequence[float]):
        from PIL import Image
        from timm.data.auto_augment import rand_augment_transform

        colour = tuple(min(255, round(255 * each)) for each in mean)
        said = {
            "translate_const": int(size * 0.45),
            "img_mean": colour,
            "interpolation": Image.Resampling.BICUBIC,
        }
        self.augment: Any = rand_augment_transform(config, said)
        for each in self.augment.ops:
            if each.name.startswith("Posterize"):
                each.aug_fn = posterized

    def __call__(self, image: Tensor) -> Tensor:
        out: Tensor = F.pil_to_tensor(self.augment(F.to_pil_image(image)))
        return out


def posterized(image: Any, bits: int, **_: Any) -> Any:
    """As timm's, but for the strongest kind: of 0 bits nothing remains. Older Pillows gave black, newer refuse."""
    from PIL import Image, ImageOps

    if bits < 1:
        return Image.new(image.mode, image.size)
    return image if bits >= 8 else ImageOps.posterize(image, bits)


class InTurn:
    """Transforms one after the other."""

    def __init__(self, *transforms: Callable[[Tensor], Tensor]):
        self.transforms = transforms

    def __call__(self, image: Tensor) -> Tensor:
        for each in self.transforms:
            image = each(image)
        return image
