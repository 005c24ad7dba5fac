"""Latent MIM: masked image modelling of latents (Wei, Gupta, Morgado; ECCV 2024).

An online encoder sees a few patches of an image, its moving average (the target) the hidden ones; a cross-attention
decoder predicts the target's latents from the online ones. Each prediction must tell its own patch from the other
hidden patches of the image.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from contract.settings.main_lmim import Settings
from workers import models
from workers.engine import pretrain
from workers.engine.optim import cosine, warmup_cosine
from workers.losses.patch import infonce_patches, norm_l2, pairwise_similarity
from workers.masking.patches import patchify, take
from workers.masking.random import split
from workers.models.cross_decoder import CrossDecoder, projector
from workers.models.vit import PRESETS, ViT
from workers.transforms.crops import RandomResizedCrop, ResizeCenterCrop


class Draws(NamedTuple):
    """All randomness of a forward pass but dropout."""

    jitter: tuple[Tensor, Tensor] | None  # row and column offsets of the patches, each (B, rows, columns)
    noise: Tensor  # (B, L); its order along L says which patches are visible


class LatentMIM(pretrain.Method):
    """Predict the latents of hidden patches from those of ``num_vis`` visible ones."""

    encoder: ViT

    def __init__(
        self,
        encoder: ViT,
        decoder: CrossDecoder,
        *,
        num_vis: int,
        patch_gap: int = 0,
        mlp_dim: int = 4096,
        mlp_depth: int = 3,
        mask_target: bool = True,
        loss: Literal["infonce_patches", "norm_l2"] = "infonce_patches",
        tau: float = 0.2,
        avg_sim_coeff: float = 0.0,
        sim_target: float = 0.75,
    ):
        super().__init__()
        if not 1 <= num_vis <= encoder.patches - 2:
            raise ValueError(
                f"num_vis={num_vis}: of {encoder.patches} patches at least 2 must stay hidden; "
                f"choose 1 to {encoder.patches - 2}"
            )
        self.num_vis, self.patch_gap, self.mask_target = num_vis, patch_gap, mask_target
        self.loss, self.tau = loss, tau
        self.avg_sim_coeff, self.sim_target = avg_sim_coeff, sim_target
        self.encoder, self.decoder = encoder, decoder
        self.projector = projector(encoder.width, mlp_dim, mlp_depth)
        self.target_encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.target_projector = copy.deepcopy(self.projector).requires_grad_(False)

    def forward(self, images: Tensor, draws: Draws | None = None) -> dict[str, Tensor]:
        """Normalised images (B, 3, H, W), of which each grid cell has a patch and its gap -> the loss and metrics."""
        draws = draws or self.draw(images)
        patches = patchify(images, self.encoder.patch_size, self.patch_gap, draws.jitter)
        visible, hidden = split(draws.noise, self.num_vis)
        target = self.target(patches, visible, hidden)
        latents = self.projector(self.encoder(take(patches, visible), visible))
        prediction = self.decoder(latents, visible, hidden)

        if self.loss == "infonce_patches":
            loss = infonce_patches(prediction, target, self.tau)
        else:
            loss = norm_l2(prediction, target)
        with torch.set_grad_enabled(self.avg_sim_coeff > 0 and torch.is_grad_enabled()):
            sim_pred, sim_vis = pairwise_similarity(prediction), pairwise_similarity(latents[:, 1:])
        if self.avg_sim_coeff > 0:  # the square is taken after the mean over the local batch, as published
            off = (sim_pred - self.sim_target).square() + (sim_vis - self.sim_target).square()
            loss = loss + self.avg_sim_coeff * off
        return {
            "loss": loss,
            "avg_sim_pred": sim_pred.detach(),
            "avg_sim_vis": sim_vis.detach(),
            "avg_sim_trg": pairwise_similarity(target),
        }

    @torch.no_grad()
    def target(self, patches: Tensor, visible: Tensor, hidden: Tensor) -> Tensor:
        """The target's latents of the hidden patches; it sees these only, or all. (B, L, P) -> (B, M, D)"""
        ids = hidden if self.mask_target else torch.cat([visible, hidden], dim=1)
        tokens = self.target_encoder(take(patches, ids), ids)[:, -hidden.shape[1] :]
        latents: Tensor = self.target_projector(tokens)
        return latents

    def draw(self, images: Tensor) -> Draws:
        """Where in its cell each patch lies, uniform in 0..gap, and which patches are visible."""
        b, (rows, columns), device = len(images), self.encoder.grid, images.device
        jitter = None
        if self.patch_gap:
            row, column = torch.randint(self.patch_gap + 1, (2, b, rows, columns), device=device)
            jitter = row, column
        return Draws(jitter, torch.rand(b, rows * columns, device=device))

    @torch.no_grad()
    def before_step(self, momentum: float, sim_target: float) -> None:
        """Before the first forward pass of every optimizer step: target = momentum target + (1 - momentum) online."""
        self.sim_target = sim_target
        for online, target in ((self.encoder, self.target_encoder), (self.projector, self.target_projector)):
            weights = dict(online.named_parameters())
            averages = dict(target.named_parameters())
            if averages:
                torch._foreach_lerp_(list(averages.values()), [weights[name] for name in averages], 1 - momentum)


def build(settings: Settings) -> LatentMIM:
    s = settings
    rates = {"drop": s.drop, "attn_drop": s.attn_drop, "drop_path": s.drop_path}
    shape: dict[str, models.Plain] = {
        "patch_size": s.patch_size,
        "grid_size": s.grid_size,
        "pos": "lmim",
        "learn_pos": not s.freeze_pe,
    }
    encoder = models.build("vit", {**PRESETS[s.encoder], **shape, **rates})
    assert isinstance(encoder, ViT)
    decoder = CrossDecoder(
        encoder.width,
        encoder.grid,
        dim=s.decoder_dim,
        depth=s.decoder_depth,
        heads=s.decoder_heads,
        cues=s.avg_vis_mask_token,
        learn_pos=not s.freeze_pe,
        **rates,
    )
    return LatentMIM(
        encoder,
        decoder,
        num_vis=s.num_vis,
        patch_gap=s.patch_gap,
        mlp_dim=s.proj.mlp_dim,
        mlp_depth=s.proj.mlp_depth,
        mask_target=s.mask_target,
        loss=s.loss,
        tau=s.tau,
        avg_sim_coeff=s.avg_sim_coeff,
        sim_target=s.sim_init,
    )


def transform(settings: Settings) -> RandomResizedCrop:
    """Training pictures: a random crop with room for the gaps."""
    side = settings.grid_size * (settings.patch_size + settings.patch_gap)
    return RandomResizedCrop(side, scale=(settings.min_crop, 1.0), hflip=settings.hflip)


def eval_transform(settings: Settings) -> ResizeCenterCrop:
    """Pictures to evaluate on: the centre, without gaps."""
    return ResizeCenterCrop(settings.grid_size * settings.patch_size, crop=settings.eval_crop)


def schedules(settings: Settings) -> dict[str, Callable[[float], float]]:
    """The learning rate, the target's momentum and the similarity to keep, of the fraction of training done."""
    s, peak = settings, settings.peak_lr
    floor, warmup = peak * s.min_lr_frac, s.warmup_epochs / max(s.epochs, 1)
    return {
        "lr": lambda t: warmup_cosine(t, peak=peak, warmup=warmup, floor=floor, start=floor),
        "momentum": lambda t: cosine(t, s.target_mom, 1.0),
        "sim_target": lambda t: cosine(t, s.sim_init, s.sim_end),
    }


def groups(model: nn.Module, settings: Settings) -> list[dict[str, Any]]:
    """Parameters without and with weight decay.

    ``decay_groups=published`` goes by the names, as the published program does: class and mask tokens are decayed, the
    patch embedding and the decoder's input layer are not. ``matrices`` decays the weights of all linear layers only.
    """
    plain: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if settings.decay_groups == "published":
            free = p.ndim <= 1 or any(word in name for word in ("bias", "norm", "embed"))
        else:
            free = p.ndim <= 1 or name.endswith(("_token", "pos_embed"))
        (plain if free else decayed).append(p)
    return [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": settings.weight_decay}]


@torch.no_grad()
def draw(model: LatentMIM, images: Tensor, folder: Path) -> None:
    """``patch_similarity.png``: of each picture, three patches and how similar all others are to them."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    encoder, images = model.encoder, images[:8]
    (rows, columns), p = encoder.grid, encoder.patch_size
    unit = nn.functional.normalize(encoder.tokens(images)[:, 1:], dim=-1)
    similarity = (unit @ unit.transpose(1, 2)).cpu()
    contrast = patchify(images, p).std(-1).cpu()
    shades = (images - images.amin((1, 2, 3), keepdim=True)) / images.std((1, 2, 3), keepdim=True)
    shades = (shades / shades.amax((1, 2, 3), keepdim=True)).permute(0, 2, 3, 1).cpu()
    low, extent = similarity.quantile(0.02).item(), (-0.5, columns * p - 0.5, rows * p - 0.5, -0.5)

    height = math.ceil(len(images) / 2)  # two pictures beside each other, each with three maps
    figure = Figure(figsize=(11.2, 1.3 * height + 0.7), layout="constrained")
    panels = figure.subplots(height, 9, squeeze=False, width_ratios=[4, 4, 4, 4, 1, 4, 4, 4, 4])
    for panel in panels.flat:
        panel.set_axis_off()
    each_picture = panels[:, [0, 1, 2, 3, 5, 6, 7, 8]].reshape(-1, 4)
    for picture, close, detail, (first, *others) in zip(shades, similarity, contrast, each_picture, strict=False):
        first.imshow(picture.numpy(), interpolation="nearest")
        query = int(detail.argmax())  # then, each time, the patch least like those before
        closest = close[query].clone()
        for panel, colour in zip(others, ("tab:red", "tab:green", "tab:blue"), strict=True):
            like = close[query].view(rows, columns).numpy()
            shown = panel.imshow(like, vmin=low, vmax=1, cmap="magma", extent=extent)
            corner = (query % columns * p - 0.5, query // columns * p - 0.5)
            for each in (first, panel):
                each.add_patch(Rectangle(corner, p, p, fill=False, color=colour, linewidth=2))
            query = int(closest.argmin())
            closest = closest.maximum(close[query])
    figure.suptitle("How similar each patch is to the outlined one")
    figure.colorbar(shown, ax=panels[:, -1].tolist(), label="cosine of the last block's tokens", shrink=0.6)
    figure.savefig(folder / "patch_similarity.png", dpi=150)


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
