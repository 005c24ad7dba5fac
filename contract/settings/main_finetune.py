"""End-to-end fine-tuning after MAE (He et al., CVPR 2022, appendix A.1), which is that of BEiT. The names are mostly
those of MAE's program; the defaults suit the embedded digits. The published values: ``recipe=finetune_mae_imagenet``,
``finetune_mae_imagenet_large``, ``finetune_mae_imagenet_huge`` and ``finetune_simmim_imagenet``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from contract.settings import Training
from contract.settings.checks import SettingsError, above, at_least, within

RAND_AUGMENT = r"rand(-(m|n|p|mstd|mmax|inc|w|t)\d+(\.\d+)?)*"


@dataclass(kw_only=True)
class Settings(Training):
    encoder: str  # a run directory, an identity, or an encoder.pt
    epochs: int = 20
    warmup_epochs: float = 2
    blr: float = 4e-3
    min_lr: float = 1e-6
    layer_decay: float = 0.75  # the rate of a block over that of the next
    drop_path: float = 0.1  # of the last block, rising from 0
    pool: Literal["gap", "cls"] = "gap"  # the mean of the patches under a norm of its own, or the class token
    input_size: int | None = None  # null: the encoder's
    smoothing: float = 0.1
    mixup: float = 0.0
    cutmix: float = 0.0
    mixup_prob: float = 1.0
    mixup_switch_prob: float = 0.5
    reprob: float = 0.0  # random erasing
    aa: str | None = None  # timm's RandAugment, such as rand-m9-mstd0.5-inc1
    min_crop: float = 0.6
    hflip: float = 0.0
    eval_crop: float = 1.0  # side of the centre crop over the resized side
    eval_freq: int = 5  # epochs between evaluations; 0: only at the end

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "min_lr", "mixup", "cutmix", "eval_freq")
        at_least(self, 1, "input_size")
        above(self, 0, "layer_decay", "min_crop", "eval_crop")
        within(self, 0, 1, "layer_decay", "drop_path", "smoothing", "min_crop", "hflip", "eval_crop")
        within(self, 0, 1, "mixup_prob", "mixup_switch_prob", "reprob")
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise SettingsError(
                f"batch_size={self.batch_size}: mixup and cutmix pair the pictures of a batch; choose an even number, "
                f"such as {self.batch_size + 1}"
            )
        if self.aa is not None and not re.fullmatch(RAND_AUGMENT, self.aa):
            raise SettingsError(f"aa={self.aa}: expected null, or timm's RandAugment such as rand-m9-mstd0.5-inc1")

    @property
    def local_batch_matters(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0  # one draw for the batch of a process
