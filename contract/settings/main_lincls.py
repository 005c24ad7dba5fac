"""Linear classification of a frozen residual network as MoCo measures it (He et al., CVPR 2020, section 4.1), and, with
``freeze=false``, training of the whole network on all labels or few.

The defaults suit the embedded digits; the published values: ``recipe=lincls_imagenet``, ``recipe=semisup_imagenet``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from contract.settings import Training
from contract.settings.checks import SettingsError, above, at_least, within
from contract.settings.features import check_few
from contract.settings.resnet import Schedule, check_milestones


@dataclass(kw_only=True)
class Settings(Training):
    """``blr`` and ``backbone_blr`` are per 256 pictures."""

    encoder: str  # a run directory, an identity, an encoder.pt, or a published file
    freeze: bool = True
    epochs: int = 10
    batch_size: int = 256
    blr: float = 1.0  # of the classifier; MoCo's 30 is for features of a larger network
    backbone_blr: float | None = None  # of everything else; for freeze=false
    weight_decay: float = 0.0
    momentum: float = 0.9
    schedule: Schedule = "steps"
    milestones: list[int] = field(default_factory=lambda: [6, 8])  # of schedule=steps: a tenth of the rate from here
    lr_every: Literal["step", "epoch"] = "epoch"
    min_crop: float = 0.6
    hflip: float = 0.0
    eval_crop: float = 1.0  # side of the centre crop over the resized side
    shots: int | None = None  # training pictures of each class
    fraction: float | None = None  # or a part of each class
    split_seed: int = 0  # which ones
    eval_freq: int = 1  # epochs between evaluations; 0: only after the last

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "eval_freq", "split_seed", "backbone_blr")
        above(self, 0, "min_crop", "eval_crop")
        within(self, 0, 1, "momentum", "min_crop", "hflip", "eval_crop")
        check_few(self.shots, self.fraction)
        check_milestones(self.milestones, self.schedule)
        if self.freeze and self.backbone_blr is not None:
            raise SettingsError(f"backbone_blr={self.backbone_blr}: with freeze=true nothing but the classifier learns")
        if not self.freeze and self.backbone_blr is None:
            raise SettingsError("backbone_blr=null: with freeze=false say how fast the network learns, such as 0.005")
        if not self.freeze and self.blr == 0:
            raise SettingsError("blr=0: the classifier must learn; choose above 0, such as 0.5")

    @property
    def backbone_scale(self) -> float:
        """The network's rate over the classifier's."""
        assert self.backbone_blr is not None
        return self.backbone_blr / self.blr

    @property
    def local_batch_matters(self) -> bool:
        return not self.freeze  # BatchNorm sees one process's micro-batch
