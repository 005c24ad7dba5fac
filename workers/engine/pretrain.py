"""What every pretraining worker shares: from its settings to ``encoder.pt``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from contract import rundir
from contract.settings import Training
from workers.data import Pictures
from workers.data.loader import Transform
from workers.models import Encoder

from . import distributed, optim, pictures, probe
from .checkpoint import Checkpoint
from .encoder import save_encoder
from .fit import Schedule, fit
from .run import loop, open_run, steps

S = TypeVar("S", bound=Training)


class Method(nn.Module):
    """What a pretraining worker builds. ``forward(images)`` gives a dict of scalars, among them ``loss``."""

    encoder: Encoder


def _adamw(groups: list[dict[str, Any]], settings: Training) -> torch.optim.Optimizer:
    return optim.adamw(groups, lr=settings.peak_lr)


def main(
    cls: type[S],
    *,
    build: Callable[[S], Method],
    transform: Callable[[S], Transform],
    eval_transform: Callable[[S], Transform],
    schedules: Callable[[S], Mapping[str, Schedule]],
    groups: Callable[[Any, S], list[dict[str, Any]]],
    optimizer: Callable[[list[dict[str, Any]], S], torch.optim.Optimizer] = _adamw,
    finish: Callable[[S, Pictures], Callable[[Any], Any]] | None = None,
    draw: Callable[[Any, Tensor, Path], None] | None = None,
    measure: Callable[[S], Callable[[Encoder], Mapping[str, float]]] | None = None,
) -> None:
    """Train ``build(settings)``, whose attribute ``encoder`` is what is kept, and look at it by nearest neighbours.

    ``finish(settings, train)`` makes, on the device, what the method takes of the loader's (what ``transform`` gave,
    labels, indices); without it that is the pictures, normalised. ``measure(settings)`` measures the encoder by more
    than its neighbours; all ranks call it.

    ``draw(model, images, folder)`` may leave pictures of what was learned in ``figures/``.
    """
    with open_run(cls) as run:
        settings = run.settings
        train, val = pictures.load(settings, "train", labelled=False), pictures.load(settings, "val")
        loader = pictures.shuffled(settings, train, transform(settings), settings.batch_size)
        val_loader = pictures.in_order(settings, val, eval_transform(settings))

        torch.manual_seed(distributed.fold(settings.seed))  # the same weights on every rank
        method = build(settings).to(distributed.device())
        prepare = pictures.normaliser(settings, method.encoder)
        finished_batch = finish(settings, train) if finish else lambda batch: prepare(batch[0])
        more = measure(settings) if measure else lambda _: {}
        updates = optimizer(groups(method, settings), settings)
        checkpoint = Checkpoint(run.folder / rundir.CHECKPOINT, run.journal, model=method, optimizer=updates)

        def evaluate() -> dict[str, float]:
            distributed.agree(method.encoder.buffers())  # BatchNorm's estimates are a step ahead of those saved
            knn = {"knn/loo1": probe.leave_one_out(*probe.features(method.encoder, val_loader, prepare))}
            return knn | dict(more(method.encoder))

        finished = fit(
            distributed.wrap(method),
            loader,
            updates,
            schedules=schedules(settings),
            checkpoint=checkpoint,
            prepare=finished_batch,
            evaluate=evaluate,
            evaluate_epochs=getattr(settings, "eval_freq", 0),
            **loop(run),
        )
        if not finished:
            return
        done = steps(settings, len(loader))
        metrics = evaluate() | pictures.skipped(settings, loader, val_loader)
        run.track(done, done, metrics)
        if draw is not None and distributed.rank() == 0:
            (run.folder / rundir.FIGURES).mkdir(exist_ok=True)
            some = pictures.examples(val, eval_transform(settings))
            method.eval()
            draw(method, prepare(some), run.folder / rundir.FIGURES)
        save_encoder(run.folder, method.encoder, run.identity)
        run.finish(metrics, done)
