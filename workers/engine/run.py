"""One attempt at one run: its settings, its journal, the fence, and how it ends."""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypedDict, TypeVar

import torch
import yaml

import contract.settings
from contract import rundir
from contract.settings import Settings, Training
from contract.settings.checks import SettingsError
from workers.data import DataError

from . import distributed, pulse
from .checkpoint import CheckpointError
from .encoder import EncoderError
from .fit import NotFinite

log = logging.getLogger(__name__)
S = TypeVar("S", bound=Settings)
T = TypeVar("T", bound=Training)

FOR_THE_USER = (SettingsError, DataError, EncoderError, CheckpointError, NotFinite, rundir.RunDirError, OSError)
"""Errors whose message says it all; the traceback still goes to the log."""


@dataclass
class Run(Generic[S]):
    folder: Path
    settings: S
    attempt: str | None  # set by the supervisor; None when started by hand
    identity: str
    journal: rundir.Journal | None  # on rank 0 only

    def track(self, step: int, of: int, scalars: Mapping[str, float]) -> None:
        """One line of metrics.jsonl: ``step`` steps are done, of ``of`` in all."""
        if self.journal is not None:
            self.journal.append({"step": step, "of": of, "time": round(time.time(), 3), **scalars})
            shown = "  ".join(f"{k.partition('/')[2]} {v:.4g}" for k, v in scalars.items())
            log.info("step %d of %d  %s", step, of, shown)

    def stop(self) -> bool:
        """Did the supervisor, or a person, ask us to save and leave? Raises RunDirError when the run was taken over.

        Asked when all ranks have agreed to go on, and so a sign of life."""
        pulse.beat()
        if self.journal is None:
            return False
        if self.attempt is not None:
            owner = rundir.read_json(self.folder / rundir.OWNER)
            if owner.get("attempt") != self.attempt:
                raise rundir.RunDirError(
                    f"{self.folder}: taken over by attempt {owner.get('attempt')}; leaving it alone"
                )
            if rundir.stop_file(self.folder, self.attempt).exists():
                return True
        return (self.folder / rundir.STOP).exists()

    def finish(self, metrics: Mapping[str, float], steps: int, **more: Any) -> None:
        """The last thing a run does: its presence *is* finished. ``more`` stands beside the metrics in done.json."""
        if distributed.rank() == 0:
            if self.journal is not None:
                self.journal.sync()
            done: dict[str, Any] = {"metrics": dict(metrics), "steps": steps, "time": round(time.time(), 3), **more}
            if torch.cuda.is_available():
                done["peak_gpu_mb"] = round(torch.cuda.max_memory_allocated() / 2**20)
            rundir.write_json(self.folder / rundir.DONE, done)
            log.info("finished: %s", json.dumps(done["metrics"]))


class Loop(TypedDict):
    """What ``fit`` is told by the settings alone."""

    epochs: int
    most: int | None
    track: Callable[[int, int, Mapping[str, float]], None]
    stop: Callable[[], bool]
    seed: int
    accumulate: int
    amp: str
    clip: float | None
    log_every: int
    checkpoint_minutes: float
    checkpoint_epochs: int | None


def loop(run: Run[T]) -> Loop:
    settings = run.settings
    return Loop(
        epochs=settings.epochs,
        most=settings.smoke,
        track=run.track,
        stop=run.stop,
        seed=settings.seed,
        accumulate=settings.accum_iter or 1,
        amp=settings.amp,
        clip=settings.clip_grad,
        log_every=settings.log_every,
        checkpoint_minutes=settings.checkpoint_minutes,
        checkpoint_epochs=settings.checkpoint_epochs,
    )


def steps(settings: Training, batches: int) -> int:
    """How many the training takes, with so many batches an epoch."""
    whole = settings.epochs * (batches // (settings.accum_iter or 1))
    return whole if settings.smoke is None else min(settings.smoke, whole)


@contextlib.contextmanager
def open_run(cls: type[S]) -> Iterator[Run[S]]:
    """Everything between ``python -m workers.x RUN_DIR`` and the first batch; ends the process with 1 on an error."""
    if len(sys.argv) != 2:
        sys.exit("usage: python -m workers.WORKER RUN_DIRECTORY   (the launcher does this for you)")
    folder = Path(sys.argv[1]).resolve()
    attempt = os.environ.get("SIGHTLINE_ATTEMPT")
    if attempt is not None:
        _die_with_parent()
    if hasattr(signal, "SIGUSR2"):
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # the supervisor alone listens to the scheduler
    _start_log()
    try:
        if attempt is not None:
            pulse.start(folder, attempt)
        with distributed.process_group():
            journal = rundir.Journal(folder / rundir.METRICS) if distributed.rank() == 0 else None
            settings = read_settings(folder, cls)
            identity = str(rundir.read_run(folder)["identity"])
            torch.backends.cudnn.benchmark = False  # the same kernels in every attempt
            torch.backends.cudnn.deterministic = True
            if distributed.rank() == 0:
                where = distributed.device().type
                log.info(
                    "%s: %d process(es) on %s, %d threads each",
                    folder,
                    distributed.world_size(),
                    where,
                    torch.get_num_threads(),
                )
                if where == "cpu" and settings.env.ngpu:
                    log.warning("env.ngpu=%d, but there is no usable GPU: running on the CPU", settings.env.ngpu)
            yield Run(folder, settings, attempt, identity, journal)
    except FOR_THE_USER as error:
        log.debug("", exc_info=True)
        log.error("error: %s", str(error).replace("\n", "; "))
        sys.exit(1)


def read_settings(folder: Path, cls: type[S]) -> S:
    """The run's ``config.yaml``, as the launcher checked it. Raises SettingsError, naming the file."""
    path = folder / rundir.CONFIG
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise rundir.RunDirError(f"{path}: unreadable ({error})") from None
    try:
        settings = contract.settings.build(cls, values)
    except SettingsError as error:
        raise SettingsError(f"{path}: {error}") from None
    return settings


def _start_log() -> None:
    rank = int(os.environ.get("RANK", "0"))
    logging.basicConfig(
        stream=sys.stdout,
        level=logging.INFO if rank == 0 else logging.WARNING,
        format="%(asctime)s " + (f"[rank {rank}] " if "RANK" in os.environ else "") + "%(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
        force=True,
    )


def _die_with_parent() -> None:
    """Linux: SIGKILL this process when the one that started it is gone, so that no orphan goes on writing."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
