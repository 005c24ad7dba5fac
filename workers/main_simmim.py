"""SimMIM: a simple framework for masked image modelling (Xie et al., CVPR 2022).

The encoder sees all places, the hidden ones as a mask token; a linear layer predicts their pixels.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from contract.settings.main_simmim import Settings
from workers import models
from workers.engine import pretrain
from workers.engine.optim import warmup_cosine
from workers.engine.reconstructions import draw_reconstructions
from workers.models.beit import BEiT
from workers.models.vit import PRESETS
from workers.transforms.crops import BilinearCrop, ResizeCenterCrop

BETAS = (0.9, 0.999)  # of AdamW


class SimMIM(pretrain.Method):
    """Rebuild the pixels of ``hidden`` square cells of ``cell`` x ``cell`` patches."""

    encoder: BEiT

    def __init__(self, encoder: BEiT, *, cell: int, hidden: int):
        super().__init__()
        side = encoder.grid[0] // cell
        if encoder.grid[0] % cell:
            raise ValueError(f"cell={cell}: must divide the {encoder.grid[0]} patches of a side")
        if not 1 <= hidden <= side**2 - 1:
            raise ValueError(f"hidden={hidden}: of {side**2} cells choose 1 to {side**2 - 1}")
        self.cell, self.side, self.hidden = cell, side, hidden
        self.encoder = encoder
        patch = encoder.patch_size
        self.decoder = nn.Sequential(nn.Conv2d(encoder.width, 3 * patch**2, 1), nn.PixelShuffle(patch))

    def forward(self, images: Tensor, noise: Tensor | None = None) -> dict[str, Tensor]:
        """Normalised images (B, 3, H, W) -> the loss.

        ``noise`` (B, cells), uniform where it is not given, says what is hidden: the cells with the smallest values.
        Drop path is the only other randomness.
        """
        mask = self.mask(self.draw(images) if noise is None else noise)
        error = (self.rebuild(images, mask).float() - images.float()).abs()
        return {"loss": (error * self.pixels(mask)).sum() / (3 * mask.sum() * self.encoder.patch_size**2)}

    def rebuild(self, images: Tensor, mask: Tensor) -> Tensor:
        """Images (B, 3, H, W) and what to hide of them (B, N) -> all pixels as predicted."""
        tokens = self.encoder(images, mask)[:, 1:]
        out: Tensor = self.decoder(tokens.transpose(1, 2).unflatten(2, self.encoder.grid))
        return out

    def mask(self, noise: Tensor) -> Tensor:
        """The first ``hidden`` cells in the order of the noise (B, cells), as patches: (B, N), True where hidden.

        Every picture, so every process, hides equally many: the loss is one mean over all of them.
        """
        first = noise.argsort(dim=1)[:, : self.hidden]
        cells = torch.zeros_like(noise, dtype=torch.bool).scatter(1, first, value=True)
        square = cells.view(-1, self.side, self.side)
        return square.repeat_interleave(self.cell, 1).repeat_interleave(self.cell, 2).flatten(1)

    def pixels(self, mask: Tensor) -> Tensor:
        """(B, N) of patches -> (B, 1, H, W), 1 where hidden."""
        square, patch = mask.view(-1, 1, *self.encoder.grid), self.encoder.patch_size
        return square.repeat_interleave(patch, 2).repeat_interleave(patch, 3).float()

    def draw(self, images: Tensor) -> Tensor:
        return torch.rand(len(images), self.side**2, device=images.device)


def build(settings: Settings) -> SimMIM:
    s = settings
    shape: dict[str, models.Plain] = {
        "patch_size": s.patch_size,
        "grid_size": s.input_size // s.patch_size,
        "drop_path": s.drop_path,
        "layer_scale": s.layer_scale,
        "bias": s.bias,
        "absolute": s.absolute,
    }
    encoder = models.build("beit", {**PRESETS[s.encoder], **shape})
    assert isinstance(encoder, BEiT)
    return SimMIM(encoder, cell=s.mask_patch_size // s.patch_size, hidden=s.hidden_cells)


def transform(settings: Settings) -> BilinearCrop:
    return BilinearCrop(settings.input_size, scale=(settings.min_crop, 1.0), hflip=settings.hflip)


def eval_transform(settings: Settings) -> ResizeCenterCrop:
    return ResizeCenterCrop(settings.input_size, crop=settings.eval_crop)


def schedules(settings: Settings) -> dict[str, Callable[[float], float]]:
    """The learning rate, of the fraction of training done: a linear warm-up, and steps down at ``milestones``."""
    s, whole = settings, max(settings.epochs, 1)
    warmup, steps = s.warmup_epochs / whole, [epoch / whole for epoch in s.milestones]

    def rate(t: float) -> float:
        peak = s.peak_lr * s.gamma ** bisect_right(steps, t)
        if t >= warmup:
            return peak
        return warmup_cosine(t, peak=peak, warmup=warmup, start=s.peak_lr * s.warmup_lr_frac)

    return {"lr": rate}


def groups(model: nn.Module, settings: Settings) -> list[dict[str, Any]]:
    """Parameters with and without weight decay. As published, the mask token and the tables of biases decay."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        free = p.ndim <= 1 or name.endswith((".bias", "cls_token", "pos_embed"))
        (plain if free else decayed).append(p)
    return [
        {"params": decayed, "weight_decay": settings.weight_decay, "betas": BETAS},
        {"params": plain, "weight_decay": 0.0, "betas": BETAS},
    ]


@torch.no_grad()
def draw(model: SimMIM, images: Tensor, folder: Path) -> None:
    noise = torch.rand(len(images), model.side**2, generator=torch.Generator().manual_seed(0))
    mask = model.mask(noise.to(images.device))
    hidden = model.pixels(mask)
    rebuilt = torch.where(hidden > 0, model.rebuild(images, mask), images)
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
