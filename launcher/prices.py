"""What runs will cost, from what finished runs of the same stage took."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from contract import cost, rundir
from contract.cost import Cost
from contract.settings import Settings
from contract.settings.checks import SettingsError
from launcher import canary
from launcher.plan import Plan, Run
from launcher.supervisor import read_settings

ENOUGH = 20  # finished runs that are looked at for one price


class Prices:
    """The mean of the finished runs of the same group, else of the same stage in this plan, else of the same stage and
    worker in the output directory, by the epoch. Only what is asked for is read."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self._finished = [r for r in plan.runs if r.state in ("reuse", "stale")]
        self._known: dict[tuple[object, ...], Cost | None] = {}
        self.looked_at = 0
        self.canaries: set[str] = set()  # the stages whose price is a canary's

    def of(self, run: Run) -> Cost | None:
        """None where no run like it has finished yet."""
        same = ("group", run.group)
        stage = (run.settings.worker, run.stage, _length(run.settings))
        own = self._mean(same, lambda: ((r.folder, 1.0) for r in self._finished if r.group == run.group))
        found = own or self._mean(("plan", *stage), lambda: self._planned(run))
        return found or self._mean(("everywhere", *stage), lambda: self._everywhere(run)) or self._canary(run)

    def _canary(self, run: Run) -> Cost | None:
        """As its canary's steps went: a lower bound where it evaluates, of which a canary does a few batches only."""
        key = ("canary", run.settings.worker, run.stage, _length(run.settings), run.processes)
        if key not in self._known:
            self._known[key] = None
            if found := canary.of_stage(self.plan.output_dir, run):
                what, of = found
                self.canaries.add(run.stage)
                hours = what.seconds(_times(run.settings, of) or 1.0) / 3600
                gpus = run.settings.env.nodes * (run.settings.env.ngpu or 0) / run.settings.env.pack
                self._known[key] = Cost(hours * gpus, 0.0 if gpus else hours * run.processes)
        return self._known[key]

    def _planned(self, run: Run) -> Iterator[tuple[Path, float]]:
        for each in self._finished:
            same = (each.settings.worker, each.stage) == (run.settings.worker, run.stage)
            if same and (factor := _longer(run.settings, each.settings)):
                yield each.folder, factor

    def _everywhere(self, run: Run) -> Iterator[tuple[Path, float]]:
        for done in (self.plan.output_dir / run.settings.worker).glob(f"*/{rundir.DONE}"):
            with contextlib.suppress(rundir.RunDirError, SettingsError):
                same = rundir.read_run(done.parent).get("stage") == run.stage
                if same and (factor := _longer(run.settings, read_settings(done.parent))):
                    yield done.parent, factor

    def _mean(self, key: tuple[object, ...], runs: Callable[[], Iterable[tuple[Path, float]]]) -> Cost | None:
        if key not in self._known:
            costs: list[Cost] = []
            for folder, factor in runs():
                if len(costs) == ENOUGH:
                    break
                if (took := spent_by(folder)).hours:  # what was taken over from elsewhere took nothing here
                    costs.append(Cost(took.gpu_hours * factor, took.cpu_hours * factor))
            self.looked_at += len(costs)
            self._known[key] = _mean(costs)
        return self._known[key]


def _longer(one: Settings, other: Settings) -> float:
    """How many times as long ``one`` trains; 0 where nothing can be said: no training, or only its first steps, is no
    measure of training."""
    return _times(one, other) if one.smoke == other.smoke else 0.0


def _times(one: Settings, other: Settings) -> float:
    length, others = _length(one), _length(other)
    if length is None or others is None or length == others:
        return 1.0
    return length / others if others else 0.0


def _length(settings: Settings) -> float | None:
    """In epochs, or in iterations where a worker counts these."""
    found: float | None = getattr(settings, "epochs", getattr(settings, "iterations", None))
    return found


def spent_by(folder: Path) -> Cost:
    """What a run has used so far; nothing where there is no run."""
    try:
        processes = rundir.read_run(folder).get("processes")
    except rundir.RunDirError:
        return Cost()
    return cost.of(folder, processes if isinstance(processes, int) else 1)


def _mean(costs: Sequence[Cost]) -> Cost | None:
    if not costs:
        return None
    return Cost(sum(c.gpu_hours for c in costs) / len(costs), sum(c.cpu_hours for c in costs) / len(costs))


def spent(plan: Plan) -> Cost:
    """What all runs of a plan have used so far, failed attempts included."""
    return cost.total(spent_by(run.folder) for run in plan.runs if run.state != "new")


@dataclass(frozen=True)
class Held:
    """What a budget lets start, and what it holds back."""

    go: tuple[Run, ...]
    held: tuple[Run, ...]
    used: float  # hours, by runs that are over and by those under way as they are expected
    asked: float  # hours, of what would start
    unknown: tuple[str, ...]  # stages without a price: one run of each starts, to find out


def within(plan: Plan, todo: Sequence[Run], hours: float) -> Held:
    """As many runs, in their order and each with what it is built upon, as ``hours`` allow beside what the study has
    used. Of a stage that has no price yet only one run starts, and only while something is left."""
    prices = Prices(plan)
    used = spent(plan).hours
    go: list[Run] = []
    held: dict[str, Run] = {}
    asked = 0.0
    under_way = [r for r in plan.runs if r.state in ("running", "queued") and r not in todo]
    used += sum(price.hours for r in under_way if (price := prices.of(r)))
    pilots = {(r.settings.worker, r.stage) for r in under_way if prices.of(r) is None}
    awaited = set(pilots)
    for run in todo:
        price = prices.of(run)
        if any(parent in held for parent in run.parents):
            held[run.identity] = run
        elif price is None:
            stage = (run.settings.worker, run.stage)
            if stage in pilots or used + asked >= hours:
                held[run.identity] = run
            else:
                pilots.add(stage)
                go.append(run)
        elif used + asked + price.hours > hours:
            held[run.identity] = run
        else:
            asked += price.hours
            go.append(run)
    return Held(tuple(go), tuple(held.values()), used, asked, tuple(sorted(stage for _, stage in pilots - awaited)))


UNITS = {"h": 1.0, "min": 1 / 60, "d": 24.0}


def hours(text: str) -> float:
    """``40h``, ``90min``, ``2d``, ``40``."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(h|min|d)?\s*", text)
    if not match:
        raise SettingsError(f"--budget {text}: expected hours of GPUs (of processes, where there are none), as in 40h")
    return float(match[1]) * UNITS[match[2] or "h"]


def shard(plan: Plan, todo: Sequence[Run], text: str) -> list[Run]:
    """``1/2``: every second pretraining with all that is built upon it. Depends on the study alone, so that clusters
    that share no files take different halves."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    number, count = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= number <= count:
        raise SettingsError(f"--shard {text}: expected NUMBER/COUNT, as in 1/2 and 2/2")
    inside = {run.identity for run in plan.runs}
    root: dict[str, str] = {}
    for run in plan.runs:  # parents come first
        root[run.identity] = next((root[parent] for parent in run.parents if parent in inside), run.identity)
    roots = list(dict.fromkeys(root.values()))
    mine = set(roots[number - 1 :: count])
    return [run for run in todo if root[run.identity] in mine]
