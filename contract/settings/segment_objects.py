"""Masks of the main object of every training picture, for the loss of ``worker=main_eyemim``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import contract.settings as common
from contract.settings.checks import SettingsError, at_least, within


@dataclass(kw_only=True)
class Settings(common.Settings):
    model: Literal["contrast", "onnx", "rembg", "folder"] = "contrast"
    model_path: str | None = None  # the .onnx, or the folder of ready masks
    rembg_model: str = "u2net"  # by rembg's name
    image_size: int = 32  # as that of main_eyemim
    min_pixels: int = 100  # of a mask that is kept
    min_confidence: float = 0.8  # of these pixels
    keep_all: bool = False  # keep every mask, whatever the filter says
    log_every: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "image_size", "min_pixels", "log_every")
        within(self, 0, 1, "min_confidence")
        needs = {"onnx": "the .onnx file", "folder": "the folder of masks"}
        if self.model in needs and self.model_path is None:
            raise SettingsError(f"model={self.model}: give model_path, {needs[self.model]}")
        if self.model not in needs and self.model_path is not None:
            raise SettingsError(f"model_path={self.model_path}: of model=onnx and model=folder only, not {self.model}")
        if self.model_path is not None:
            self.model_path = str(Path(self.model_path).absolute())  # the worker stands elsewhere
        if self.min_pixels > self.image_size**2:
            raise SettingsError(
                f"min_pixels={self.min_pixels}: a picture has {self.image_size**2}; choose at most that many"
            )
