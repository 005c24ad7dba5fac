"""The convolutional autoencoder of MIM across eye movements (Weiler et al., arXiv 2404.08526), as published.

Residual blocks of two 3 x 3 convolutions without normalisation; a ReLU follows each. Three stages of three blocks halve
the side and widen the map; the decoder is the mirror image and ends in a sigmoid. The published blocks own a 1 x 1
convolution for their skip even where input and output have the same shape and nothing passes it; here those are left
out, which changes nothing but the number of parameters. ``published`` renames a published state.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workers.models import Encoder, Look

BLOCKS = 3  # of a stage; the first halves the side


class Block(nn.Module):
    """relu(conv(relu(conv(x))) + x): (B, C, H, W) -> (B, C', H / stride, W / stride)."""

    def __init__(self, channels: int, out: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, padding=1)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.skip = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        every = x[..., :: self.stride, :: self.stride]  # a stride in a 1 x 1 convolution crashes torch 2.14 here
        return F.relu(self.conv2(F.relu(self.conv1(x))) + self.skip(every))


class UpBlock(nn.Module):
    """The same with transposed convolutions: (B, C, H, W) -> (B, C', H * stride, W * stride). ``last``: a sigmoid."""

    def __init__(self, channels: int, out: int, stride: int = 1, *, last: bool = False):
        super().__init__()
        self.conv1 = nn.ConvTranspose2d(channels, out, 3, stride, padding=1, output_padding=stride - 1)
        self.conv2 = nn.ConvTranspose2d(out, out, 3, padding=1)
        self.skip = nn.ConvTranspose2d(channels, out, 1, stride, output_padding=stride - 1) if channels != out else None
        self.stride, self.last = stride, last

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(F.relu(self.conv1(x)))
        if self.skip is None:
            y = y + x
        else:  # transposed and 1 x 1: the pixels apart, with nothing but the bias between them
            assert self.skip.bias is not None
            y = y + self.skip.bias[:, None, None]
            y[..., :: self.stride, :: self.stride] += F.conv2d(x, self.skip.weight.transpose(0, 1))
        return y.sigmoid() if self.last else F.relu(y)


class ConvEncoder(Encoder):
    """Its stages are the ``blocks``; the token for the whole picture is the mean of the stage's map.

    A stage other than the last has fewer channels than ``width``. There is no attention to look at. Pixels are in
    [0, 1], without any other normalisation.
    """

    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)

    def __init__(self, widths: Sequence[int], image_size: int):
        super().__init__()
        check_side(image_size, len(widths))
        self.width, self.depth, self.heads = widths[-1], len(widths), 1
        self.image_size = image_size
        self.grid = (image_size // 2**self.depth, image_size // 2**self.depth)
        self.blocks = nn.Sequential()
        before = 3
        for width in widths:
            self.blocks.extend([Block(before, width, 2), *(Block(width, width) for _ in range(BLOCKS - 1))])
            before = width
        self.to(memory_format=torch.channels_last)  # convolutions are quicker so, on the CPU too

    def forward(self, images: Tensor) -> Tensor:
        """Pixels in [0, 1], (B, 3, H, W) -> the last map (B, D, h, w)."""
        return self.map(images, self.depth)

    def map(self, images: Tensor, stages: int) -> Tensor:
        x = images.contiguous(memory_format=torch.channels_last)
        for block in self.blocks[: BLOCKS * stages]:
            x = block(x)
        return x

    def tokens(self, images: Tensor, *, block: int | None = None) -> Tensor:
        """The mean of a stage's map (None: the last), then the map: (B, 1 + h w, D)."""
        found = self.map(images, self.through(block)).flatten(2).transpose(1, 2)
        return torch.cat([found.mean(1, keepdim=True), found], dim=1)

    def final(self, tokens: Tensor) -> Tensor:
        """As they are: there is no norm after the last stage."""
        return tokens

    def look(self, images: Tensor) -> Iterator[Look]:
        raise ValueError("conv_autoencoder: a convolutional network has no attention to look at")


class ConvDecoder(nn.Module):
    """(B, D, h, w) -> pixels in [0, 1], (B, 3, H, W)."""

    def __init__(self, widths: Sequence[int]):
        super().__init__()
        self.blocks = nn.Sequential()
        for width, after in zip(widths[::-1], [*widths[-2::-1], 3], strict=True):
            self.blocks.extend([UpBlock(width, width) for _ in range(BLOCKS - 1)])
            self.blocks.append(UpBlock(width, after, 2, last=after == 3))
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.blocks(x)
        return out


def check_side(image_size: int, stages: int) -> None:
    if image_size < 2**stages or image_size % 2**stages:
        raise ValueError(f"image_size={image_size}: {stages} halvings need a multiple of {2**stages}")


def widths_of(first: int, stages: int) -> list[int]:
    """Every stage has twice the channels of the one before."""
    return [first * 2**i for i in range(stages)]


def published(state: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    """Of a published state the ``part`` (``encoder`` or ``decoder``) under our names, without the skips that nothing
    passes."""
    names = {"upconv1": "conv1", "upconv2": "conv2", "conv1": "conv1", "conv2": "conv2", "match_dim": "skip"}
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        match = re.fullmatch(rf"{part}\.(\d+)\.(\w+)\.(weight|bias)", key)
        if match is None:
            continue
        number, layer, kind = match.groups()
        weight = state[f"{part}.{number}.{layer}.weight"]
        if layer == "match_dim" and weight.shape[0] == weight.shape[1]:
            continue
        found[f"blocks.{int(number) // 2}.{names[layer]}.{kind}"] = value  # the odd places are ReLUs
    return found


def build(first: int = 32, stages: int = 3, image_size: int = 96) -> ConvEncoder:
    if first < 1 or stages < 1:
        raise ValueError(f"first={first}, stages={stages}: both must be at least 1")
    return ConvEncoder(widths_of(first, stages), image_size)
