"""SimMIM (Xie et al., CVPR 2022) with a ViT; the defaults train on the embedded digits in minutes. The published values
are ``recipe=simmim_imagenet``."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from contract.settings import Training
from contract.settings.checks import SettingsError, above, at_least, within
from contract.settings.main_lmim import Encoder


@dataclass(kw_only=True)
class Settings(Training):
    """``blr`` is per 512 pictures here, as in the published program."""

    epochs: int = 40
    warmup_epochs: float = 2
    blr: float = 2.4e-2
    clip_grad: float | None = 5.0
    warmup_lr_frac: float = 0.005  # of the peak, where the warm-up begins
    milestones: list[int] = field(default_factory=lambda: [35])  # epochs at which the rate falls
    gamma: float = 0.1  # to this part of what it was
    encoder: Encoder = "vit_nano"
    patch_size: int = 4
    input_size: int = 28  # side of the pictures
    mask_patch_size: int = 4  # side of what is hidden or seen as one, in pixels
    mask_ratio: float = 0.6
    bias: Literal["shared", "per_block"] = "shared"  # the table of relative positions
    absolute: bool = False  # and a learned table of absolute ones
    layer_scale: float = 0.1
    drop_path: float = 0.1  # of the last block, rising from 0
    min_crop: float = 0.67
    hflip: float = 0.0
    eval_crop: float = 1.0  # side of the centre crop over the resized side
    eval_freq: int = 5  # epochs between k-NN evaluations; 0: never

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "patch_size", "input_size", "mask_patch_size")
        at_least(self, 0, "eval_freq", "layer_scale")
        above(self, 0, "min_crop", "eval_crop", "gamma")
        within(self, 0, 1, "min_crop", "eval_crop", "hflip", "drop_path", "warmup_lr_frac", "gamma")
        if any(epoch < 1 for epoch in self.milestones) or self.milestones != sorted(set(self.milestones)):
            raise SettingsError(f"milestones={self.milestones}: expected epochs from 1 in rising order, such as [700]")
        if self.mask_patch_size % self.patch_size:
            raise SettingsError(
                f"mask_patch_size={self.mask_patch_size}: must be a multiple of patch_size={self.patch_size}"
            )
        if self.input_size % self.mask_patch_size or self.input_size == self.mask_patch_size:
            raise SettingsError(
                f"input_size={self.input_size}: expected two or more cells a side, of "
                f"mask_patch_size={self.mask_patch_size}; choose {2 * self.mask_patch_size}, "
                f"{3 * self.mask_patch_size}, ..."
            )
        if not 0 < self.mask_ratio < 1 or self.hidden_cells == self.cells:
            raise SettingsError(
                f"mask_ratio={self.mask_ratio}: of {self.cells} cells some must be hidden and some seen; "
                f"choose above 0 and up to {1 - 1 / self.cells:.3g}"
            )

    @property
    def cells(self) -> int:
        return (self.input_size // self.mask_patch_size) ** 2

    @property
    def hidden_cells(self) -> int:
        return math.ceil(self.cells * self.mask_ratio)

    @property
    def peak_lr(self) -> float:
        if self.lr is not None:
            return self.lr
        assert self.effective_batch_size is not None, "resolve_batch comes first"
        return self.blr * self.effective_batch_size / 512
