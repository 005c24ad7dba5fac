"""Networks. A file name is the registry: ``build("vit", kwargs)`` calls ``build`` of ``workers/models/vit.py``."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

Plain = int | float | str | bool | None
RGB = tuple[float, float, float]


@dataclass(frozen=True)
class Look:
    """What one block does to the tokens of a batch, for statistics and for pooling by attention."""

    input: Tensor  # (B, T, D)
    logits: Tensor  # (B, H, T, T) query by key, before the softmax
    branch: Tensor  # (B, T, D) what the attention branch puts out after its projection, before any layer scale
    output: Tensor  # (B, T, D)


class Encoder(nn.Module):
    """What a run hands on in ``encoder.pt``: a network that can be rebuilt from its name and plain arguments."""

    name: str
    kwargs: dict[str, Plain]
    width: int  # D
    depth: int  # blocks
    heads: int  # H
    grid: tuple[int, int]  # rows and columns of patches
    image_size: int  # the side of the square pictures it was made for
    has_cls: bool = True  # False: tokens() puts zeros in the place of the token for the whole picture
    mean: RGB | None = None  # the pixel normalisation that it was trained with; None: that of the data set
    std: RGB | None = None

    def tokens(self, images: Tensor, *, block: int | None = None) -> Tensor:
        """The output of a block, before the final norm, a token for the whole picture first: -> (B, 1 + N, D).

        ``images`` is (B, 3, H, W). ``block`` counts from 0, or from the end where negative; None is the last.
        """
        raise NotImplementedError

    def final(self, tokens: Tensor) -> Tensor:
        """The encoder's own last norm: (B, 1 + N, D) -> (B, 1 + N, D). Zeros in the first place stay zeros."""
        raise NotImplementedError

    def look(self, images: Tensor) -> Iterator[Look]:
        """All blocks in order, one at a time. T is 1 + N, or N where ``has_cls`` is False."""
        raise NotImplementedError

    def through(self, block: int | None) -> int:
        """How many blocks have to run for the output of ``block``."""
        if block is not None and not -self.depth <= block < self.depth:
            raise ValueError(f"block={block}: the encoder has blocks {-self.depth} to {self.depth - 1}")
        return self.depth if block is None else block % self.depth + 1


def build(name: str, kwargs: Mapping[str, Plain]) -> Encoder:
    """A freshly initialised encoder; it remembers ``name`` and ``kwargs``."""
    files = (p.stem for p in Path(__file__).parent.glob("*.py"))
    names = sorted(stem for stem in files if stem != "__init__" and "decoder" not in stem)
    if name not in names:
        raise ValueError(f"encoder {name!r}: unknown; choose one of {', '.join(names)}")
    encoder = importlib.import_module(f"workers.models.{name}").build(**kwargs)
    assert isinstance(encoder, Encoder)
    encoder.name, encoder.kwargs = name, dict(kwargs)
    return encoder
