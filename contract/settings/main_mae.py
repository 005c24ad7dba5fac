"""MAE (He et al., CVPR 2022). The names are those of its PyTorch program; the defaults train on the embedded digits in
minutes. The published values: ``recipe=mae_imagenet``, ``mae_imagenet_large`` and ``mae_imagenet_huge``."""

from __future__ import annotations

from dataclasses import dataclass

from contract.settings import Training
from contract.settings.checks import SettingsError, above, at_least, within
from contract.settings.main_lmim import Encoder


@dataclass(kw_only=True)
class Settings(Training):
    epochs: int = 40
    warmup_epochs: float = 2
    blr: float = 1.2e-2
    min_lr: float = 0.0
    encoder: Encoder = "vit_nano"
    patch_size: int = 4
    input_size: int = 28  # side of the pictures
    mask_ratio: float = 0.75  # of the patches, hidden
    norm_pix_loss: bool = True  # every patch's pixels with mean 0 and variance 1
    decoder_dim: int = 64
    decoder_depth: int = 2
    decoder_heads: int = 4
    min_crop: float = 0.6
    hflip: float = 0.0
    eval_crop: float = 1.0  # side of the centre crop over the resized side
    eval_freq: int = 5  # epochs between k-NN evaluations; 0: never

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "patch_size", "input_size", "decoder_dim", "decoder_depth", "decoder_heads")
        at_least(self, 0, "min_lr", "eval_freq")
        above(self, 0, "min_crop", "eval_crop")
        within(self, 0, 1, "min_crop", "eval_crop", "hflip")
        if self.input_size % self.patch_size or self.input_size == self.patch_size:
            raise SettingsError(
                f"input_size={self.input_size}: expected two or more patches a side, of patch_size={self.patch_size}; "
                f"choose {2 * self.patch_size}, {3 * self.patch_size}, ..."
            )
        if not 0 < self.mask_ratio < 1:
            raise SettingsError(
                f"mask_ratio={self.mask_ratio}: some patches must be hidden and some seen; choose above 0 and below 1"
            )
        if self.decoder_dim % self.decoder_heads or self.decoder_dim % 4:
            raise SettingsError(
                f"decoder_dim={self.decoder_dim}: must be a multiple of 4 and of decoder_heads={self.decoder_heads}"
            )

    @property
    def grid_size(self) -> int:
        return self.input_size // self.patch_size

    @property
    def kept(self) -> int:
        """How many patches the encoder sees: rounded, at least one and never all."""
        patches = self.grid_size**2
        return min(max(round(patches * (1 - self.mask_ratio)), 1), patches - 1)
