"""A contact sheet of what a model would see."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import contract.settings as common
from contract.settings.checks import SettingsError, at_least, within
from contract.settings.views import Views


@dataclass(kw_only=True)
class Settings(Views, common.Settings):
    image_size: int = 96
    number: int = 8  # pictures
    n_views: int = 6  # of each
    split: Literal["val", "train"] = "train"
    saliency: Literal["contrast", "spectral_residual"] = "contrast"  # for the views that look where maps say
    masking_mode: Literal["none", "random_patches", "periphery", "foveate"] = (
        "none"  # else: as main_eyemim, not augment
    )
    masking_ratio: float = 0.6
    masking_blur: Literal["off", "replace", "published"] = "off"
    random_crop: bool = True
    mask_patch_size: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_views()
        at_least(self, 8, "image_size")
        at_least(self, 1, "number", "n_views", "mask_patch_size")
        within(self, 0, 1, "masking_ratio")
        if self.masking_mode == "random_patches" and self.image_size % self.mask_patch_size:
            raise SettingsError(f"mask_patch_size={self.mask_patch_size}: must divide image_size={self.image_size}")
