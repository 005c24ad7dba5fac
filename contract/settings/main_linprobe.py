"""Linear probe on a frozen encoder, after the MAE protocol (He et al., CVPR 2022, appendix A.1).

The defaults suit the embedded digits; the published values are ``recipe=linprobe_imagenet``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from contract.settings import Training
from contract.settings.checks import SettingsError, above, within


@dataclass(kw_only=True)
class Settings(Training):
    encoder: str  # a run directory, an identity, or an encoder.pt
    features: Literal["cls", "gap"] = "gap"
    optimizer: Literal["lars", "sgd"] = "sgd"
    min_lr: float = 0.0
    augment: Literal["none", "crop"] = "none"
    cache_features: bool = True
    eval_crop: float = 1.0
    epochs: int = 30
    warmup_epochs: float = 3
    batch_size: int = 256
    blr: float = 0.5
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        above(self, 0, "eval_crop")
        within(self, 0, 1, "eval_crop")
        if self.cache_features and self.augment != "none":
            raise SettingsError(
                f"cache_features=true: with augment={self.augment} every epoch sees other pictures; "
                f"set cache_features=false"
            )

    @property
    def local_batch_matters(self) -> bool:
        return True  # BatchNorm sees one process's micro-batch
