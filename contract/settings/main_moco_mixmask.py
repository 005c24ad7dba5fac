"""MoCo v2 (Chen et al., 2020), MixMask (Vishniakov, Xing, Shen; 2022) and Un-Mix (Shen et al., AAAI 2022). The defaults
train on the embedded digits in minutes; the published values: ``recipe=moco_v2_imagenet``,
``recipe=mixmask_imagenet``, ``recipe=unmix_imagenet``, ``recipe=both_imagenet``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from contract.settings import Training
from contract.settings.checks import SettingsError, above, at_least, within
from contract.settings.resnet import Arch, Schedule, Stem, check_milestones


@dataclass(kw_only=True)
class Settings(Training):
    """``blr`` is per 256 pictures. ``mask_ratio`` is the part that another picture fills, whatever ``mask_type``."""

    epochs: int = 6
    blr: float = 0.06
    weight_decay: float = 1e-4
    momentum: float = 0.9  # of SGD
    schedule: Schedule = "cosine"
    milestones: list[int] = field(
        default_factory=lambda: [120, 160]
    )  # of schedule=steps: a tenth of the rate from here
    lr_every: Literal["step", "epoch"] = "step"  # published: the rate changes once an epoch
    method: Literal["moco", "mixmask", "unmix", "both"] = "mixmask"
    arch: Arch = "resnet10"
    stem: Stem = "imagenet"
    image_size: int = 28
    projector_dim: int = 128
    mlp: bool = True  # two layers; MoCo v1: one
    queue_size: int = 2048
    target_mom: float = 0.99
    temperature: float = 0.2
    bn_splits: int = 1  # parts of a process's batch with statistics of their own; one process then shuffles keys, too
    mask_type: Literal["block", "discrete"] = "block"
    grid_size: int = 7  # cells a side
    mask_ratio: float = 0.5
    redraw: bool = True  # published: a block mask that hides everything is trained on
    unmix_beta: float = 1.0
    unmix_prob: float = 0.5  # of a blend; otherwise a box
    augment: Literal["crop", "v1", "v2"] = "crop"  # v1, v2: MoCo's colours
    min_crop: float = 0.6
    hflip: float = 0.0
    eval_crop: float = 1.0  # side of the centre crop over the resized side
    eval_freq: int = 2  # epochs between k-NN evaluations; 0: never

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "image_size", "projector_dim", "queue_size", "bn_splits")
        at_least(self, 0, "eval_freq")
        above(self, 0, "temperature", "unmix_beta", "min_crop", "eval_crop")
        within(self, 0, 1, "momentum", "target_mom", "unmix_prob", "mask_ratio", "min_crop", "hflip", "eval_crop")
        check_milestones(self.milestones, self.schedule)
        if self.batch_size < 2 * self.bn_splits or self.batch_size % self.bn_splits:
            raise SettingsError(
                f"batch_size={self.batch_size}: expected a multiple of bn_splits={self.bn_splits}, at least "
                f"{2 * self.bn_splits}, since BatchNorm and mixing take two pictures"
            )
        if self.method in ("mixmask", "both"):
            self._check_mask()

    def _check_mask(self) -> None:
        least, cells = 3 if self.mask_type == "block" else 2, self.grid_size**2
        if not least <= self.grid_size <= self.image_size:
            raise SettingsError(
                f"grid_size={self.grid_size}: with mask_type={self.mask_type} and image_size={self.image_size} choose "
                f"{least} to {self.image_size}"
            )
        if not 1 <= round(self.mask_ratio * cells, 6) <= cells - 1:
            raise SettingsError(
                f"mask_ratio={self.mask_ratio}: of {cells} cells some must be hidden and some seen; choose "
                f"{1 / cells:.3g} to {1 - 1 / cells:.3g}"
            )

    @property
    def local_batch_matters(self) -> bool:
        return True  # BatchNorm, shuffling, one mask for each process's batch

    def resolve_batch(self, processes: int, explicit: Iterable[str] = ()) -> None:
        super().resolve_batch(processes, explicit)
        together = self.batch_size * processes
        if self.queue_size % together:
            raise SettingsError(
                f"queue_size={self.queue_size}: not a multiple of batch_size {self.batch_size} x {processes} processes "
                f"= {together}, whose keys replace the oldest together; choose "
                f"{max(1, round(self.queue_size / together)) * together}"
            )

    def science(self) -> dict[str, Any]:
        """The same effective batch in fewer processes with accumulation fills the queue in other portions."""
        return super().science() | ({"accum_iter": self.accum_iter} if self.accum_iter not in (None, 1) else {})
