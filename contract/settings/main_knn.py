"""k nearest neighbours on frozen features; the protocols stand in ``workers/main_knn.py``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import contract.settings as common
from contract.settings.checks import SettingsError, above, at_least, within
from contract.settings.features import Vector, check_few, check_oracle


@dataclass(kw_only=True)
class Settings(common.Settings):
    encoder: str  # a run directory, an identity, or an encoder.pt
    features: Vector = "gap"
    k: list[int] = field(default_factory=lambda: [1, 10, 20])
    temperature: float = 0.07
    eval_crop: float = 1.0
    batch_size: int = 256
    temperatures: list[float] = field(default_factory=list, metadata={"absent": []})  # several, in place of the one
    image_size: int | None = field(default=None, metadata={"absent": None})  # stretch the positions; null: as they are
    block: int | None = field(default=None, metadata={"absent": None})  # whose tokens; null: the last, -2: one before
    final_norm: Literal["none", "encoder"] = field(default="none", metadata={"absent": "none"})
    oracle: str | None = field(default=None, metadata={"absent": None})  # the second encoder of features=dino
    shots: int | None = field(default=None, metadata={"absent": None})  # pictures of each class in the bank
    fraction: float | None = field(default=None, metadata={"absent": None})  # or a part of each class
    split_seed: int = field(default=0, metadata={"absent": 0})  # which ones

    def __post_init__(self) -> None:
        super().__post_init__()
        above(self, 0, "temperature", "eval_crop")
        within(self, 0, 1, "eval_crop")
        at_least(self, 1, "batch_size", "image_size")
        at_least(self, 0, "split_seed")
        if not self.k or min(self.k) < 1:
            raise SettingsError(f"k={self.k}: expected a list of numbers from 1, such as [1,10,20]")
        if min(self.temperatures, default=1.0) <= 0:
            raise SettingsError(f"temperatures={self.temperatures}: all must be above 0")
        check_oracle(self.oracle, {self.features})
        check_few(self.shots, self.fraction)
