"""SimCLR (Chen et al., ICML 2020) with biological augmentations (Wang et al., SVRHM 2021, arXiv 2112.07173). The
defaults train on the embedded digits in minutes; the published runs: ``recipe=bio_simclr_stl10``."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from contract.settings import Training
from contract.settings.checks import SettingsError, above, at_least
from contract.settings.resnet import Arch, Stem
from contract.settings.views import Views

ENDS = 1 << 20  # bytes at the beginning and at the end of a file of maps by which it is known


@dataclass(kw_only=True)
class Linear:
    """The linear evaluation: one layer, by Adam, on features that are computed once."""

    epochs: int = 100  # 0: none
    lr: float = 3e-3
    weight_decay: float = 0.0
    batch_size: int = 256
    image_size: int | None = None  # null: that of the training; published: 224
    bn_mode: Literal["eval", "train"] = "eval"  # published: statistics of the batch that is evaluated
    drop_last: bool = False  # published: pictures that fill no batch are left out

    def __post_init__(self) -> None:
        at_least(self, 0, "epochs", "lr", "weight_decay")
        at_least(self, 1, "batch_size", "image_size")


@dataclass(kw_only=True)
class Settings(Views, Training):
    """``blr`` is per 256 pictures, of which each has two views."""

    epochs: int = 10
    batch_size: int = 128
    blr: float = 2e-3
    weight_decay: float = 1e-4  # of Adam, in the gradient
    schedule: Literal["cosine", "published"] = "cosine"
    lr_every: Literal["step", "epoch"] = "step"  # when the rate changes
    period: int = 390  # of schedule=published: epochs from epoch 10 on until the rate would be 0
    arch: Arch = "resnet10"
    stem: Stem = "imagenet"
    image_size: int = 28
    projector_dim: int = 64
    temperature: float = 0.2
    saliency: Literal["file", "spectral_residual", "contrast"] = "file"  # the latter two are computed on the way
    saliency_path: str | None = None  # of saliency=file: a run of make_saliency or a .npy file; there or in data_path
    linear: Linear = field(default_factory=Linear)
    eval_freq: int = 2  # epochs between evaluations; 0: only at the end

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.saliency_path is not None and Path(self.saliency_path).exists():
            self.saliency_path = str(Path(self.saliency_path).resolve())  # the worker stands elsewhere
        at_least(self, 1, "image_size", "projector_dim", "period")
        at_least(self, 0, "eval_freq")
        above(self, 0, "temperature")
        self.check_views()
        if self.batch_size < 2:
            raise SettingsError(f"batch_size={self.batch_size}: must be at least 2, or there is nothing to tell apart")
        if self.schedule == "published" and self.warmup_epochs:
            raise SettingsError(f"warmup_epochs={self.warmup_epochs}: schedule=published has none; use schedule=cosine")
        if self.needs_maps and self.saliency == "file" and self.saliency_path is None:
            raise SettingsError(
                f"saliency_path=null: augment={self.augment} looks where maps say; give those of worker=make_saliency, "
                "or saliency=spectral_residual or contrast, which are computed on the way"
            )
        if self.saliency_path is not None and not (self.needs_maps and self.saliency == "file"):
            raise SettingsError(
                f"saliency_path={self.saliency_path}: augment={self.augment} with saliency={self.saliency} reads no "
                "maps; leave it out"
            )

    @property
    def local_batch_matters(self) -> bool:
        return True  # BatchNorm

    def science(self) -> dict[str, Any]:
        """The same effective batch by accumulation has fewer pictures to tell apart. A run that made maps is known by
        its identity, and a file by its name and what is in it, wherever they lie."""
        found = super().science()
        if self.accum_iter not in (None, 1):
            found["accum_iter"] = self.accum_iter
        if self.saliency_path is not None:
            found["saliency_path"] = _known_as(Path(self.saliency_path))
        return found


def _known_as(path: Path) -> str:
    """Its name, and for a file that is here its size and a hash of its two ends: gigabytes are not read for this."""
    if not path.is_file():
        return path.name
    with path.open("rb") as file:
        size = file.seek(0, 2)
        ends = b""
        for at in (0, max(size - ENDS, 0)):
            file.seek(at)
            ends += file.read(ENDS)
    return f"{path.name}:{size}:{hashlib.blake2b(ends, digest_size=6).hexdigest()}"
