"""Networks. A file name is the registry: ``build("vit", kwargs)`` calls ``build`` of ``workers/models/vit.py``."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

Plain = int | float | str | bool | None


class Encoder(nn.Module):
    """What a run hands on in ``encoder.pt``: a network that can be rebuilt from its name and plain arguments."""

    name: str
    kwargs: dict[str, Plain]
    width: int  # D
    image_size: int  # the side of the square pictures it was made for

    def tokens(self, images: Tensor) -> Tensor:
        """The features that evaluations read, a token for the whole picture first: (B, 3, H, W) -> (B, 1 + N, D)."""
        raise NotImplementedError


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
