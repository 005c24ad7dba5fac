"""From a file to a uint8 (3, H, W) picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from workers.data import DataError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"})


def read_rgb(path: Path) -> Tensor:
    """Any picture that Pillow reads, upright and in RGB. Raises DataError, naming the path."""
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode in ("I", "I;16", "I;16B", "I;16L", "F"):  # 16 bit: the upper 8, not a clipped range
                pixels = np.asarray(image).astype(np.float64)
                grey = (pixels / (65535 if pixels.max() > 255 else 255) * 255).round().astype(np.uint8)
                image = Image.fromarray(grey)
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: not a readable picture ({error})") from None
