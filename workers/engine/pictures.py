"""The data of a run: loaders for its settings, and what is done to a batch once it is on the device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

import workers.data
from contract.settings import Settings
from workers.data import Pictures, Split
from workers.data.loader import Transform, eval_loader, train_loader

from . import distributed


def load(settings: Settings, split: Split) -> Pictures:
    data = settings.data
    pictures = workers.data.load(
        data.name,
        split,
        Path(settings.data_path) if settings.data_path else None,
        length=data.length,
        size=data.size,
        classes=data.classes,
        download=data.download,
    )
    if data.classes and len(pictures.classes) != data.classes:
        raise workers.data.DataError(
            f"data.classes={data.classes}: {data.name} {split} has {len(pictures.classes)} classes"
        )
    return pictures


def shuffled(settings: Settings, pictures: Pictures, transform: Transform, batch_size: int) -> DataLoader[Any]:
    return train_loader(
        pictures,
        transform,
        batch_size,
        seed=settings.seed,
        rank=distributed.rank(),
        world=distributed.world_size(),
        fold=distributed.fold,
        workers=settings.env.workers,
    )


def in_order(settings: Settings, pictures: Pictures, transform: Transform, batch_size: int = 256) -> DataLoader[Any]:
    return eval_loader(
        pictures,
        transform,
        batch_size,
        rank=distributed.rank(),
        world=distributed.world_size(),
        fold=distributed.fold,
        workers=settings.env.workers,
    )


def normaliser(settings: Settings) -> Callable[[Tensor], Tensor]:
    """(B, 3, H, W) uint8, anywhere -> float on the device, normalised per channel."""
    device = distributed.device()
    scale = 1 / (255 * torch.tensor(settings.data.std, device=device)).view(3, 1, 1)
    shift = (torch.tensor(settings.data.mean, device=device) / torch.tensor(settings.data.std, device=device)).view(
        3, 1, 1
    )

    def prepare(images: Tensor) -> Tensor:
        return images.to(device, non_blocking=True).float().mul_(scale).sub_(shift)

    return prepare
