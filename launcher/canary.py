"""One run first, through all of its stages at smoke scale; the rest of a launch waits for it.

A canary is a run like any other, of the same settings but for ``smoke``, and so of another identity. What it took is
the first thing that is known of what the others will take.
"""

from __future__ import annotations

import copy
import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from contract import rundir
from contract.settings import Settings, Stepping
from launcher.identity import Input, find_encoder, takes_encoder
from launcher.plan import Plan, Run, build
from launcher.supervisor import read_settings

STEPS = 20
LOG_EVERY = 5  # so that the time of a step can be told from its start
SUFFIX = " canary"  # of its stages


def wanted(todo: Sequence[Run]) -> bool:
    """Is this a launch that a canary goes before?"""
    env = todo[0].settings.env if todo else None
    new = [run for run in todo if run.settings.smoke is None]
    return env is not None and env.canary and len(new) > env.canary_above


def of(plan: Plan, todo: Sequence[Run]) -> list[Run]:
    """The canary of what is to be started: a run that most of its stages are built upon, and one of each of these. The
    first such run of the whole plan, so that a sweep that grows keeps its canary."""
    stages_todo = {run.stage for run in todo}
    below: dict[str, list[Run]] = {}  # of every run that needs none of the others: what is built upon it
    root: dict[str, str] = {}
    for run in (run for run in plan.runs if run.stage in stages_todo):  # parents come first
        root[run.identity] = next((root[p] for p in run.parents if p in root), run.identity)
        below.setdefault(root[run.identity], []).append(run)
    first = max(below.values(), key=lambda runs: len({run.stage for run in runs}))
    known = {run.identity: run for run in plan.runs}
    made: dict[str, Run] = {}
    stages: set[str] = set()
    for run in first:
        if run.stage not in stages and all(p in made or p not in root for p in run.parents):
            stages.add(run.stage)
            made[run.identity] = _small(run, made, known)
    return list(made.values())


def to_run(small: Sequence[Run]) -> list[Run]:
    """Those that are to be run: not what finished with the code of today, nor what another launch has queued."""
    again: list[Run] = []
    for run in small:
        below = any(run.parents == (each.identity,) for each in again)
        if run.state not in ("reuse", "queued", "running") or below:
            again.append(run)
    return again


def _small(run: Run, made: Mapping[str, Run], known: Mapping[str, Run]) -> Run:
    settings = copy.deepcopy(run.settings)
    settings.smoke, settings.then = STEPS, []
    if isinstance(settings, Stepping):
        settings.log_every = LOG_EVERY
    source: Input | None = None
    if takes_encoder(settings.worker):
        parent = next((made.get(p) or known.get(p) for p in run.parents), None)
        if parent is None:
            named = str(getattr(settings, "encoder"))  # noqa: B009  # not all have one
            source = find_encoder(named, Path(settings.output_dir))
        else:
            at, identity = str(parent.folder), parent.identity
            source = Input(path=at, identity=identity, group=parent.group, parents=(identity,))
        setattr(settings, "encoder", source.path)  # noqa: B010
    return build(settings, source, run.stage + SUFFIX, run.explicit)


# -- what it took -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """What a finished canary says of the runs that it stands for."""

    step_s: float  # 0 where a stage has no steps
    steps: int  # of the whole training
    rest_s: float  # start, and evaluations of a few batches
    peak_mb: float  # of the largest process
    gpu_mb: float  # on a GPU; 0 without
    disk_mb: float  # two checkpoints and the encoder

    def seconds(self, times: float = 1.0) -> float:
        """Of a run that trains so many times as long."""
        return self.step_s * self.steps * times + self.rest_s


def measured(folder: Path) -> Measured | None:
    """None where it has not finished."""
    if not (folder / rundir.DONE).exists():
        return None
    records, _ = rundir.read_journal(folder / rundir.METRICS)
    trained = [r for r in records if r.get("of", 0) > r.get("step", 0) > 0]
    pairs = itertools.pairwise(trained)
    paces = [(b["time"] - a["time"]) / (b["step"] - a["step"]) for a, b in pairs if b["step"] > a["step"]]
    step_s = statistics.median(paces) if paces else 0.0
    ends = [r for r in rundir.attempts(folder) if r.get("event") == "end"]
    took = sum(float(r.get("seconds", 0)) for r in ends)
    done = rundir.read_json(folder / rundir.DONE)
    size = {name: _size(folder / name) for name in (rundir.CHECKPOINT, rundir.ENCODER)}
    return Measured(
        step_s=step_s,
        steps=int(trained[-1]["of"]) if trained else 0,
        rest_s=max(0.0, took - step_s * (trained[-1]["step"] if trained else 0)),
        peak_mb=max((float(r.get("peak_rss_mb", 0)) for r in ends), default=0.0),
        gpu_mb=float(done.get("peak_gpu_mb", 0)),
        disk_mb=(2 * size[rundir.CHECKPOINT] + size[rundir.ENCODER]) / 2**20,
    )


def of_stage(output_dir: Path, run: Run) -> tuple[Measured, Settings] | None:
    """The newest canary that went before runs of this stage, and its settings."""
    found = []
    for path in (output_dir / run.settings.worker).glob(f"*/{rundir.RUN}"):
        info = rundir.read_run(path.parent)
        if info.get("stage") == run.stage + SUFFIX and (what := measured(path.parent)):
            found.append((float(info.get("submitted", 0)), path.parent, what))
    if not found:
        return None
    _, folder, what = max(found, key=lambda each: each[0])
    return what, read_settings(folder)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
