"""What fine-tuning does to a batch on the device: random erasing, mixup and CutMix. Randomness comes from torch's
generator on the CPU, so that a GPU never waits for a draw."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

TRIES = 10  # at a box that fits
ERASED = (0.02, 1 / 3)  # the part of a picture's area
ASPECT = (0.3, 1 / 0.3)


class Draw(NamedTuple):
    """How a batch is mixed."""

    share: float  # what remains of the picture itself
    centre: tuple[int, int] | None  # row and column of the box that is another picture's; None: blended all over


class Mixing:
    """Each picture with its counterpart in the batch reversed: blended (Zhang et al., ICLR 2018) or with a box of it
    (Yun et al., ICCV 2019), one draw for the whole batch.

    ``mixup`` and ``cutmix`` are the Beta distributions' parameters, 0: never; of both, CutMix is taken with
    ``switch_prob``. A batch is left alone with 1 - ``prob``.
    """

    def __init__(self, mixup: float = 0.0, cutmix: float = 0.0, prob: float = 1.0, switch_prob: float = 0.5):
        self.mixup, self.cutmix, self.prob, self.switch_prob = mixup, cutmix, prob, switch_prob

    def draw(self, height: int, width: int) -> Draw | None:
        """None: leave the batch alone."""
        if not (self.mixup or self.cutmix) or torch.rand(()).item() >= self.prob:
            return None
        box = self.cutmix > 0 and (not self.mixup or torch.rand(()).item() < self.switch_prob)
        alpha = self.cutmix if box else self.mixup
        share = torch.distributions.Beta(alpha, alpha).sample().item()
        return Draw(share, (int(torch.randint(height, ())), int(torch.randint(width, ()))) if box else None)

    @staticmethod
    def mixed(images: Tensor, targets: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        """images (B, C, H, W) and targets (B, classes), of an even B -> the same shapes."""
        share, other = draw.share, images.flip(0)
        if draw.centre is None:
            images = images * share + other * (1 - share)
        else:
            height, width = images.shape[-2:]
            top, bottom, left, right = box(share, draw.centre, height, width)
            images = images.clone()
            images[..., top:bottom, left:right] = other[..., top:bottom, left:right]
            share = 1 - (bottom - top) * (right - left) / (height * width)
        return images, targets * share + targets.flip(0) * (1 - share)


def box(share: float, centre: tuple[int, int], height: int, width: int) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) of the box that leaves about ``share`` of the picture, cut at its borders."""
    side = math.sqrt(1 - share)
    half = int(height * side) // 2, int(width * side) // 2  # odd sides lose a pixel, as in timm
    (row, column), (tall, wide) = centre, half
    return max(row - tall, 0), min(row + tall, height), max(column - wide, 0), min(column + wide, width)


def smoothed(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """(B,) -> (B, classes): 1 - smoothing on the label, and smoothing spread over all."""
    return F.one_hot(labels, classes) * (1 - smoothing) + smoothing / classes


def erased(images: Tensor, prob: float) -> Tensor:
    """Noise N(0, 1) in a random box of each picture with probability ``prob`` (Zhong et al., AAAI 2020).

    The rule is timm's: ten tries at an area and an aspect, the first box that is smaller than the picture. images
    (B, C, H, W), normalised.
    """
    b, _, height, width = images.shape
    area = height * width * torch.empty(b, TRIES).uniform_(*ERASED)
    aspect = torch.empty(b, TRIES).uniform_(*(math.log(each) for each in ASPECT)).exp()
    tall, wide = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (tall < height) & (wide < width)
    first = fits.float().argmax(1, keepdim=True)
    tall, wide = tall.gather(1, first), wide.gather(1, first)
    at = torch.rand(b, 2)
    top = (at[:, :1] * (height - tall + 1)).floor()
    left = (at[:, 1:] * (width - wide + 1)).floor()
    chosen = fits.any(1, keepdim=True) & (torch.rand(b, 1) < prob)
    rows, columns = torch.arange(height), torch.arange(width)
    inside_rows = chosen & (rows >= top) & (rows < top + tall)
    inside_columns = (columns >= left) & (columns < left + wide)
    inside = (inside_rows[:, :, None] & inside_columns[:, None, :])[:, None].to(images.device, non_blocking=True)
    return torch.where(inside, torch.randn_like(images), images)
