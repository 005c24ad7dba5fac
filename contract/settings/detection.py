"""What the two workers that train detectors share: the schedule, in iterations, and the published sizes."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, ClassVar

from contract.settings import Stepping
from contract.settings.checks import SettingsError, above, at_least, within
from contract.settings.data import Data


@dataclass(kw_only=True)
class Detecting(Stepping):
    """``blr`` is per 256 pictures, as everywhere; the published 0.02 for 16 pictures is ``lr=0.02``."""

    takes_boxes: ClassVar[bool] = True

    data: Data = field(default_factory=lambda: Data(name="digits_on_photos"))
    iterations: int = 600
    warmup_iterations: int = 50
    warmup_factor: float = 1e-3  # of the rate, at the first iteration; from there it rises linearly
    milestones: list[int] = field(default_factory=lambda: [450, 540])  # iterations; a tenth of the rate from each on
    weight_decay: float = 1e-4  # not on norms
    momentum: float = 0.9
    masks: bool = False  # learn and measure masks, too
    min_sizes: list[int] = field(default_factory=lambda: [192])  # the shorter side in training, drawn for each picture
    test_size: int = 192  # and in evaluation
    max_size: int = 1333  # what the longer side does not exceed
    precise_bn: int = 30  # iterations whose statistics BatchNorm is given before the evaluation; 0: none
    train_sets: list[str] = field(default_factory=list)  # such as [2007_trainval]; []: those of the published protocol
    val_sets: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "iterations", "warmup_iterations", "precise_bn")
        at_least(self, 1, "test_size", "max_size")
        above(self, 0, "warmup_factor")
        within(self, 0, 1, "warmup_factor", "momentum")
        if any(step < 1 for step in self.milestones) or self.milestones != sorted(set(self.milestones)):
            raise SettingsError(f"milestones={self.milestones}: expected iterations from 1 in rising order")
        if not self.min_sizes or min(self.min_sizes) < 1:
            raise SettingsError(f"min_sizes={self.min_sizes}: expected sizes in pixels, such as [480,512,544]")
        for name in ("train_sets", "val_sets"):
            for each in getattr(self, name):
                if not re.fullmatch(r"\w+", each):
                    raise SettingsError(f"{name}={each}: no name of a set, such as 2007_trainval or train2017")
                if self.data.name == "voc" and not re.fullmatch(r"\d{4}_\w+", each):
                    raise SettingsError(f"{name}={each}: VOC's sets are named YEAR_SET, such as 2007_trainval")
        if self.masks and self.data.name == "voc":
            raise SettingsError("masks=true: data=voc has boxes only; choose data=coco")
        if self.data.on_error == "skip":
            raise SettingsError("data.on_error=skip: detections are measured on every picture; choose stop")

    def science(self) -> dict[str, Any]:
        """BatchNorm sees the pictures of all processes, but of one micro-batch."""
        return {**super().science(), "accum_iter": self.accum_iter}
