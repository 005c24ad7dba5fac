"""An encoder as a file for other programs, and other programs' files as an encoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import contract.settings as common
from contract.settings.checks import at_least


@dataclass(kw_only=True)
class Settings(common.Settings):
    encoder: str  # a run directory, an identity, a file of weights, timm:NAME or timm:NAME@FILE
    format: Literal["timm", "safetensors", "encoder"] = "timm"
    image_size: int | None = None  # stretch the positions for pictures of this side; null: as it is
    checkpoint_key: str | None = None  # which weights, in a published file that holds several; null: the usual ones
    heads: int | None = None  # of a published file whose width does not say; null: 64 dimensions each

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "image_size", "heads")
