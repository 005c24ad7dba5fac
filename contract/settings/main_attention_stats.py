"""Attention statistics of a frozen encoder; their formulas stand in ``workers/pooling/attention.py``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import contract.settings as common
from contract.settings.checks import above, at_least, within


@dataclass(kw_only=True)
class Settings(common.Settings):
    encoder: str  # a run directory, an identity, or an encoder's file
    split: Literal["val", "train"] = "val"
    image_size: int | None = None  # stretch the positions for pictures of this side; null: as it is
    eval_crop: float = 1.0
    batch_size: int = 64
    maps: int = 6  # pictures whose attention is drawn; 0: none
    tsne: int = 25  # pictures of each of the first ten classes in the t-SNE; 0: no t-SNE
    log_every: int = 20  # batches

    def __post_init__(self) -> None:
        super().__post_init__()
        above(self, 0, "eval_crop")
        within(self, 0, 1, "eval_crop")
        at_least(self, 1, "image_size", "batch_size", "log_every")
        at_least(self, 0, "maps", "tsne")

    def science(self) -> dict[str, Any]:
        found = super().science()
        found.pop("batch_size")  # every picture counts once, in whatever batches
        return found
