"""What a person sees: results on stdout, progress on stderr, one screen at any size. Colours on a terminal only."""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from contract import cost, rundir
from contract.cost import Cost
from launcher import Refused, mending, prices, prune, remarks, why
from launcher import canary as canaries
from launcher.canary import Measured
from launcher.plan import STATES, Plan, Run

COLOURS = {
    "finished": "green", "reuse": "green", "running": "blue", "queued": "yellow", "waiting": "yellow", "new": "yellow",
    "stopped": "yellow", "stale": "magenta", "failed": "red", "cancelled": "bright_black", "blocked": "bright_black",
    "held": "magenta",
}  # fmt: skip
MOST_ROWS = 24
AT_MOST = 12  # lines of a list; the rest is counted
EVERY = 0.1  # of a run, between two lines where there is no terminal


def console(no_color: bool = False, stderr: bool = False) -> Console:
    wide = None if (sys.stderr if stderr else sys.stdout).isatty() else 200
    return Console(no_color=no_color or None, stderr=stderr, highlight=False, markup=False, width=wide, soft_wrap=True)


def plain(text: Any) -> str:
    """Names come from people: no control character of theirs reaches the terminal."""
    return "".join(c if c.isprintable() else "?" for c in str(text))


def counts(
    head: Sequence[str],
    rows: Mapping[tuple[str, ...], Counter[str]],
    states: Iterable[str],
    more: Mapping[tuple[str, ...], str] = MappingProxyType({}),
) -> Table:
    """One row per stage, one column per state that occurs, and ``more`` at the end of a row."""
    total: Counter[str] = sum(rows.values(), Counter())
    shown = [s for s in states if total[s]]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in head:
        table.add_column(name)
    for name in [*shown, "total"]:
        table.add_column(name, justify="right", style=COLOURS.get(name))
    if more:
        table.add_column("latest", overflow="ellipsis", no_wrap=True)
    lines = [*rows.items()] + ([(("all", *[""] * (len(head) - 1)), total)] if len(rows) > 1 else [])
    for names, found in lines:
        said = [plain(more.get(names, ""))] if more else []
        table.add_row(
            *map(plain, names), *(str(found[s]) if found[s] else "-" for s in shown), str(found.total()), *said
        )
    return table


def plan(out: Console, plan: Plan) -> None:
    title = f"{plan.study.title}, " if plan.study else ""
    out.print(f"{plain(plan.name)}: {title}{runs(len(plan.runs))} in {plain(short(plan.output_dir))}")
    rows: dict[tuple[str, ...], Counter[str]] = {}
    for run in plan.runs:
        rows.setdefault((run.stage, run.settings.worker), Counter())[run.state] += 1
    out.print(counts(["stage", "worker"], rows, STATES))
    changed = sorted({path for r in plan.runs for path in r.changed})
    if changed:
        more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
        out.print(f"stale: made before these changed: {', '.join(changed[:4])}{more}; fill --stale makes them again")


def canary(out: Console, first: Sequence[Run], rest: int) -> None:
    stages = ", ".join(run.stage.removesuffix(" canary") for run in first)
    which = f"seed={first[0].settings.seed} {first[0].identity}"
    out.print(f"canary: {which} goes first, {first[0].settings.smoke} steps of {stages}; {runs(rest)} wait for it")


def study(out: Console, plan: Plan, todo: Sequence[Run]) -> None:
    """Which cells are full, what is left to do and its price."""
    assert plan.study is not None
    states = {run.identity: run.state for run in plan.runs}
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("done", *plan.study.columns):
        table.add_column(plain(name))
    for row in list(plan.study.rows)[:MOST_ROWS]:
        cells = [[states[i] for i in plan.cells[row, column]] for column in plan.study.columns]
        table.add_row(plain(row), *(f"{sum(s in ('reuse', 'stale') for s in cell)}/{len(cell)}" for cell in cells))
    out.print(table)
    if len(plan.study.rows) > MOST_ROWS:
        out.print(f"and {len(plan.study.rows) - MOST_ROWS} more rows")
    for line in remarks.of(plan):
        out.print(f"note: {plain(line)}")
    used = prices.spent(plan)
    out.print(f"used so far: {used}" + (f"; to do: {price(plan, todo)}" if todo else "; nothing is missing"))


def price(plan: Plan, todo: Sequence[Run]) -> str:
    known = prices.Prices(plan)
    stages: dict[str, Cost] = {}
    unknown: Counter[str] = Counter()
    for run in todo:
        each = known.of(run)
        if each is None:
            unknown[run.stage] += 1
        else:
            stages[run.stage] = stages.get(run.stage, Cost()) + each
    said = runs(len(todo))
    if stages:
        parts = ", ".join(f"{stage} {each}" for stage, each in stages.items())
        how = [f"as {runs(known.looked_at)} took"] if known.looked_at else []
        how += [f"{', '.join(sorted(known.canaries))} by its canary"] if known.canaries else []
        said += f", about {cost.total(stages.values())} ({parts}), {'; '.join(how)}"
    if unknown:
        open_ones = ", ".join(f"{n} of {stage}" for stage, n in unknown.items())
        said += f"; of unknown price, as none has finished: {open_ones}"
    return said


def resources(plan: Plan, todo: Sequence[Run]) -> str | None:
    """What canaries say of memory, of the time of a step, and of the disk that is needed and there is."""
    of: dict[str, tuple[Measured, int]] = {}
    for run in todo:
        if run.stage in of:
            of[run.stage] = of[run.stage][0], of[run.stage][1] + 1
        elif found := canaries.of_stage(plan.output_dir, run):
            of[run.stage] = found[0], 1
    if not of:
        return None
    parts = []
    for stage, (what, _) in of.items():
        said = [f"{size(what.peak_mb * 2**20)} of memory a process"]
        said += [f"{size(what.gpu_mb * 2**20)} on the GPU"] if what.gpu_mb else []
        said += [f"{what.step_s:.2g} s a step, {what.steps:,} steps"] if what.step_s else []
        parts.append(f"{stage} {', '.join(said)}")
    needed = sum(what.disk_mb * n for what, n in of.values())
    at = next(p for p in (plan.output_dir, *plan.output_dir.parents) if p.exists())
    free = shutil.disk_usage(at).free / 2**20
    short = "; NOT ENOUGH, prune or choose another output_dir" if needed > free else ""
    return f"by canary: {'; '.join(parts)}; disk {size(needed * 2**20)}, free {size(free * 2**20)}{short}"


def runs(n: int) -> str:
    return "1 run" if n == 1 else f"{n:,} runs"


def short(path: Path) -> str:
    """As the user would type it."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def progress(folder: Path) -> str:
    record = rundir.last_record(folder / rundir.METRICS)
    if record is None:
        return "starting"
    shown = "  ".join(f"{k.partition('/')[2]} {v:.4g}" for k, v in list(_metrics(record).items())[:2])
    return f"step {record.get('step')} of {record.get('of')}  {shown}  {ago(float(record.get('time', 0)))}"


def _metrics(record: Mapping[str, Any]) -> dict[str, float]:
    return {k: v for k, v in record.items() if "/" in k and isinstance(v, (int, float))}


def ago(when: float) -> str:
    return f"{span(max(0.0, time.time() - when))} ago"


def span(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def last_words(folder: Path) -> str:
    """Why the last attempt failed."""
    cause = why.of_run(folder, folder.parent.parent)
    return f"{cause.kind}: {cause.said}" if cause else "it left no word"


def causes(out: Console, found: Sequence[mending.Group], words: Sequence[str]) -> None:
    """Each with its evidence, its runs, and the command that mends it."""
    for what, line in mending.lines(found, words):
        if what == "cause":
            kind, _, rest = plain(line).partition("  ")
            shown = Text(kind, style="red").append(f"  {rest}", style="default")
            out.print(shown, overflow="ellipsis", no_wrap=True, soft_wrap=False)
        else:
            out.print({"runs": "  ", "mend": "  -> "}.get(what, "") + plain(line))


def prunable(out: Console, items: Sequence[prune.Item]) -> None:
    """What, how many, how much, and why it may go."""
    if not items:
        out.print("nothing may go")
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("what", "count", "size", "why it may go", "for instance"):
        table.add_column(name, justify="right" if name in ("count", "size") else "left")
    for what, reason in prune.REASONS.items():
        some = [item for item in items if item.what == what]
        if some:
            most = max(some, key=lambda item: item.size)
            table.add_row(what, f"{len(some):,}", size(sum(i.size for i in some)), reason, plain(short(most.path)))
    out.print(table)


def size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 10 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def agreed(what: str, yes: bool, most: int = 0, count: int = 1) -> bool:
    """Does the person want it? Not asked with ``yes``, nor up to ``most``. Raises Refused where nobody can answer."""
    if yes or count <= most:
        return True
    if not sys.stdin.isatty():
        above = f" to do more than {most} without being asked" if most else ""
        raise Refused(f"{what}; add -y{above}")
    return input(f"{what}? [y/N] ").strip().lower() in ("y", "yes")


class Watch:
    """The runs of one launch as they go: bars on a terminal, else a line at a start, an end, and every tenth."""

    def __init__(self, total: int, no_color: bool = False, quiet: bool = False):
        self.total, self.ended_runs, self.quiet = total, 0, quiet
        self.out = console(no_color, stderr=True)
        self.shown: dict[Path, float] = {}
        self.began: dict[Path, float] = {}
        self.tasks: dict[Path, TaskID] = {}
        self.bars: Progress | None = None
        if self.out.is_terminal and not quiet:
            note = TextColumn("{task.fields[note]}")
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), note)
            self.bars = Progress(*columns, console=self.out, transient=True)

    def __enter__(self) -> Watch:
        if self.bars:
            self.bars.start()
            self.all = self.bars.add_task("all runs", total=self.total, note="")
        return self

    def __exit__(self, *_error: object) -> None:
        if self.bars:
            self.bars.stop()

    def _say(self, text: str, state: str) -> None:
        if not self.quiet:
            word = Text(f"{state:9}", style=COLOURS.get(state, "default"))
            self.out.print(word.append(" " + plain(text), style="default"))

    def started(self, folder: Path, name: str) -> None:
        self.shown[folder], self.began[folder] = 0.0, time.time()
        if self.bars:
            self.tasks[folder] = self.bars.add_task(plain(name), total=None, note="starting")
        else:
            self._say(name, "start")

    def queued(self, count: int, stage: str, job: str) -> None:
        self._say(f"{runs(count)} of {stage} as job {job}", "queued")

    def elsewhere(self, folder: Path, name: str) -> None:
        """Another process runs it."""
        self.began[folder] = time.time()
        if self.bars and folder in self.tasks:
            self.bars.remove_task(self.tasks.pop(folder))
        self._say(f"{name}  by another launch; waiting for it", "running")

    def moved(self, folder: Path, name: str) -> None:
        record = rundir.last_record(folder / rundir.METRICS)
        if self.quiet or not record or not record.get("of") or float(record.get("time", 0)) < self.began[folder]:
            return
        note = "  ".join(f"{k} {v:.4g}" for k, v in list(_metrics(record).items())[:1])
        if self.bars:
            self.bars.update(self.tasks[folder], completed=record["step"], total=record["of"], note=note)
        elif record["step"] / record["of"] >= self.shown[folder] + EVERY:
            self.shown[folder] = record["step"] / record["of"]
            self._say(f"{name}  {self.shown[folder]:.0%}  {note}", "")

    def ended(self, folder: Path, name: str, state: rundir.State | None, why: str) -> None:
        self.ended_runs += 1
        if self.bars:
            if folder in self.tasks:
                self.bars.remove_task(self.tasks.pop(folder))
            self.bars.update(self.all, completed=self.ended_runs)
        took = f" in {span(time.time() - self.began[folder])}" if folder in self.began else ""
        if state == "finished":
            note = ""
            with contextlib.suppress(rundir.RunDirError):
                metrics = rundir.read_json(folder / rundir.DONE).get("metrics") or {}
                note = "  ".join(f"{k} {v:.4g}" for k, v in list(_metrics(metrics).items())[:3])
        else:
            note = why or (last_words(folder) if state == "failed" else "")
            note += f"  ({short(folder / rundir.LOG)})" if state == "failed" else ""
        self._say(f"{name}  {self.ended_runs} of {self.total}{took}  {note}", state or "blocked")
