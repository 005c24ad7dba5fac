"""An encoder as a file of weights that Detectron2 reads."""

from __future__ import annotations

from dataclasses import dataclass

import contract.settings as common
from contract.settings.checks import at_least


@dataclass(kw_only=True)
class Settings(common.Settings):
    encoder: str  # a run directory, an identity, or a published file of a residual network or a vision transformer
    checkpoint_key: str | None = None  # which weights, in a published file that holds several; null: the usual ones
    heads: int | None = None  # of a published file whose width does not say; null: 64 dimensions each

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "heads")
