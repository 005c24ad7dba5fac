"""Loaders whose every picture depends on (seed, epoch, index) only, not on loader processes or restarts."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from workers.data import DataError, Pictures, Unreadable

log = logging.getLogger(__name__)

Transform = Callable[[Any], Any]  # of one picture; what it gives is collated
Fold = Callable[..., int]  # integers -> one seed, as workers.engine.distributed.fold
OnError = Literal["stop", "replace", "drop"]
TOO_MANY = 0.05  # the share of unreadable pictures, beyond the first ten, at which something else must be wrong


class Views(Dataset[Any]):
    """((3, h, w) uint8 after ``transform``, label, index) of an (epoch, index) pair.

    A picture that cannot be read is an error, or replaced by the next one that can be (its label and index too), or
    None. Each is logged once and marked in ``unreadable``, (n,), which all loader processes share.
    """

    def __init__(self, pictures: Pictures, transform: Transform, seed: int, fold: Fold, on_error: OnError = "stop"):
        self.pictures, self.transform, self.seed, self.fold = pictures, transform, seed, fold
        self.on_error = on_error
        self.unreadable = torch.zeros(0 if on_error == "stop" else len(pictures), dtype=torch.bool)
        if len(self.unreadable):
            self.unreadable.share_memory_()  # type: ignore[no-untyped-call]

    def __getitem__(self, place: tuple[int, int]) -> tuple[Tensor, int, int] | None:
        _, index = place
        while True:
            try:
                image, label = self.pictures[index]
                break
            except Unreadable as error:
                if self.on_error == "stop":
                    raise
                self.mark(index, error)
                if self.on_error == "drop":
                    return None
                index = (index + 1) % len(self.pictures)
        drawn = self.fold(self.seed, *place)
        torch.default_generator.manual_seed(drawn)
        random.seed(drawn)  # some of timm's augmentations draw from here,
        np.random.seed(drawn & 0xFFFFFFFF)  # noqa: NPY002  # and some from here
        return self.transform(image), label, index

    def mark(self, index: int, error: Unreadable) -> None:
        if not self.unreadable[index]:
            self.unreadable[index] = True
            log.warning("skipped: %s", error)
        bad, of = int(self.unreadable.sum()), len(self.pictures)
        if bad == of or bad > 10 + TOO_MANY * of:
            raise DataError(f"{bad} of {of} pictures cannot be read, too many to skip; the last: {error}")


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
    skip: bool = False,
    all_cores: bool = False,
) -> DataLoader[Any]:
    """Batches ((B, 3, h, w) uint8, (B,) labels, (B,) indices), shuffled, without the last incomplete one.

    ``skip`` replaces a picture that cannot be read by the next; ``all_cores`` undoes a pinning of this process to some
    cores, which its loader processes would inherit.
    """
    sampler = Shuffled(len(pictures), batch_size, seed=seed, rank=rank, world=world, fold=fold)
    if len(sampler) < batch_size:
        raise DataError(
            f"batch_size={batch_size}: {len(pictures)} pictures on {world} processes give {len(sampler)} each; "
            f"choose at most {len(sampler)}"
        )
    views = Views(pictures, transform, seed, fold, "replace" if skip else "stop")
    return _loader(views, sampler, batch_size, workers, all_cores, drop_last=True)


def eval_loader(
    pictures: Pictures,
    transform: Transform,
    batch_size: int,
    *,
    rank: int,
    world: int,
    fold: Fold,
    workers: int = 0,
    skip: bool = False,
    all_cores: bool = False,
    seen: Callable[[], None] = lambda: None,
) -> DataLoader[Any]:
    """Batches as above, in order, every picture once; ``skip`` leaves out those that cannot be read. ``seen`` is called
    for every batch."""
    sampler = InOrder(len(pictures), rank=rank, world=world)
    views = Views(pictures, transform, 0, fold, "drop" if skip else "stop")
    loader = _loader(views, sampler, batch_size, workers, all_cores, drop_last=False)
    loader.seen = seen
    return loader


def unreadable(loader: DataLoader[Any]) -> Tensor:
    """(n,) bool: the pictures that this loader had to skip so far; (0,) if it was not to skip any."""
    dataset = loader.dataset
    return dataset.unreadable if isinstance(dataset, Views) else torch.zeros(0, dtype=torch.bool)


def _loader(
    views: Views, sampler: Sampler[Any], batch_size: int, workers: int, all_cores: bool, *, drop_last: bool
) -> _Batches:
    pictures = views.pictures
    if isinstance(pictures, Cached):
        return _Batches(pictures, batch_size, sampler=sampler, drop_last=drop_last, collate_fn=_as_it_is)
    return _Batches(
        views,
        batch_size,
        sampler=sampler,
        num_workers=workers,
        drop_last=drop_last,
        collate_fn=_readable,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
        worker_init_fn=_all_cores if all_cores else None,
    )


class _Batches(DataLoader[Any]):
    """Without the batches of which no picture could be read."""

    seen: Callable[[], None] = staticmethod(lambda: None)  # hears of every batch

    def __iter__(self) -> Any:
        return self._heard(super().__iter__())

    def _heard(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            self.seen()
            if batch is not None:
                yield batch


def _readable(samples: list[Any]) -> Any:
    samples = [each for each in samples if each is not None]
    return default_collate(samples) if samples else None


def _all_cores(_worker: int) -> None:
    os.sched_setaffinity(0, range(os.cpu_count() or 1))  # the kernel leaves out those that the job does not own


def _as_it_is(batch: Any) -> Any:
    return batch
