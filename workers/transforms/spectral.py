"""Saliency without a trained network: the spectral residual (Hou and Zhang, CVPR 2007)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import blur

SIDE = 64  # pixels at which the spectrum is taken
SIGMA, SIZE = 2.5, 9  # of the smoothing, at that side


def residual(images: Tensor) -> Tensor:
    """What of a picture's log spectrum its smooth course does not foretell, back in space: eq. 2 to 5.

    (B, 3, H, W) in [0, 1] -> (B, 1, H, W), mean 0 and standard deviation 1; 0 for a picture of one colour.
    """
    gray = F.interpolate(images.float().mean(1, keepdim=True), (SIDE, SIDE), mode="bilinear", antialias=True)
    spectrum = torch.fft.fft2(gray)
    amplitude = spectrum.abs().clamp(min=1e-6).log()
    around = F.pad(amplitude, [1] * 4, mode="circular")  # frequencies are periodic
    unexpected = amplitude - F.avg_pool2d(around, 3, stride=1)
    back = torch.fft.ifft2(torch.polar(unexpected.exp(), spectrum.angle())).abs().square()
    smooth = blur.blur(back, torch.full((len(back),), SIGMA), SIZE)
    smooth = F.interpolate(smooth, images.shape[-2:], mode="bilinear", align_corners=False)
    flat = images.amax((1, 2, 3)) - images.amin((1, 2, 3)) < 1e-6
    return standardised(smooth).masked_fill(flat[:, None, None, None], 0)


def standardised(maps: Tensor) -> Tensor:
    """(B, 1, H, W), each with mean 0 and standard deviation 1, so that a temperature means the same for all."""
    away = maps - maps.mean((2, 3), keepdim=True)
    return away / away.std((2, 3), keepdim=True).clamp(min=1e-6)
