"""The data of a run: loaders for its settings, and what is done to a batch once it is on the device."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

import workers.data
from contract.settings import Settings
from workers.data import Pictures, Split
from workers.data.cache import Shrunk, decoded
from workers.data.few import spread
from workers.data.files import Files
from workers.data.loader import Transform, eval_loader, train_loader, unreadable
from workers.models import Encoder

from . import distributed, pulse

log = logging.getLogger(__name__)


def load(settings: Settings, split: Split, *, labelled: bool = True) -> Pictures:
    """One split, from the cache if there is to be one. Without ``labelled`` it may be what ``data.part`` says."""
    data = settings.data
    pictures: Pictures = workers.data.load(
        data.name,
        split,
        Path(settings.data_path) if settings.data_path else None,
        length=data.length,
        size=data.size,
        classes=data.classes,
        download=data.download,
        part="labelled" if labelled else data.part,
    )
    if data.classes and len(pictures.classes) != data.classes:
        raise workers.data.DataError(
            f"data.classes={data.classes}: {data.name} {split} has {len(pictures.classes)} classes"
        )
    number, classes, known = len(pictures), len(pictures.classes), workers.data.fingerprint(pictures)
    log.info("%s %s: %d pictures of %d classes, fingerprint %s", data.name, split, number, classes, known)
    if data.cache is not None and isinstance(pictures, Files):  # all others are decoded as they lie
        cache = Path(data.cache)
        return decoded(pictures, data.shorter_side, cache, on_error=data.on_error, workers=settings.env.workers)
    return pictures if data.shorter_side is None else Shrunk(pictures, data.shorter_side)


def examples(pictures: Pictures, transform: Transform, number: int = 8) -> Tensor:
    """(n, 3, h, w) uint8 of pictures from all over the data set; those that cannot be read are left out."""
    found = []
    for index in range(0, len(pictures), max(1, len(pictures) // number)):
        with contextlib.suppress(workers.data.Unreadable):
            found.append(transform(pictures[index][0]))
    return torch.stack(found[:number])


def skipped(settings: Settings, *loaders: DataLoader[Any]) -> dict[str, float]:
    """``data/skipped``: how many pictures could not be read so far, each counted once over all ranks, epochs and
    loader processes of this attempt. Nothing unless ``data.on_error=skip``. All ranks must call it."""
    if settings.data.on_error == "stop":
        return {}
    marks = [distributed.total(unreadable(each).float().to(distributed.device())) for each in loaders]
    number = sum(int((each > 0).sum()) for each in marks)
    log.info("data.on_error=skip: %d pictures could not be read", number)
    return {"data/skipped": number}


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
        skip=settings.data.on_error == "skip",
        all_cores=settings.data.worker_affinity,
    )


def in_order(settings: Settings, pictures: Pictures, transform: Transform, batch_size: int = 256) -> DataLoader[Any]:
    """Every picture once; at smoke scale as many, from all over, as fill so many batches."""
    if settings.smoke is not None:
        wanted = max(settings.smoke * batch_size, getattr(settings, "effective_batch_size", None) or 0)
        pictures = spread(pictures, wanted)
    return eval_loader(
        pictures,
        transform,
        batch_size,
        rank=distributed.rank(),
        world=distributed.world_size(),
        fold=distributed.fold,
        workers=settings.env.workers,
        skip=settings.data.on_error == "skip",
        all_cores=settings.data.worker_affinity,
        seen=pulse.beat,
    )


def normaliser(settings: Settings, encoder: Encoder | None = None) -> Callable[[Tensor], Tensor]:
    """(B, 3, H, W) uint8, anywhere -> float on the device, normalised per channel: as the encoder was trained, if it
    says so, else as the settings say."""
    device = distributed.device()
    mean, std = (
        torch.tensor(getattr(encoder, each, None) or getattr(settings.data, each), device=device)
        for each in ("mean", "std")
    )
    scale, shift = 1 / (255 * std).view(3, 1, 1), (mean / std).view(3, 1, 1)

    def prepare(images: Tensor) -> Tensor:
        return images.to(device, non_blocking=True).float().mul_(scale).sub_(shift)

    return prepare
