"""Fine-tuning with Detectron2, where it is installed: R50-C4 as MoCo's and MixMask's programs set it. The defaults are
the published values for VOC; ``recipe=detectron_coco`` has those for COCO."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from contract.settings.checks import SettingsError
from contract.settings.data import Data
from contract.settings.detection import Detecting


def _voc() -> Data:
    return Data(name="voc", classes=20)


@dataclass(kw_only=True)
class Settings(Detecting):
    encoder: str  # a run directory, an identity, or a published file of a ResNet
    data: Data = field(default_factory=_voc)
    iterations: int = 24000
    warmup_iterations: int = 100
    milestones: list[int] = field(default_factory=lambda: [18000, 22000])
    batch_size: int = 2  # of each of 8 GPUs
    effective_batch_size: int | None = 16
    lr: float | None = 0.02
    min_sizes: list[int] = field(default_factory=lambda: [480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800])
    test_size: int = 800
    precise_bn: int = 200
    norm: Literal["SyncBN", "naiveSyncBN"] = "SyncBN"  # MoCo's own program: naiveSyncBN

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data.name not in ("voc", "coco"):
            raise SettingsError(
                f"data={self.data.name}: Detectron2 reads data=voc and data=coco; worker=main_detection takes it"
            )
        if self.clip_grad is not None:
            raise SettingsError(f"clip_grad={self.clip_grad}: the published runs clip nothing; leave it null")
        if self.amp == "bf16":
            raise SettingsError("amp=bf16: Detectron2's own is fp16; choose none, as published, or fp16")

    def resolve_batch(self, processes: int, explicit: Iterable[str] = ()) -> None:
        super().resolve_batch(processes, explicit)
        if self.accum_iter != 1:
            raise SettingsError(
                f"effective_batch_size={self.effective_batch_size}: Detectron2 does not accumulate; with {processes} "
                f"processes batch_size={self.batch_size} gives {self.batch_size * processes}"
            )
