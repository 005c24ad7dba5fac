"""k nearest neighbours on frozen features; the protocols stand in ``workers/main_knn.py``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import contract.settings as common
from contract.settings.checks import SettingsError, above, at_least


@dataclass(kw_only=True)
class Settings(common.Settings):
    encoder: str  # a run directory, an identity, or an encoder.pt
    features: Literal["cls", "gap"] = "gap"
    k: list[int] = field(default_factory=lambda: [1, 10, 20])
    temperature: float = 0.07
    eval_crop: float = 1.0
    batch_size: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        above(self, 0, "temperature", "eval_crop")
        at_least(self, 1, "batch_size")
        if not self.k or min(self.k) < 1:
            raise SettingsError(f"k={self.k}: expected a list of numbers from 1, such as [1,10,20]")
