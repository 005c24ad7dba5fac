"""``drill``: before a thousand runs rely on it, whether being preempted loses nothing here.

One run at smoke scale, three times over, each in a folder of its own, of the same code and so of the same identity:
undisturbed; warned by the scheduler's own signal in mid-training, so that it saves, leaves and is started again; killed
without a warning, before there is a checkpoint and after. Then what they wrote down is compared line by line.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import math
import re
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from contract import rundir
from contract.settings import Stepping
from contract.settings.checks import SettingsError
from launcher import NotQueued, backends, capsule, curves, rundirs, show
from launcher.identity import find_encoder, takes_encoder
from launcher.places import KILL, WARNING, Here, InQueue, Place
from launcher.plan import Plan, Run, build, check_data
from launcher.rundirs import Submission

STEPS = 20
SAME, NOT_SAME = 0, 100  # exit codes
TOO_LATE = "it ended before it could be interrupted; --steps N makes it longer"


def drill(found: Plan, args: argparse.Namespace) -> int:
    """Of the first run of a plan that trains by itself. Gives the exit code."""
    first = next((run for run in found.runs if _trains(run) and not run.parents), found.runs[0])
    _check(first)
    name = re.sub(r"[^\w.-]+", "-", first.name).strip("-.") or "run"
    folder = found.output_dir / "drills" / f"{time.strftime('%Y%m%d-%H%M%S')}-{name}"
    out = show.console(args.no_color, stderr=True)
    trials = Trials(first, folder, lambda text: out.print(show.plain(text)))
    trials.say(f"drill of {first.name} seed={first.settings.seed} on {first.settings.env.scheduler}, in {folder}")
    try:
        disturbed = trials.all(args.steps)
    except NotQueued:
        if len(trials.made) == 1:  # what was refused leaves nothing behind
            shutil.rmtree(folder)
        raise
    finally:
        trials.stop()
    results = [Result.of(trial, trials.calm, args.tolerance) for trial in disturbed]
    good = bool(results) and all(result.good for result in results)
    if args.json:
        print(json.dumps(_described(trials, results, args.tolerance, good, args.keep or not good)))
    else:
        _show(show.console(args.no_color), trials, results, args.tolerance)
    if good and not args.keep:
        shutil.rmtree(folder)
        with contextlib.suppress(OSError):  # others are in it
            folder.parent.rmdir()
    else:
        print(f"kept: {folder}", file=sys.stderr)
    return SAME if good else NOT_SAME


def _trains(run: Run) -> bool:
    """``epochs`` are counted by most, ``iterations`` by those that know no epochs."""
    s = run.settings
    return isinstance(s, Stepping) and getattr(s, "epochs", getattr(s, "iterations", 0)) > 0


def _check(run: Run) -> None:
    """Raises SettingsError or Unavailable before anything is written."""
    settings = run.settings
    if not _trains(run):
        raise SettingsError(f"worker={settings.worker}: has no training to interrupt; for instance worker=main_lmim")
    if settings.env.scheduler == "local" and settings.env.nodes > 1:
        raise SettingsError("env.nodes: this is one machine; env.slurm=True or env.lsf=True asks for more")
    check_data([run])
    backends.load(settings.env.scheduler).ready()


# -- a run, and what is done to it ------------------------------------------------------------------------------------


@dataclass
class Trial:
    what: str
    run: Run
    place: Place
    say: Callable[[str], None]
    interrupted: list[int | None] = field(default_factory=list)  # the last step before each interruption
    resumed: list[int | None] = field(default_factory=list)  # the step from which the attempt after it went on
    trouble: str = ""  # why it proves nothing

    @property
    def folder(self) -> Path:
        return self.run.folder

    @property
    def state(self) -> str:
        return rundir.state(self.folder)

    def tell(self, text: str) -> None:
        self.say(f"{self.what:12}{text}")

    def starts(self) -> list[dict[str, Any]]:
        records, _ = rundir.read_journal(rundir.attempts_file(self.folder, 0))
        return [record for record in records if record.get("event") == "start"]

    def lines(self) -> list[dict[str, Any]]:
        """What the attempt that runs now has written."""
        records, _ = rundir.read_journal(self.folder / rundir.METRICS)
        began = float(starts[-1]["time"]) if (starts := self.starts()) else math.inf
        return [record for record in records if float(record.get("time", 0)) >= began - 0.001]

    def until(self, condition: Callable[[], bool]) -> bool:
        """Wait for it. False where the run came to its end before."""
        while not condition():
            if self.state in ("finished", "cancelled"):
                return condition()
            if not self.place.alive() and not self._late():
                return condition()
            time.sleep(self.place.look_s)
        return True

    def _late(self) -> bool:
        """The scheduler has let go of it: wait until its last files are seen. True if it runs after all."""
        end = time.monotonic() + self.place.late_s
        while time.monotonic() < end and self.state != "finished" and not self._written_down():
            time.sleep(self.place.look_s)
        return self.place.alive()

    def _written_down(self) -> bool:
        """How the last attempt ended."""
        return (rundir.last_record(rundir.attempts_file(self.folder, 0)) or {}).get("event") == "end"

    def interrupt(self, name: str, when: Callable[[], bool]) -> bool:
        """A signal at that moment. False where the run was over before."""
        if not self.until(when):
            self.trouble = TOO_LATE if self.state == "finished" else self._how_it_ended()
            return False
        self._note_resumption()
        attempt = len(self.starts())
        self.tell(f"at step {self.lines()[-1]['step']}: {name} to all of its processes")
        self.place.signal(name)
        if name == KILL:
            while self.place.alive() and len(self.starts()) == attempt:
                time.sleep(self.place.look_s)
            if self.state not in ("finished", "cancelled") and not self.place.alive():
                self.place.start()
        return self._started_again(attempt)

    def _started_again(self, before: int) -> bool:
        """Wait for another attempt; here, where no scheduler does so, begin it."""
        while len(self.starts()) <= before:
            if self.state in ("finished", "cancelled"):
                self.trouble = TOO_LATE
                return False
            if not self.place.alive() and not self._late() and len(self.starts()) <= before:
                if self.state != "stopped":
                    self.trouble = self._how_it_ended()
                    return False
                if self.place.queues_again:
                    self.tell("saved and left, and was not queued again by the scheduler; sent again from here")
                self.place.start()
            time.sleep(self.place.look_s)
        self.interrupted.append(int(self.starts()[before].get("step") or 0))
        self.tell(f"started again, after step {self.interrupted[-1]}")
        return True

    def to_the_end(self) -> bool:
        self.until(lambda: self.state == "finished")
        self._note_resumption()
        if self.state != "finished":
            self.trouble = self._how_it_ended()
            return False
        while self.place.alive() and not self._written_down():
            time.sleep(self.place.look_s)
        self.tell("finished")
        return True

    def _how_it_ended(self) -> str:
        return f"{self.state}: {show.last_words(self.folder)}"

    def _note_resumption(self) -> None:
        if len(self.starts()) > 1:
            lines = self.lines()
            self.resumed.append(int(lines[0]["step"]) - 1 if lines else None)


class Trials:
    """The three of them, of one capsule."""

    def __init__(self, first: Run, folder: Path, say: Callable[[str], None]):
        self.first, self.folder, self.say = first, folder, say
        self.place = Here if first.settings.env.scheduler == "local" else InQueue
        settings = first.settings
        apart: list[str | Path] = [settings.output_dir, *([settings.data_path] if settings.data_path else [])]
        self.code = capsule.collect(apart)
        self.made: list[Trial] = []

    @property
    def calm(self) -> Trial:
        return self.made[0]

    @property
    def steps(self) -> int:
        return _step(self.calm)

    def all(self, steps: int | None) -> list[Trial]:
        """Those that were disturbed; none where the undisturbed run did not finish."""
        calm = self._undisturbed("undisturbed", steps or STEPS)
        if calm.trouble:
            return []
        enough, whole = self.place.enough_s, int(calm.lines()[0]["of"])
        if steps is None and (took := _seconds(calm)) < enough and self.steps < whole:
            more = min(math.ceil(self.steps * 1.2 * enough / max(took, 0.01)), whole)
            calm.tell(f"{self.steps} steps took {took:.2g} s, too short to be met in the middle; again with {more}")
            self.made.clear()
            calm = self._undisturbed("undisturbed-again", more)
            if calm.trouble:
                return []
        return [self._warned(), self._killed(_seconds(calm))]

    def stop(self) -> None:
        for trial in self.made:
            trial.place.stop()

    def _undisturbed(self, name: str, steps: int) -> Trial:
        trial = self._begin("undisturbed", name, steps)
        trial.to_the_end()
        return trial

    def _warned(self) -> Trial:
        trial = self._begin("warned", "warned", self.steps)
        if trial.interrupt(WARNING, lambda: _step(trial) >= max(1, self.steps // 2)) and trial.to_the_end():
            causes = _causes(trial)
            if causes[:1] != ["stopped"]:
                trial.trouble = f"it did not save and leave when it was warned, but ended as: {', '.join(causes)}"
            elif trial.resumed[0] != trial.interrupted[0]:
                trial.trouble = (
                    f"what was saved is lost: warned, it left after step {trial.interrupted[0]}, "
                    f"and went on from step {trial.resumed[0]}"
                )
        return trial

    def _killed(self, took: float) -> Trial:
        """With checkpoints a quarter of the training apart, if they were not to come more often anyway."""
        trial = self._begin("killed", "killed", self.steps, minutes=took / 4 / 60)
        saved: list[int] = []

        def went_on() -> bool:
            if not saved and (trial.folder / rundir.CHECKPOINT).exists():
                saved.append(_step(trial))
            return bool(saved) and _step(trial) > max(saved[0], self.steps // 2)

        if (
            trial.interrupt(KILL, lambda: _step(trial) >= 1)
            and trial.interrupt(KILL, went_on)
            and trial.to_the_end()
            and not trial.resumed[1]
        ):
            trial.trouble = "it had a checkpoint, and began again from step 0"
        return trial

    def _begin(self, what: str, name: str, steps: int, minutes: float | None = None) -> Trial:
        settings, output_dir = copy.deepcopy(self.first.settings), self.folder / name
        assert isinstance(settings, Stepping)
        settings.output_dir, settings.smoke, settings.log_every = str(output_dir), steps, 1
        settings.then, settings.env.max_parallel, settings.env.pack = [], 1, 1
        if minutes is not None:
            settings.checkpoint_minutes = min(settings.checkpoint_minutes, minutes)
        source = None
        if takes_encoder(settings.worker):
            source = find_encoder(getattr(settings, "encoder"), output_dir)  # noqa: B009  # not all settings have one
        run = build(settings, source, self.first.stage, self.first.explicit)
        output_dir.mkdir(parents=True)
        self.code.store(output_dir)
        submission = Submission(
            name=f"drill-{name}",
            output_dir=output_dir,
            capsule=self.code.path(output_dir),
            runs=(run,),
            folder=rundirs.new_folder(output_dir, "drill"),
            fresh=frozenset({run.identity}),
        )
        plan = Plan(name="drill", output_dir=output_dir, runs=(run,))
        trial = Trial(what, run, self.place(submission, plan, self.code.commit()), self.say)
        self.made.append(trial)
        trial.place.start()
        trial.tell(f"started: {steps} steps")
        return trial


def _step(trial: Trial) -> int:
    lines = trial.lines()
    return int(lines[-1].get("step") or 0) if lines else 0


def _causes(trial: Trial) -> list[str]:
    return [str(r["cause"]) for r in rundir.attempts(trial.folder) if r.get("event") == "end"]


def _seconds(calm: Trial) -> float:
    """From the first step to the last."""
    lines = calm.lines()
    last = next(line for line in lines if line["step"] == lines[-1]["step"])  # the others of that step are evaluations
    return float(last["time"]) - float(lines[0]["time"])


# -- comparing --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    trial: Trial
    worst: Mapping[str, float]  # the largest relative difference by metric, where there is any
    first: str  # the first line that differs
    encoder: str  # same, differs, none
    good: bool

    @classmethod
    def of(cls, trial: Trial, calm: Trial, tolerance: float) -> Result:
        if trial.trouble:
            return cls(trial, {}, "", "", False)
        worst, first = curves.compare(curves.written(calm.folder), curves.written(trial.folder))
        encoder = curves.encoders(trial.folder / rundir.ENCODER, calm.folder / rundir.ENCODER)
        good = max(worst.values(), default=0.0) <= tolerance and (encoder != "differs" or tolerance > 0)
        return cls(trial, worst, first, encoder, good)

    @property
    def verdict(self) -> str:
        if self.trial.trouble:
            return "not shown"
        if not self.worst:
            return "byte-identical"
        metric = max(self.worst, key=lambda name: self.worst[name])
        return f"differs by {self.worst[metric]:.2g} in {metric}"


# -- showing ----------------------------------------------------------------------------------------------------------


def _show(out: Console, trials: Trials, results: list[Result], tolerance: float) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("run", "interrupted after step", "went on from", "attempts", "curve", "encoder"):
        table.add_column(name)
    table.add_row("undisturbed", "-", "-", str(len(trials.calm.starts())), trials.calm.trouble or "-", "-")
    for result in results:
        trial = result.trial
        steps = [_listed(each) for each in (trial.interrupted, trial.resumed)]
        table.add_row(trial.what, *steps, str(len(trial.starts())), result.verdict, result.encoder or "-")
    out.print(table)
    for result in results:
        if said := result.trial.trouble or result.first:
            out.print(f"{result.trial.what}: {show.plain(said)}")
    if results and all(result.good for result in results):
        within = "byte for byte" if not any(r.worst for r in results) else f"within {tolerance:g} (relative)"
        out.print(f"preemption loses nothing here: {trials.steps} steps, the same {within}")
    else:
        out.print("preemption may lose something here; logs and curves are in the folder that is kept")


def _listed(steps: list[int | None]) -> str:
    return ", ".join("?" if step is None else str(step) for step in steps) or "-"


def _described(trials: Trials, results: list[Result], tolerance: float, good: bool, kept: bool) -> dict[str, Any]:
    run = trials.calm.run
    return {
        "name": run.name,
        "identity": run.identity,
        "scheduler": run.settings.env.scheduler,
        "steps": trials.steps,
        "tolerance": tolerance,
        "equal": good,
        "trouble": trials.calm.trouble or None,
        "dir": str(trials.folder) if kept else None,
        "runs": [
            {
                "run": result.trial.what,
                "interrupted": result.trial.interrupted,
                "resumed": result.trial.resumed,
                "attempts": len(result.trial.starts()),
                "equal": result.good,
                "identical": not result.trial.trouble and not result.worst,
                "worst": {name: value if math.isfinite(value) else None for name, value in result.worst.items()},
                "first": result.first or None,
                "encoder": result.encoder or None,
                "trouble": result.trial.trouble or None,
            }
            for result in results
        ],
    }
