"""Latent MIM (Wei, Gupta, Morgado; ECCV 2024). The names are the published program's; the defaults train on the
embedded digits in minutes. ``--config-name=lmim`` has the published defaults."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from contract.settings import Training
from contract.settings.checks import SettingsError, above, at_least, within

Encoder = Literal["vit_nano", "vit_tiny", "vit_small", "vit_base", "vit_large", "vit_huge"]
BLOCKS = {"vit_nano": 4, "vit_tiny": 12, "vit_small": 12, "vit_base": 12, "vit_large": 24, "vit_huge": 32}


@dataclass(kw_only=True)
class Projector:
    mlp_dim: int = 256
    mlp_depth: int = 2  # linear layers; 0: no projector

    def __post_init__(self) -> None:
        at_least(self, 1, "mlp_dim")
        at_least(self, 0, "mlp_depth")


@dataclass(kw_only=True)
class Settings(Training):
    epochs: int = 16
    warmup_epochs: float = 1
    blr: float = 1.2e-2
    encoder: Encoder = "vit_nano"
    patch_size: int = 4
    grid_size: int = 7
    patch_gap: int = 0  # pixels between neighbouring patches
    num_vis: int = 10  # visible patches
    decoder_dim: int = 64
    decoder_depth: int = 2
    decoder_heads: int = 4
    target_depth: int | None = None  # blocks of the target encoder; null, or the encoder's own
    target_mom: float = 0.95
    mask_target: bool = True  # the target encoder sees the hidden patches only
    avg_vis_mask_token: bool = True  # mask tokens start from position-weighted visible cues
    freeze_pe: bool = True
    loss: Literal["infonce_patches", "norm_l2"] = "infonce_patches"
    tau: float = 0.2
    avg_sim_coeff: float = 0.1
    sim_init: float = 0.75
    sim_end: float = 0.25
    drop: float = 0.0
    attn_drop: float = 0.0
    drop_path: float = 0.0
    proj: Projector = field(default_factory=Projector)
    decay_groups: Literal["published", "matrices"] = "published"
    min_crop: float = 0.6
    hflip: float = 0.0
    eval_crop: float = 1.0  # side of the centre crop over the resized side
    min_lr_frac: float = 0.0
    eval_freq: int = 2  # epochs between k-NN evaluations; 0: never

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "patch_size", "grid_size", "num_vis", "decoder_dim", "decoder_depth", "decoder_heads")
        at_least(self, 0, "patch_gap", "avg_sim_coeff", "eval_freq")
        above(self, 0, "tau")
        within(self, 0, 1, "target_mom", "hflip", "min_lr_frac", "drop", "attn_drop", "drop_path")
        within(self, -1, 1, "sim_init", "sim_end")
        above(self, 0, "min_crop", "eval_crop")
        within(self, 0, 1, "min_crop", "eval_crop")
        patches = self.grid_size**2
        if self.num_vis > patches - 2:
            raise SettingsError(
                f"num_vis={self.num_vis}: of the {patches} patches of grid_size={self.grid_size} at least 2 must stay "
                f"hidden; choose 1 to {patches - 2}"
            )
        if self.decoder_dim % self.decoder_heads or self.decoder_dim % 4:
            raise SettingsError(
                f"decoder_dim={self.decoder_dim}: must be a multiple of 4 and of decoder_heads={self.decoder_heads}"
            )

        if self.target_depth not in (None, BLOCKS[self.encoder]):
            raise SettingsError(
                f"target_depth={self.target_depth}: the target averages the encoder; with encoder={self.encoder} "
                f"choose {BLOCKS[self.encoder]} or null"
            )

    @property
    def local_batch_matters(self) -> bool:
        return self.avg_sim_coeff > 0  # the regulariser squares the mean over the local batch
