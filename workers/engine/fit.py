"""The one training loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from workers.data.loader import Shuffled

from . import distributed
from .checkpoint import Checkpoint
from .meter import Meter

Schedule = Callable[[float], float]  # of the fraction of training that is done
DTYPES = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}
LOOK_EVERY_S = 1.0  # about how often all ranks agree on whether to stop or to save
MOST_STEPS = 100  # between two looks


class Scheduled(Protocol):
    """A method with schedules besides the learning rate; called before the first micro-batch of every step."""

    def before_step(self, **values: float) -> None: ...


class NotFinite(Exception):
    """The loss became infinite or NaN."""


def fit(
    model: nn.Module,
    loader: DataLoader[Any],
    optimizer: torch.optim.Optimizer,
    *,
    epochs: int,
    most: int | None = None,
    schedules: Mapping[str, Schedule],
    checkpoint: Checkpoint,
    prepare: Callable[[Any], Any],
    track: Callable[[int, int, Mapping[str, float]], None],
    stop: Callable[[], bool],
    seed: int = 0,
    accumulate: int = 1,
    amp: str = "none",
    clip: float | None = None,
    log_every: int = 20,
    checkpoint_minutes: float = 10.0,
    checkpoint_epochs: int | None = None,
    evaluate: Callable[[], Mapping[str, float]] | None = None,
    evaluate_epochs: int = 0,
) -> bool:
    """Train from wherever ``checkpoint`` left off. True when all ``epochs``, or the first ``most`` steps of them, are
    done, False when asked to stop.

    ``model(batch)`` returns a dict of scalars: ``loss`` is minimised and all are tracked, as means over the ranks and
    over the steps since the last line. A step is one update by ``accumulate`` micro-batches; what is left over at the
    end of an epoch is not used. ``schedules["lr"]`` sets the optimizer's rate (times a group's ``lr_scale``), the
    others are given to ``model.before_step``. The state is saved when ``stop()`` holds on any rank, every
    ``checkpoint_minutes`` and ``checkpoint_epochs``. Randomness depends on (seed, rank, step) only, so a run that was
    stopped ten times equals one that never was. Raises NotFinite on all ranks, naming step and rank.
    """
    module, device = distributed.unwrap(model), distributed.device()
    assert isinstance(loader.sampler, Shuffled)
    sampler = loader.sampler
    scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
    meter = Meter(device)
    checkpoint.parts |= {"scaler": scaler, "meter": meter}
    per_epoch = len(loader) // accumulate
    total = epochs * per_epoch
    last = total if most is None else min(most, total)
    if epochs and not per_epoch:
        raise ValueError(f"accum_iter={accumulate}: an epoch has only {len(loader)} batches; choose at most that many")

    step = checkpoint.restore()
    pace = Pace(step, checkpoint_minutes)
    model.train()
    while step < last:
        epoch, done = divmod(step, per_epoch)
        sampler.start(epoch, done * accumulate)
        batches = iter(loader)
        for window in range(done, per_epoch):
            now = (epoch + window * accumulate / len(loader)) / epochs
            values = {name: schedule(now) for name, schedule in schedules.items()}
            for group in optimizer.param_groups:
                group["lr"] = values["lr"] * group.get("lr_scale", 1.0)
            others = {name: value for name, value in values.items() if name != "lr"}
            if others:
                cast("Scheduled", module).before_step(**others)

            for micro in range(accumulate):
                batch = prepare(next(batches))
                distributed.seed(seed, step, micro)
                with distributed.synchronised(model, micro == accumulate - 1):
                    with torch.autocast(device.type, DTYPES[amp], enabled=amp != "none"):
                        scalars: dict[str, Tensor] = model(batch)
                    torch.autograd.backward(scaler.scale(scalars["loss"] / accumulate))
                meter.add(scalars, step)
            if clip is not None:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(module.parameters(), clip)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            step += 1

            to_log, epoch_ends = step % log_every == 0 or step == last, step % per_epoch == 0
            if to_log or epoch_ends or pace.due(step):
                stopping, saving = pace.look(step, stop(), meter.first_bad)
                if to_log:
                    track(step, total, meter.read() | {f"train/{name}": value for name, value in values.items()})
                if epoch_ends and evaluate and evaluate_epochs and (epoch + 1) % evaluate_epochs == 0 and step < last:
                    track(step, total, evaluate())
                    model.train()
                due = epoch_ends and checkpoint_epochs and (epoch + 1) % checkpoint_epochs == 0
                if stopping or saving or due or step == last:
                    meter.collect()
                    checkpoint.save(step)
                    pace.saved()
                if stopping and step < last:
                    return False
            if step == last:
                break
    return True


class Pace:
    """When the ranks talk to each other about stopping and saving: often enough, but not every step."""

    def __init__(self, step: int, minutes: float):
        self.minutes, self.next = minutes, step + 1
        self.last_step, self.last_time = step, time.monotonic()
        self.saved()

    def due(self, step: int) -> bool:
        return step >= self.next

    def look(self, step: int, stop: bool, first_bad: int) -> tuple[bool, bool]:
        """(stop?, save?), the same on every rank. Raises NotFinite on all if it happened on one."""
        now = time.monotonic()
        per_step = (now - self.last_time) / max(step - self.last_step, 1)
        self.last_step, self.last_time = step, now
        ahead = max(1, min(MOST_STEPS, int(LOOK_EVERY_S / max(per_step, 1e-6))))
        save = now - self.last_save > self.minutes * 60
        everyone = distributed.exchange([stop, save, step + ahead, first_bad])
        bad = {rank: each[3] for rank, each in enumerate(everyone) if each[3] >= 0}
        if bad:
            rank = min(bad, key=lambda r: bad[r])
            raise NotFinite(
                f"the loss is not finite at step {bad[rank]} on rank {rank}; lower the learning rate or use amp=bf16"
            )
        self.next = everyone[0][2]
        return any(each[0] for each in everyone), bool(everyone[0][1])

    def saved(self) -> None:
        self.last_save = time.monotonic()
