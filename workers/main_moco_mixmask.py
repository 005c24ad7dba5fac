"""MoCo v2 (Chen et al., 2020) with MixMask (Vishniakov, Xing, Shen; 2022) and Un-Mix (Shen et al., AAAI 2022).

A query of one view must find the key of the other view, made by a moving average of the network, among a queue of
older keys. The mixtures add queries of which a part shows another picture of the batch, through a block mask
(``mixmask``), a box or a blend (``unmix``), or one of each (``both``); such a query is attracted to the keys of both
pictures by the areas they have in it. Keys are never mixed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from contract.settings.main_moco_mixmask import Settings
from workers import models
from workers.data import Pictures
from workers.engine import distributed, optim, pretrain
from workers.losses.moco import accuracy, against, infonce
from workers.masking.mix import Draws, block_mask, discrete_mask, enlarged
from workers.models import Encoder
from workers.models.resnet import split_norms
from workers.transforms.crops import BilinearCenterCrop
from workers.transforms.mixing import box
from workers.transforms.two_views import TwoViews, coloured, colours


class Mixed(NamedTuple):
    """A batch of which every picture shows a part of another one of the batch."""

    kind: Literal["unmix", "mask"]
    images: Tensor  # (B, 3, H, W)
    guest_in: Tensor  # (B,) where picture i is the other one
    share: float  # the part that is the picture's own: as it came out, not as it was asked for


class MoCo(pretrain.Method):
    """``encoder(images)`` gives one vector of a picture, (B, D); it has BatchNorms, or shuffling would be idle."""

    queue: Tensor
    place: Tensor

    def __init__(
        self,
        encoder: Encoder,
        *,
        method: Literal["moco", "mixmask", "unmix", "both"] = "mixmask",
        dim: int = 128,
        mlp: bool = True,
        queue_size: int = 65536,
        temperature: float = 0.2,
        grid_size: int = 8,
        mask_type: Literal["block", "discrete"] = "block",
        mask_ratio: float = 0.5,
        redraw: bool = True,
        unmix_beta: float = 1.0,
        unmix_prob: float = 0.5,
        bn_splits: int = 1,
    ):
        super().__init__()
        self.method, self.temperature, self.bn_splits = method, temperature, bn_splits
        self.grid_size, self.mask_type, self.mask_ratio, self.redraw = grid_size, mask_type, mask_ratio, redraw
        self.unmix_beta, self.unmix_prob = unmix_beta, unmix_prob
        self.encoder = encoder
        hidden: list[nn.Module] = [nn.Linear(encoder.width, encoder.width), nn.ReLU()] if mlp else []
        self.projector = nn.Sequential(*hidden, nn.Linear(encoder.width, dim))
        self.target_encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.target_projector = copy.deepcopy(self.projector).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(queue_size, dim), dim=1))
        self.register_buffer("place", torch.zeros(1, dtype=torch.int64))  # where the next keys go

    def forward(self, views: Tensor, draws: Draws | None = None) -> dict[str, Tensor]:
        """Two normalised views of every picture, (B, 2, 3, H, W) -> the loss, its terms and the accuracy.

        Every set of queries takes a forward pass of its own, so BatchNorm never sees clean and mixed pictures
        together; the running estimates see both, the mixed ones last (as published).
        """
        draws = draws or Draws()
        query, key = views.unbind(1)
        mixtures = self.mixtures(query, draws)
        queries = [self.embed(self.encoder, self.projector, x) for x in (query, *(m.images for m in mixtures))]
        keys, everyone = self.keys(key, draws)
        queue = self.queue.clone()  # the gradients need it as it was before these keys
        self.enqueue(everyone)

        with torch.autocast(query.device.type, enabled=False):
            clean, *mixed = (against(each, queue, self.temperature) for each in queries)
            terms = {"loss_clean": infonce(clean, keys, self.temperature)}
            loss, shares = terms["loss_clean"], {}
            for mixture, queued in zip(mixtures, mixed, strict=True):
                own = infonce(queued, keys, self.temperature)
                guest = infonce(queued, keys, self.temperature, mixture.guest_in)
                loss = loss + mixture.share * own + (1 - mixture.share) * guest
                terms |= {f"loss_{mixture.kind}": own, f"loss_{mixture.kind}_guest": guest}
                shares[f"share_{mixture.kind}"] = loss.new_tensor(mixture.share)
            top1, top5 = (accuracy(clean, keys, self.temperature, top) for top in (1, 5))
        return {"loss": loss, **{k: v.detach() for k, v in terms.items()}, **shares, "top1": top1, "top5": top5}

    def embed(self, encoder: nn.Module, projector: nn.Module, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C) of length 1, in the queue's precision."""
        return F.normalize(projector(encoder(images)).to(self.queue.dtype), dim=1)

    # -- mixing ------------------------------------------------------------------------------------------------------

    def mixtures(self, images: Tensor, draws: Draws) -> list[Mixed]:
        """One draw for the whole batch of this process; other processes draw their own."""
        found = []
        if self.method in ("unmix", "both"):
            found.append(self.unmix(images, draws))
        if self.method in ("mixmask", "both"):
            found.append(self.mixmask(images, draws))
        return found

    def mixmask(self, images: Tensor, draws: Draws) -> Mixed:
        """Pictures filled with others through a mask; the others are the batch reversed, or, beside Un-Mix, shuffled.

        In a batch of odd size the middle picture of the reversal is its own other.
        """
        b, _, height, width = images.shape
        other = draws.permutation(b) if self.method == "both" else torch.arange(b).flip(0)
        side = self.grid_size
        if self.mask_type == "block":
            kept = int(side**2 * (1 - self.mask_ratio) + 1e-9)  # the published program says how much is kept here,
            mask = block_mask(draws, side, kept, redraw=self.redraw)
        else:  # and how much is not kept there
            mask = discrete_mask(draws, side, self.mask_ratio)
        pixels = enlarged(mask, height, width)
        share = 1 - pixels.double().mean().item()
        guests = images[other.to(images.device)]
        mixed = torch.where(pixels.to(images.device), guests, images)
        return Mixed("mask", mixed, other.argsort().to(images.device), share)

    def unmix(self, images: Tensor, draws: Draws) -> Mixed:
        """A blend with the batch reversed, with ``unmix_prob``, else a box of it."""
        b, _, height, width = images.shape
        blend, guests = draws.uniform(0, 1) < self.unmix_prob, images.flip(0)
        share = draws.beta(self.unmix_beta, self.unmix_beta)
        if blend:
            mixed = share * images + (1 - share) * guests
        else:
            centre = draws.integer(0, height - 1), draws.integer(0, width - 1)
            top, bottom, left, right = box(share, centre, height, width)
            mixed = images.clone()
            mixed[..., top:bottom, left:right] = guests[..., top:bottom, left:right]
            share = 1 - (bottom - top) * (right - left) / (height * width)
        return Mixed("unmix", mixed, torch.arange(b - 1, -1, -1, device=images.device), share)

    # -- keys --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def keys(self, images: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """Of these pictures (B, C), and of those of all processes (W B, C).

        Keys are made in another grouping of the pictures than queries, so that the statistics of BatchNorm cannot
        give away which belong together. One process, with its BatchNorms in one piece, has but one grouping.
        """
        b, rank = len(images), distributed.rank()
        if distributed.world_size() == self.bn_splits == 1:
            keys = self.embed(self.target_encoder, self.target_projector, images)
            return keys, keys
        order = draws.permutation(b * distributed.world_size()).to(images.device)
        distributed.agree([order])
        images = distributed.gather_equal(images)[order[rank * b : (rank + 1) * b]]
        keys = self.embed(self.target_encoder, self.target_projector, images)
        everyone = distributed.gather_equal(keys)[order.argsort()]
        return everyone[rank * b : (rank + 1) * b], everyone

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """The newest take the places of the oldest."""
        places = (self.place + torch.arange(len(keys), device=keys.device)) % len(self.queue)
        self.queue.index_copy_(0, places, keys)
        self.place.add_(len(keys)).remainder_(len(self.queue))

    @torch.no_grad()
    def before_step(self, momentum: float) -> None:
        """target = momentum target + (1 - momentum) online: the parameters; BatchNorm's estimates are its own."""
        for online, target in ((self.encoder, self.target_encoder), (self.projector, self.target_projector)):
            torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), 1 - momentum)


def build(settings: Settings) -> MoCo:
    s = settings
    encoder = models.build("resnet", {"arch": s.arch, "stem": s.stem, "image_size": s.image_size})
    if s.bn_splits > 1:
        split_norms(encoder, s.bn_splits)
    return MoCo(
        encoder,
        method=s.method,
        dim=s.projector_dim,
        mlp=s.mlp,
        queue_size=s.queue_size,
        temperature=s.temperature,
        grid_size=s.grid_size,
        mask_type=s.mask_type,
        mask_ratio=s.mask_ratio,
        redraw=s.redraw,
        unmix_beta=s.unmix_beta,
        unmix_prob=s.unmix_prob,
        bn_splits=s.bn_splits,
    )


def schedules(settings: Settings) -> dict[str, Callable[[float], float]]:
    """The learning rate, of the fraction of training done, and the keys' momentum, which stays."""
    s = settings
    return {
        "lr": lambda t: optim.falling(
            t,
            epochs=s.epochs,
            peak=s.peak_lr,
            warmup_epochs=s.warmup_epochs,
            milestones=s.milestones if s.schedule == "steps" else None,
            whole_epochs=s.lr_every == "epoch",
        ),
        "momentum": lambda _: s.target_mom,
    }


def groups(model: nn.Module, _: Settings) -> list[dict[str, Any]]:
    """Everything decays, biases and BatchNorms too."""
    return [{"params": [p for p in model.parameters() if p.requires_grad]}]


def optimizer(parts: list[dict[str, Any]], settings: Settings) -> torch.optim.Optimizer:
    return optim.sgd(parts, lr=settings.peak_lr, momentum=settings.momentum, weight_decay=settings.weight_decay)


def transform(settings: Settings) -> TwoViews:
    s = settings
    return TwoViews(s.image_size, (s.min_crop, 1.0), s.hflip, colours(s.augment, s.image_size).numbers)


def finish(settings: Settings, _: Pictures) -> Callable[[Any], Tensor]:
    """What the loader gives -> normalised views (B, 2, 3, H, W)."""
    view, device = colours(settings.augment, settings.image_size), distributed.device()
    mean, std = (torch.tensor(each, device=device).view(3, 1, 1) for each in (settings.data.mean, settings.data.std))

    def prepare(batch: Any) -> Tensor:
        (views, u), _, _ = batch
        return (coloured(view, views.to(device, non_blocking=True), u) - mean) / std

    return prepare


def eval_transform(settings: Settings) -> BilinearCenterCrop:
    return BilinearCenterCrop(settings.image_size, crop=settings.eval_crop)


@torch.no_grad()
def draw(model: MoCo, images: Tensor, folder: Path) -> None:
    """``mixtures.png``: pictures, and what each of them becomes in a query."""
    from matplotlib.figure import Figure

    torch.manual_seed(0)
    rows = {"query": images} | {mixed.kind: mixed.images for mixed in model.mixtures(images, Draws())}
    figure = Figure(figsize=(1.2 * len(images) + 0.6, 1.2 * len(rows) + 0.3), layout="constrained")
    low, high = images.amin((0, 2, 3), keepdim=True), images.amax((0, 2, 3), keepdim=True)
    for panels, (name, row) in zip(figure.subplots(len(rows), len(images), squeeze=False), rows.items(), strict=True):
        for panel, picture in zip(panels, ((row - low) / (high - low)).clamp(0, 1), strict=True):
            panel.imshow(picture.permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
            panel.set_xticks([])
            panel.set_yticks([])
        panels[0].set_ylabel(name)
    figure.savefig(folder / "mixtures.png", dpi=120)


if __name__ == "__main__":
    pretrain.main(
        Settings,
        build=build,
        transform=transform,
        eval_transform=eval_transform,
        schedules=schedules,
        groups=groups,
        optimizer=optimizer,
        finish=finish,
        draw=draw,
    )
