"""Fine-tuning for detection on torchvision's parts, after Detectron2's R50-C4 as MoCo trains it (He et al., CVPR 2020,
section 4.2.1). The defaults suit digits pasted on photographs; the published values: ``recipe=detection_voc`` and
``recipe=detection_coco``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from contract.settings.checks import SettingsError, at_least, within
from contract.settings.detection import Detecting
from contract.settings.resnet import NEW, Arch


@dataclass(kw_only=True)
class Settings(Detecting):
    encoder: str = "new:resnet10_slim"  # a run directory, an identity, a published file of a ResNet, new:ARCH
    arch: Arch | None = None  # what the encoder has to be; null: whatever it is
    batch_size: int = 8
    blr: float = 1.6  # 0.05 for 8 pictures
    head: Literal["c4", "fpn"] = "c4"  # the fourth stage on every region, or a pyramid of maps
    extra_norm: bool = True  # a BatchNorm after the fourth stage; of head=c4
    anchor_sizes: list[int] = field(default_factory=lambda: [24, 36, 48, 72, 96])  # of head=fpn: one for each of 5 maps
    rois: int = 32  # regions of a picture that the head learns from
    roi_size: int = 8  # side of the map that a region is pooled to, which the fourth stage halves; masks have it, too
    proposals: int = 100  # regions of a picture that are looked at in evaluation
    hflip: float = 0.0
    metric: Literal["own", "coco", "voc07", "voc"] = "own"  # own: as the data set's own program measures

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "rois", "proposals")
        at_least(self, 2, "roi_size")
        within(self, 0, 1, "hflip")
        if self.arch is not None and self.encoder.startswith(NEW) and self.encoder != NEW + self.arch:
            raise SettingsError(
                f"encoder={self.encoder}: but arch={self.arch}; give a run or a file, or {NEW}{self.arch}"
            )
        if not self.anchor_sizes or min(self.anchor_sizes) < 1:
            raise SettingsError(f"anchor_sizes={self.anchor_sizes}: expected sizes in pixels, such as [32,64,128]")
        if self.head == "fpn" and len(self.anchor_sizes) != 5:
            raise SettingsError(f"anchor_sizes={self.anchor_sizes}: head=fpn has five maps, and one size for each")
