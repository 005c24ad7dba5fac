"""Linear probe on a frozen encoder, after the MAE protocol (He et al., CVPR 2022, appendix A.1), on any pooling of its
tokens (Przewięźlikowski et al., ICCV 2025).

The defaults suit the embedded digits; the published values are ``recipe=linprobe_imagenet`` and
``recipe=abmilp_imagenet``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from contract.settings import Training
from contract.settings.checks import SettingsError, above, at_least, within
from contract.settings.features import AbMILP, Features, Head, Optimizer, all_heads, check_few, check_oracle


@dataclass(kw_only=True)
class Settings(Training):
    encoder: str  # a run directory, an identity, or an encoder.pt
    features: Features = "gap"
    optimizer: Optimizer = "sgd"
    min_lr: float = 0.0
    augment: Literal["none", "crop", "mae"] = "none"
    cache_features: bool = True
    eval_crop: float = 1.0
    epochs: int = 30
    warmup_epochs: float = 3
    batch_size: int = 256
    blr: float = 0.5
    weight_decay: float = 0.0
    image_size: int | None = field(default=None, metadata={"absent": None})  # stretch the positions; null: as they are
    block: int | None = field(default=None, metadata={"absent": None})  # whose tokens; null: the last, -2: one before
    final_norm: Literal["none", "encoder"] = field(default="none", metadata={"absent": "none"})
    abmilp: AbMILP = field(default_factory=AbMILP, metadata={"absent": AbMILP()})
    oracle: str | None = field(default=None, metadata={"absent": None})  # the second encoder of features=dino
    heads: list[str] = field(default_factory=list, metadata={"absent": []})  # several in one pass; replaces features
    head_init: Literal["mae", "torch"] = field(default="mae", metadata={"absent": "mae"})
    momentum: float = field(default=0.9, metadata={"absent": 0.9})
    sync_bn: bool = field(default=False, metadata={"absent": False})  # BatchNorm over all processes
    shots: int | None = field(default=None, metadata={"absent": None})  # training pictures of each class
    fraction: float | None = field(default=None, metadata={"absent": None})  # or a part of each class
    split_seed: int = field(default=0, metadata={"absent": 0})  # which ones
    eval_freq: int | None = field(default=None, metadata={"absent": None})  # epochs; null: ten times in all
    cache_gb: float = 4.0  # the most that cached features may take, per process

    def __post_init__(self) -> None:
        super().__post_init__()
        above(self, 0, "eval_crop", "cache_gb")
        within(self, 0, 1, "eval_crop", "momentum")
        at_least(self, 0, "min_lr", "split_seed")
        at_least(self, 1, "eval_freq", "image_size")
        if self.cache_features and self.augment != "none":
            raise SettingsError(
                f"cache_features=true: with augment={self.augment} every epoch sees other pictures; "
                f"set cache_features=false"
            )
        check_few(self.shots, self.fraction)
        heads = self.all_heads
        check_oracle(self.oracle, {each.features for each in heads})
        rates = {each.blr for each in heads}
        if self.lr is not None and rates != {None}:
            raise SettingsError(f"lr={self.lr}: heads={self._said} have rates of their own; leave lr out")
        if len(rates) > 1 and self.min_lr:
            raise SettingsError(f"min_lr={self.min_lr}: one floor does not fit the several rates of heads={self._said}")
        if len(heads) > 1 and self.clip_grad is not None:
            raise SettingsError(f"clip_grad={self.clip_grad}: would tie the heads={self._said} together; leave it out")

    @property
    def _said(self) -> str:
        return f"[{','.join(self.heads)}]"

    @property
    def all_heads(self) -> list[Head]:
        """Those of ``heads``, or the one that ``features`` and ``block`` say."""
        return all_heads(self.heads) or [Head(features=self.features, block=self.block)]

    def peak_of(self, head: Head) -> float:
        """The head's own peak rate, scaled to the effective batch as ``blr`` is."""
        if head.blr is None:
            return self.peak_lr
        assert self.effective_batch_size is not None, "resolve_batch comes first"
        return head.blr * self.effective_batch_size / 256

    @property
    def local_batch_matters(self) -> bool:
        return True  # BatchNorm sees one process's micro-batch
