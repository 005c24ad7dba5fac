"""MIM across eye movements (Weiler et al., arXiv 2404.08526). The defaults train on the embedded digits in minutes; the
published values are ``recipe=eyemim_stl10``."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from contract.rundir import RUN
from contract.settings import Training
from contract.settings.checks import SettingsError, above, at_least, within

STAGES = 3  # of the network; each halves the side
BLUR_SIDE = 33  # of the heavy blur's kernel


@dataclass(kw_only=True)
class Readout:
    """A linear layer on the whole last map, trained by Adam until a part of its pictures, kept back, says stop."""

    epochs: int = 1000  # at most; 0: no read-out
    lr: float = 1e-4
    weight_decay: float = 1e-8
    batch_size: int = 512
    patience: int = 10
    min_delta: float = 1e-4
    holdout: float = 0.2  # of the training pictures

    def __post_init__(self) -> None:
        at_least(self, 0, "epochs", "lr", "weight_decay", "min_delta")
        at_least(self, 1, "batch_size", "patience")
        if not 0 < self.holdout < 1:
            raise SettingsError(f"readout.holdout={self.holdout}: must be above 0 and below 1")


@dataclass(kw_only=True)
class Settings(Training):
    epochs: int = 20
    blr: float = 4e-3
    weight_decay: float = 1e-8
    image_size: int = 32
    channels: int = 16  # of the first stage; each has twice those of the one before
    masking_mode: Literal["random_patches", "periphery", "foveate", "none"] = "random_patches"
    masking_ratio: float = 0.6  # of the picture; foveate and none hide what they hide
    patch_size: int = 4  # of random_patches
    blur: Literal["none", "replace", "published"] = "none"  # what is seen in the hidden part
    random_crop: bool = True
    color_jitter: bool = False
    attention: bool = False  # a second visible disc, in mode periphery
    antialias: bool = False  # of the halvings of foveate
    clamp_weights: bool = False  # blend between the levels of foveate, not beyond
    segments_path: str | None = None  # masks of the main object; null: the loss is on all that is hidden
    remove_missing: bool = False  # pictures without a mask; false: the loss is on all of theirs that is hidden
    background: bool = False  # the loss on what is not the object instead
    eval_crop: float = 1.0
    eval_freq: int = 5  # epochs between k-NN evaluations; 0: never
    readout: Readout = field(default_factory=Readout)
    cache_gb: float = 4.0  # the most that the read-out's features may take, per process

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "channels", "patch_size")
        at_least(self, 0, "eval_freq")
        above(self, 0, "eval_crop", "cache_gb")
        within(self, 0, 1, "masking_ratio", "eval_crop")
        step = 2**STAGES
        if self.image_size < step or self.image_size % step:
            raise SettingsError(f"image_size={self.image_size}: must be a multiple of {step}")
        if self.batch_size < 2:
            raise SettingsError(f"batch_size={self.batch_size}: covariances need at least 2 pictures")
        self._check_masking()
        if self.segments_path is not None:
            self.segments_path = str(Path(self.segments_path).absolute())  # the worker stands elsewhere
        if self.segments_path is None:
            for key in ("remove_missing", "background"):
                if getattr(self, key):
                    raise SettingsError(f"{key}=true: needs masks of the main object; give segments_path=FOLDER")

    def _check_masking(self) -> None:
        mode, ratio, side = self.masking_mode, self.masking_ratio, self.image_size
        if mode == "random_patches":
            if side % self.patch_size:
                raise SettingsError(f"patch_size={self.patch_size}: must divide image_size={side}")
            patches = (side // self.patch_size) ** 2
            if not 0 < int(patches * ratio) < patches:
                raise SettingsError(
                    f"masking_ratio={ratio}: hides {int(patches * ratio)} of {patches} patches; hide some, not all"
                )
        if mode == "periphery":
            radius = int(math.sqrt(side**2 * (1 - ratio) / math.pi))
            if not 1 <= radius < side / 2**0.5:
                raise SettingsError(
                    f"masking_ratio={ratio}: leaves a disc of radius {radius} of {side} x {side} pixels; "
                    f"hide some, not all"
                )
        if self.blur != "none" and side <= BLUR_SIDE // 2:
            raise SettingsError(f"blur={self.blur}: its {BLUR_SIDE} pixels need image_size above {BLUR_SIDE // 2}")
        for key, only in (("attention", "periphery"), ("antialias", "foveate"), ("clamp_weights", "foveate")):
            if getattr(self, key) and mode != only:
                raise SettingsError(f"{key}=true: of masking_mode={only} only, not {mode}")

    def science(self) -> dict[str, Any]:
        """A run that made masks is known by its identity, wherever it lies."""
        found = super().science()
        if self.segments_path is not None and (Path(self.segments_path) / RUN).is_file():
            found["segments_path"] = Path(self.segments_path).name
        return found

    @property
    def local_batch_matters(self) -> bool:
        return True  # covariance and unit sparsity are of one process's batch, and so is the loss with segments
