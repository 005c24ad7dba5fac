"""Loaders whose every picture depends on (seed, epoch, index) only, not on loader processes or restarts."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from workers.data import DataError, Pictures

Transform = Callable[[Tensor], Tensor]
Fold = Callable[..., int]  # integers -> one seed, as workers.engine.distributed.fold


class Views(Dataset[Any]):
    """((3, h, w) uint8 after ``transform``, label, index) of an (epoch, index) pair."""

    def __init__(self, pictures: Pictures, transform: Transform, seed: int, fold: Fold):
        self.pictures, self.transform, self.seed, self.fold = pictures, transform, seed, fold

    def __getitem__(self, place: tuple[int, int]) -> tuple[Tensor, int, int]:
        epoch, index = place
        image, label = self.pictures[index]
        drawn = self.fold(self.seed, epoch, index)
        torch.default_generator.manual_seed(drawn)
        random.seed(drawn)  # some of timm's augmentations draw from here,
        np.random.seed(drawn & 0xFFFFFFFF)  # noqa: NPY002  # and some from here
        return self.transform(image), label, index


class Cached(Dataset[Any]):
    """Features that were computed once, (n, D) with labels (n,); gives whole batches, on whatever device they are."""

    def __init__(self, x: Tensor, labels: Tensor, classes: list[str]):
        self.x, self.labels, self.classes = x, labels, classes

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.x[index], int(self.labels[index])

    def __getitems__(self, places: list[tuple[int, int]]) -> tuple[Tensor, Tensor, Tensor]:
        chosen = torch.tensor([index for _, index in places], device=self.x.device)
        return self.x[chosen], self.labels[chosen], chosen


class Shuffled(Sampler[tuple[int, int]]):
    """A new order every epoch, dealt out to the ranks; can start in the middle. What fills no round is left out."""

    def __init__(self, length: int, batch_size: int, *, seed: int, rank: int, world: int, fold: Fold):
        self.length, self.batch_size, self.seed, self.fold = length, batch_size, seed, fold
        self.rank, self.world = rank, world
        self.epoch, self.skip = 0, 0

    def start(self, epoch: int, batches: int) -> None:
        """The next pass is ``epoch``, without its first ``batches`` batches."""
        self.epoch, self.skip = epoch, batches * self.batch_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = torch.randperm(self.length, generator=torch.Generator().manual_seed(self.fold(self.seed, self.epoch)))
        mine = order[self.rank : len(self) * self.world : self.world][self.skip :]
        return iter([(self.epoch, index) for index in mine.tolist()])

    def __len__(self) -> int:
        return self.length // self.world


class InOrder(Sampler[tuple[int, int]]):
    """Every picture exactly once, over all ranks."""

    def __init__(self, length: int, *, rank: int, world: int):
        self.places = [(0, index) for index in range(rank, length, world)]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


def train_loader(
    pictures: Pictures,
    transform: Transform,
    batch_size: int,
    *,
    seed: int,
    rank: int,
    world: int,
    fold: Fold,
    workers: int = 0,
) -> DataLoader[Any]:
    """Batches ((B, 3, h, w) uint8, (B,) labels, (B,) indices), shuffled, without the last incomplete one."""
    sampler = Shuffled(len(pictures), batch_size, seed=seed, rank=rank, world=world, fold=fold)
    if len(sampler) < batch_size:
        raise DataError(
            f"batch_size={batch_size}: {len(pictures)} pictures on {world} processes give {len(sampler)} each; "
            f"choose at most {len(sampler)}"
        )
    return _loader(pictures, transform, sampler, batch_size, workers, seed=seed, fold=fold, drop_last=True)


def eval_loader(
    pictures: Pictures, transform: Transform, batch_size: int, *, rank: int, world: int, fold: Fold, workers: int = 0
) -> DataLoader[Any]:
    """Batches as above, in order, every picture once."""
    sampler = InOrder(len(pictures), rank=rank, world=world)
    return _loader(pictures, transform, sampler, batch_size, workers, seed=0, fold=fold, drop_last=False)


def _loader(
    pictures: Pictures,
    transform: Transform,
    sampler: Sampler[Any],
    batch_size: int,
    workers: int,
    *,
    seed: int,
    fold: Fold,
    drop_last: bool,
) -> DataLoader[Any]:
    if isinstance(pictures, Cached):
        return DataLoader(pictures, batch_size, sampler=sampler, drop_last=drop_last, collate_fn=_as_it_is)
    return DataLoader(
        Views(pictures, transform, seed, fold),
        batch_size,
        sampler=sampler,
        num_workers=workers,
        drop_last=drop_last,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
    )


def _as_it_is(batch: Any) -> Any:
    return batch
