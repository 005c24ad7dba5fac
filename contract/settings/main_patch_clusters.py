"""Patches grouped by what a frozen encoder makes of them, drawn beside the pictures."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import contract.settings as common
from contract.settings.checks import SettingsError, above, at_least, within


@dataclass(kw_only=True)
class Settings(common.Settings):
    encoder: str  # a run directory, an identity, or an encoder's file
    block: int | None = None  # whose tokens; null: the last, -2: one before
    final_norm: Literal["none", "encoder"] = "none"
    n_clusters: list[int] = field(default_factory=lambda: [2, 4, 8])  # one tree, cut at each
    linkage: Literal["ward", "average", "complete"] = "ward"
    number: int = 8  # pictures
    tsne: bool = True
    split: Literal["val", "train"] = "val"
    image_size: int | None = None  # stretch the positions for pictures of this side; null: as it is
    eval_crop: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        above(self, 0, "eval_crop")
        within(self, 0, 1, "eval_crop")
        at_least(self, 1, "image_size", "number")
        if not self.n_clusters or min(self.n_clusters) < 2:
            raise SettingsError(f"n_clusters={self.n_clusters}: expected a list of numbers from 2, such as [2,4,8]")
