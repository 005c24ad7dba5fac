"""MAE: masked autoencoders (He et al., CVPR 2022).

The encoder sees a quarter of an image's patches and nothing else; a small decoder rebuilds the pixels of the others.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from contract.settings.main_mae import Settings
from workers import models
from workers.engine import pretrain
from workers.engine.optim import warmup_cosine
from workers.engine.reconstructions import draw_reconstructions
from workers.masking.patches import take, unpatchify
from workers.masking.random import split
from workers.models.mae_decoder import MAEDecoder
from workers.models.vit import PRESETS, ViT
from workers.transforms.crops import RandomResizedCrop, ResizeCenterCrop

PIXEL_EPS = 1e-6  # added to a patch's variance (MAE's code); a flat patch is amplified by up to 1000


class MAE(pretrain.Method):
    """Rebuild the hidden patches from ``kept`` random ones."""

    encoder: ViT

    def __init__(self, encoder: ViT, decoder: MAEDecoder, *, kept: int, norm_pix_loss: bool = True):
        super().__init__()
        if not 1 <= kept <= encoder.patches - 1:
            raise ValueError(f"kept={kept}: of {encoder.patches} patches choose 1 to {encoder.patches - 1}")
        self.encoder, self.decoder = encoder, decoder
        self.kept, self.norm_pix_loss = kept, norm_pix_loss

    def forward(self, images: Tensor, noise: Tensor | None = None) -> dict[str, Tensor]:
        """Normalised images (B, 3, H, W) -> the loss.

        ``noise`` (B, N), uniform where it is not given, is all the randomness: the ``kept`` smallest are seen.
        """
        patches = self.encoder.patchify(images)
        visible, hidden = split(self.draw(images) if noise is None else noise, self.kept)
        prediction = self.decoder(self.encoder(take(patches, visible), visible), visible, hidden)
        error = prediction.float() - self.target(take(patches, hidden).float())
        return {"loss": error.square().mean()}  # all pictures hide equally many, so this is the mean over all hidden

    def target(self, patches: Tensor) -> Tensor:
        """What is to be predicted of patches (B, M, P): the pixels, or these with mean 0 and variance 1 each."""
        if not self.norm_pix_loss:
            return patches
        variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)  # unbiased, as in MAE's code
        return (patches - mean) / (variance + PIXEL_EPS).sqrt()

    def draw(self, images: Tensor) -> Tensor:
        return torch.rand(len(images), self.encoder.patches, device=images.device)

    @torch.no_grad()
    def rebuild(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) -> where they are hidden, (B, 1, H, W) of 0 and 1, and them with what is predicted there.

        With ``norm_pix_loss`` a prediction has no mean and contrast of its own; it gets the true ones, as in the
        paper's figures.
        """
        patches = self.encoder.patchify(images)
        visible, hidden = split(noise, self.kept)
        prediction = self.decoder(self.encoder(take(patches, visible), visible), visible, hidden).float()
        if self.norm_pix_loss:
            variance, mean = torch.var_mean(take(patches, hidden), dim=-1, keepdim=True)
            prediction = prediction * (variance + PIXEL_EPS).sqrt() + mean
        where, size, rows = hidden[..., None], self.encoder.patch_size, self.encoder.grid[0]
        rebuilt = patches.scatter(1, where.expand_as(prediction), prediction)
        marks = torch.zeros_like(patches[..., : size**2]).scatter(1, where.expand(-1, -1, size**2), 1.0)
        return unpatchify(marks, size, rows), unpatchify(rebuilt, size, rows)


def build(settings: Settings) -> MAE:
    s = settings
    shape: dict[str, models.Plain] = {"patch_size": s.patch_size, "grid_size": s.grid_size, "pos": "mae"}
    encoder = models.build("vit", {**PRESETS[s.encoder], **shape})
    assert isinstance(encoder, ViT)
    decoder = MAEDecoder(
        encoder.width, encoder.grid, s.patch_size, dim=s.decoder_dim, depth=s.decoder_depth, heads=s.decoder_heads
    )
    return MAE(encoder, decoder, kept=s.kept, norm_pix_loss=s.norm_pix_loss)


def transform(settings: Settings) -> RandomResizedCrop:
    return RandomResizedCrop(settings.input_size, scale=(settings.min_crop, 1.0), hflip=settings.hflip)


def eval_transform(settings: Settings) -> ResizeCenterCrop:
    return ResizeCenterCrop(settings.input_size, crop=settings.eval_crop)


def schedules(settings: Settings) -> dict[str, Callable[[float], float]]:
    """The learning rate, of the fraction of training done."""
    s, warmup = settings, settings.warmup_epochs / max(settings.epochs, 1)
    return {"lr": lambda t: warmup_cosine(t, peak=s.peak_lr, warmup=warmup, floor=s.min_lr)}


def groups(model: nn.Module, settings: Settings) -> list[dict[str, Any]]:
    """Parameters without and with weight decay. As published, the class and the mask token decay."""
    plain: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (plain if p.ndim <= 1 or name.endswith(".bias") else decayed).append(p)
    return [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": settings.weight_decay}]


def draw(model: MAE, images: Tensor, folder: Path) -> None:
    noise = torch.rand(len(images), model.encoder.patches, generator=torch.Generator().manual_seed(0))
    hidden, rebuilt = model.rebuild(images, noise.to(images.device))
    draw_reconstructions(images, hidden, rebuilt, folder)


if __name__ == "__main__":
    pretrain.main(
        Settings,
        build=build,
        transform=transform,
        eval_transform=eval_transform,
        schedules=schedules,
        groups=groups,
        draw=draw,
    )
