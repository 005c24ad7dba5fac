"""SimCLR (Chen et al., ICML 2020) with biological augmentations (Wang et al., SVRHM 2021, arXiv 2112.07173).

Two views of every picture must find each other among the views of all pictures of the batch, over all processes.
``augment`` says how views are made: SimCLR's crops, or foveation, cortical magnification, salient fixations in their
place. ``linear/top1`` and ``linear/loss`` are the linear evaluation of the encoder on the validation pictures, along
the way and at the end.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from contract.settings.checks import SettingsError
from contract.settings.main_simclr import Settings
from workers import models
from workers.data import Pictures, fingerprint
from workers.data.few import Few, labels_of, same_classes
from workers.data.maps import Maps
from workers.engine import distributed, optim, pictures, pretrain, probe
from workers.engine.logistic import logistic
from workers.losses.ntxent import accuracy, ntxent, pairs, similarities
from workers.models import Encoder
from workers.transforms import saliency, spectral, views
from workers.transforms.crops import BilinearCenterCrop

COMPUTED = {"spectral_residual": spectral.residual, "contrast": saliency.contrast}
HOLD = 10  # of schedule=published: epochs at the first rate
UNCHANGED = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))  # mean and std: the network sees pixels from 0 to 1


class SimCLR(pretrain.Method):
    """``encoder(images)`` gives one vector of a picture, (B, D)."""

    def __init__(self, encoder: Encoder, *, dim: int = 128, temperature: float = 0.07):
        super().__init__()
        self.encoder, self.temperature = encoder, temperature
        d = encoder.width
        self.projector = nn.Sequential(nn.Linear(d, d), nn.ReLU(), nn.Linear(d, dim))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """All first views, then all second ones, (2 B, 3, H, W) -> the loss and the accuracy."""
        z = self.projector(self.encoder(images))
        with torch.autocast(images.device.type, enabled=False):
            z = F.normalize(z if z.dtype == torch.float64 else z.float(), dim=1)
            place, positive = pairs(len(z), distributed.rank(), z.device)
            logits = similarities(z, distributed.gather_with_gradient(z), place, self.temperature)
            loss = ntxent(logits, positive)
            top1, top5 = (accuracy(logits, positive, top) for top in (1, 5))
        return {"loss": loss, "top1": top1, "top5": top5}


def build(settings: Settings) -> SimCLR:
    s = settings
    encoder = models.build("resnet", {"arch": s.arch, "stem": s.stem, "image_size": s.image_size})
    encoder.mean, encoder.std = UNCHANGED
    return SimCLR(encoder, dim=s.projector_dim, temperature=s.temperature)


def view(settings: Settings) -> views.View:
    return views.build(settings.image_size, **settings.view_options())


def transform(settings: Settings) -> views.Numbered:
    return views.Numbered(settings.image_size, view(settings).numbers, n_views=2)


def eval_transform(settings: Settings) -> BilinearCenterCrop:
    return BilinearCenterCrop(settings.image_size, crop=1.0)


def finish(settings: Settings, train: Pictures) -> Callable[[Any], Tensor]:
    """What the network is trained on, of a batch of the loader: ((pictures, numbers), labels, indices) -> (2 B, ...)"""
    made, device, stored = view(settings), distributed.device(), None
    if made.needs_maps and settings.saliency == "file":
        assert settings.saliency_path is not None
        where = Path(settings.saliency_path)
        if not where.exists() and settings.data_path is not None:
            where = Path(settings.data_path) / where
        stored = Maps(where, len(train), settings.image_size, fingerprint(train))

    def prepare(batch: Any) -> Tensor:
        (images, numbers), _, index = batch
        images = views.to_unit(images.to(device, non_blocking=True))
        maps = None
        if made.needs_maps:
            maps = COMPUTED[settings.saliency](images) if stored is None else stored[index]
        return made.all(images, numbers, maps)

    return prepare


# -- the linear evaluation ---------------------------------------------------------------------------------------------


def measure(settings: Settings) -> Callable[[Encoder], dict[str, float]]:
    """``linear/...`` of an encoder as it stands; the labelled pictures are looked up once."""
    s = settings.linear
    if not s.epochs:
        return lambda _: {}
    to_size = BilinearCenterCrop(s.image_size or settings.image_size, crop=1.0)
    train, val = pictures.load(settings, "train"), pictures.load(settings, "val")
    same_classes(train, val)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(distributed.fold(settings.seed)))
    mixed = Few(train, order.numpy(), labels_of(train)[order.numpy()])  # batches of one class would spoil BatchNorm
    loaders = [pictures.in_order(settings, each, to_size, s.batch_size) for each in (mixed, val)]
    if s.drop_last and (fewest := min(len(train), len(val))) < s.batch_size:
        raise SettingsError(f"linear.batch_size={s.batch_size}: linear.drop_last leaves none of {fewest} pictures")

    def evaluate(encoder: Encoder) -> dict[str, float]:
        split = [features(encoder, loader, pictures.normaliser(settings, encoder), s.bn_mode) for loader in loaders]
        if s.drop_last:
            split = [
                (x[: len(x) // s.batch_size * s.batch_size], y[: len(y) // s.batch_size * s.batch_size])
                for x, y in split
            ]
        torch.manual_seed(distributed.fold(settings.seed))
        first = nn.Linear(encoder.width, len(train.classes)).weight.detach().to(distributed.device())
        found = logistic(
            split[0],
            split[1],
            first,
            epochs=s.epochs,
            lr=s.lr,
            weight_decay=s.weight_decay,
            batch_size=s.batch_size,
        )
        loss, top1 = found.curve[-1].tolist()
        return {
            "linear/top1": found.top1,
            "linear/loss": found.loss,
            "linear/train_top1": top1,
            "linear/train_loss": loss,
        }

    return evaluate


def features(encoder: Encoder, loader: DataLoader[Any], prepare: Any, bn_mode: str) -> tuple[Tensor, Tensor]:
    """(n, D) and labels (n,), by BatchNorm's running estimates or by each batch's own statistics."""
    encoder.train(bn_mode == "train")
    with unmoved(encoder):
        return probe.encoded(encoder, loader, prepare)


@contextlib.contextmanager
def unmoved(encoder: nn.Module) -> Iterator[None]:
    """Running estimates are afterwards what they were. Published: those of the last evaluation stay."""
    before = [each.clone() for each in encoder.buffers()]
    try:
        yield
    finally:
        for each, value in zip(encoder.buffers(), before, strict=True):
            each.copy_(value)


# -- the optimizer -----------------------------------------------------------------------------------------------------


def schedules(settings: Settings) -> dict[str, Callable[[float], float]]:
    """The learning rate, of the fraction of training done."""
    s, whole = settings, max(settings.epochs, 1)

    def rate(t: float) -> float:
        epoch = t * whole + 1e-9  # a step's fraction is rounded
        if s.schedule == "published":
            return published_rate(math.floor(epoch), s.peak_lr, s.period)
        return optim.falling(
            t, epochs=whole, peak=s.peak_lr, warmup_epochs=s.warmup_epochs, whole_epochs=s.lr_every == "epoch"
        )

    return {"lr": rate}


def published_rate(epoch: int, peak: float, period: int) -> float:
    """A cosine of the batches in an epoch, by mistake walked down one an epoch: hardly any decay."""
    return optim.cosine(max(0, epoch - HOLD) / period, peak, 0.0)


def groups(model: nn.Module, settings: Settings) -> list[dict[str, Any]]:
    """Everything decays, biases and BatchNorms too."""
    return [{"params": [p for p in model.parameters() if p.requires_grad], "weight_decay": settings.weight_decay}]


def optimizer(parts: list[dict[str, Any]], settings: Settings) -> torch.optim.Optimizer:
    """Adam, whose decay is part of the gradient (not AdamW)."""
    return torch.optim.Adam(parts, lr=settings.peak_lr, fused=True)


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
        measure=measure,
    )
