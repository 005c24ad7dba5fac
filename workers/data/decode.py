"""From a file to a uint8 (3, H, W) picture, whose pixels lie in memory as H x W x 3: crops of those are the fastest."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from workers.data import DataError, Unreadable, shown

try:
    import simplejpeg  # the pixels of Pillow exactly, sooner
except ImportError:
    simplejpeg = None

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
ORIENTATION = 0x0112  # the EXIF tag


def read_rgb(path: Path) -> Tensor:
    """Any picture that Pillow reads, upright, in RGB, alpha left out.

    Raises Unreadable, naming the path; where the disk failed, and not the picture, a DataError that none may skip.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise Unreadable(f"{shown(path)}: no such file") from None
    except (PermissionError, IsADirectoryError) as error:
        raise Unreadable(f"{shown(path)}: {error.strerror}") from None
    except OSError as error:
        raise DataError(f"{shown(path)}: {error.strerror}") from None
    try:
        return from_pixels(_decode(content))
    except MemoryError:
        raise
    except Exception as error:  # Pillow's readers raise whatever a damaged file leads them to
        what = re.sub(r"\s*<_io.BytesIO[^>]*>|\s+", " ", str(error)).strip()
        raise Unreadable(f"{shown(path)}: not a readable picture ({what or type(error).__name__})") from None


def _decode(content: bytes) -> NDArray[np.uint8]:
    """(H, W, 3) uint8."""
    with Image.open(io.BytesIO(content)) as image:
        plain = image.format == "JPEG" and image.mode in ("RGB", "L") and image.getexif().get(ORIENTATION, 1) == 1
        if simplejpeg is not None and plain:
            with contextlib.suppress(ValueError):  # what it refuses, Pillow may read, or say why not
                decoded: NDArray[np.uint8] = simplejpeg.decode_jpeg(content, "RGB")
                return decoded
        upright = ImageOps.exif_transpose(image)
        if upright.mode == "F":
            raise ValueError("floating-point pixels have no known range; store it with 8 or 16 bits")
        if upright.mode.startswith("I"):  # 16 bits, by any of its names: the upper 8
            upright = Image.fromarray((np.asarray(upright).clip(0, 65535) >> 8).astype(np.uint8))
        elif "transparency" in upright.info:
            upright = upright.convert("RGBA")
        return np.array(upright.convert("RGB"))


def from_pixels(pixels: NDArray[np.uint8]) -> Tensor:
    """(H, W, 3) -> (3, H, W), the same memory."""
    return torch.from_numpy(pixels).permute(2, 0, 1)


def shrink(image: Tensor, shorter_side: int) -> Tensor:
    """(3, H, W) uint8 with the shorter side brought down to ``shorter_side``; smaller ones stay. Bicubic."""
    if min(image.shape[-2:]) <= shorter_side:
        return image
    small: Tensor = F.resize(image, [shorter_side], InterpolationMode.BICUBIC, antialias=True)
    return small.permute(1, 2, 0).contiguous().permute(2, 0, 1)
