"""What a frozen encoder says of pictures: every pooling that was asked for, out of one pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from contract.settings import Settings
from contract.settings.checks import SettingsError
from workers.models import Encoder
from workers.pooling import tokens as pooling

from . import distributed

TOKENS = "abmilp"  # the pooling that is trained: its input is all tokens


class Reading(NamedTuple):
    """A pooling of the tokens of a block, counted from 0."""

    features: str
    block: int


class Frozen:
    """Pictures (B, 3, H, W) -> for every reading a vector (B, D), or tokens (B, 1 + N, D).

    Tokens are a block's outputs, before the final norm unless ``final_norm``. The encoder runs once, no further than
    the last block that is read, and makes attention maps only where a pooling needs them. Raises SettingsError where
    the encoder cannot give what is asked.
    """

    def __init__(
        self,
        encoder: Encoder,
        readings: Sequence[Reading],
        *,
        final_norm: bool = False,
        oracle: Encoder | None = None,
        to_oracle: Callable[[Tensor], Tensor] = lambda images: images,
    ):
        self.encoder, self.readings, self.final_norm = encoder.eval(), list(dict.fromkeys(readings)), final_norm
        self.oracle, self.to_oracle = oracle, to_oracle
        for features, _ in self.readings:
            if features in pooling.NEED_CLS and not encoder.has_cls:
                valid = [kind for kind in pooling.KINDS if kind not in pooling.NEED_CLS]
                raise SettingsError(
                    f"features={features}: this encoder has no class token; choose {', '.join([*valid, TOKENS])}"
                )
        if oracle is not None:
            oracle.eval()
            if not oracle.has_cls or (oracle.image_size, oracle.grid) != (encoder.image_size, encoder.grid):
                raise SettingsError(
                    f"oracle: pictures of {oracle.image_size} pixels in {oracle.grid} patches, class token: "
                    f"{oracle.has_cls}; features=dino needs {encoder.image_size} in {encoder.grid}, and a class token"
                )
        self.blocks = sorted({block for _, block in self.readings})
        self.attending = any(f in pooling.ATTENDING and f != "dino" for f, _ in self.readings)
        blank = torch.zeros(1, 3, encoder.image_size, encoder.image_size, device=distributed.device())
        self.looks = self.attending or (len(self.blocks) > 1 and _can_look(encoder, blank))
        try:
            self.shapes = {reading: tuple(x.shape[1:]) for reading, x in self(blank).items()}
        except ValueError as error:
            raise SettingsError(f"features={','.join(f for f, _ in self.readings)}: {error}") from error

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[Reading, Tensor]:
        oracle = self._oracle_logits(images)
        found: dict[Reading, Tensor] = {}
        for block, tokens, logits in self._outputs(images):
            if self.final_norm:
                tokens = self.encoder.final(tokens)
            for reading in self.readings:
                if reading.block == block:
                    kind = reading.features
                    attention = oracle if kind == "dino" else logits
                    found[reading] = (tokens if kind == TOKENS else pooling.pool(tokens, kind, attention)).float()
        return {reading: found[reading] for reading in self.readings}

    def _outputs(self, images: Tensor) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """(block, tokens (B, 1 + N, D), logits) of the blocks that are read."""
        if not self.looks:
            for block in self.blocks:
                yield block, self.encoder.tokens(images, block=block), None
            return
        for block, look in enumerate(self.encoder.look(images)):
            if block in self.blocks:
                tokens = look.output
                if not self.encoder.has_cls:
                    tokens = torch.nn.functional.pad(tokens, (0, 0, 1, 0))
                yield block, tokens, look.logits
            if block == self.blocks[-1]:
                return

    def _oracle_logits(self, images: Tensor) -> Tensor | None:
        """(B, H, T, T) of the oracle's last block."""
        logits = None
        if self.oracle is not None:
            for look in self.oracle.look(self.to_oracle(images)):
                logits = look.logits
        return logits

    # -- as one matrix, to be kept ------------------------------------------------------------------------------------

    @property
    def width(self) -> int:
        """How many numbers a picture takes."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def packed(self, images: Tensor) -> Tensor:
        """All readings side by side: (B, 3, H, W) -> (B, width)."""
        return torch.cat([x.flatten(1) for x in self(images).values()], dim=1)

    def unpack(self, x: Tensor) -> dict[Reading, Tensor]:
        """The inverse of the packing: (B, width) -> the readings."""
        parts = torch.split(x, [math.prod(shape) for shape in self.shapes.values()], dim=1)
        return {key: part.reshape(-1, *shape) for (key, shape), part in zip(self.shapes.items(), parts, strict=True)}


@torch.no_grad()
def _can_look(encoder: Encoder, images: Tensor) -> bool:
    """Whether it gives all blocks in one pass; some networks have no attention to show."""
    try:
        next(iter(encoder.look(images)))
    except ValueError:
        return False
    return True


def block_of(encoder: Encoder, block: int | None) -> int:
    """``block`` counted from 0; None is the last. Raises SettingsError, naming the range."""
    try:
        return encoder.through(block) - 1
    except ValueError as error:
        raise SettingsError(str(error)) from None


def renormalised(settings: Settings, encoder: Encoder, oracle: Encoder | None) -> Callable[[Tensor], Tensor]:
    """From the encoder's normalisation of pixels to the oracle's."""

    def pixels(of: Encoder | None, each: str) -> Tensor:
        values = getattr(of, each, None) or getattr(settings.data, each)
        return torch.tensor(values, device=distributed.device()).view(3, 1, 1)

    mean, std = pixels(encoder, "mean"), pixels(encoder, "std")
    scale, shift = std / pixels(oracle, "std"), (mean - pixels(oracle, "mean")) / pixels(oracle, "std")
    return lambda images: images * scale + shift
