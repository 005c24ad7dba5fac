"""``status``: how the runs get on, on one screen however many there are.

The run directories say what happened, the queue only what is still in it; details are read of a few runs of each kind.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from contract import rundir
from launcher import NotFound, breaker, canary, queues, rundirs, show, why
from launcher.queues import Glance
from launcher.rundirs import Found

STATES = ("finished", "running", "queued", "waiting", "blocked", "held", "stopped", "failed", "cancelled")
OPEN = frozenset({"running", "queued", "waiting", "blocked", "held", "stopped"})
MOVES = frozenset({"running", "queued"})  # something will become of them by itself
SOME = 50  # runs of a kind whose files are read for a mean
LINES = 8  # of a list; the rest is counted
CAUSES = 5


def main(args: argparse.Namespace, words: Sequence[str], output_dir: Path) -> int:
    """The exit code: 0 all finished, 100 some failed, 101 not finished, 103 cancelled."""
    if args.watch is None:
        seen = look(words, output_dir, args.fresh)
        if args.json:
            for line in described(seen):
                print(json.dumps(line, ensure_ascii=False))
        else:
            show_all(show.console(args.no_color), seen)
        return seen.code
    return _watch(args, words, output_dir)


def _watch(args: argparse.Namespace, words: Sequence[str], output_dir: Path) -> int:
    """On a terminal in place; elsewhere a new screen only where something is new."""
    out = show.console(args.no_color)
    live = Live(console=out, auto_refresh=False) if out.is_terminal and not args.json else contextlib.nullcontext()
    last = ""
    with live as screen:
        while True:
            seen = look(words, output_dir, args.fresh)
            if args.json:
                text = "\n".join(json.dumps(line, ensure_ascii=False) for line in described(seen))
            else:
                text = _text(seen, out)
            if screen is not None:
                screen.update(Text.from_ansi(text), refresh=True)
            elif text != last:
                print(text, flush=True)
            last = text
            if not {f.state for f in seen.runs} & MOVES:
                return seen.code
            time.sleep(args.watch)


def _text(seen: Seen, out: Console) -> str:
    to = io.StringIO()
    show_all(
        Console(file=to, width=out.width, force_terminal=out.is_terminal, no_color=out.no_color, highlight=False), seen
    )
    return to.getvalue().rstrip()


# -- looking ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    output_dir: Path
    runs: Sequence[Found]
    glance: Glance
    held: Mapping[tuple[str, str], Mapping[str, Any]]  # by the breaker: (submission, stage) -> why

    @property
    def code(self) -> int:
        states = {f.state for f in self.runs}
        if "failed" in states:
            return 100
        if states & OPEN:
            return 101
        return 103 if "cancelled" in states else 0

    def of(self, *states: str) -> list[Found]:
        return [f for f in self.runs if f.state in states]


def look(words: Sequence[str], output_dir: Path, fresh: bool = False) -> Seen:
    """Raises NotFound where the words choose nothing."""
    glance = queues.glance(output_dir, fresh)
    found = rundirs.select(words, output_dir, glance.runs)
    if not found:
        raise NotFound(f"no such run in {output_dir}; output_dir=DIR looks elsewhere")
    return Seen(output_dir, found, glance, breaker.held(output_dir))


@dataclass(frozen=True)
class Life:
    """The attempts of a run, and how the present one moves."""

    attempts: int
    resumed: int  # the step that the last one began at
    step: int
    of: int
    step_s: float  # 0: not known yet
    metrics: Mapping[str, float]
    moved: float  # when

    @property
    def left_s(self) -> float | None:
        return (self.of - self.step) * self.step_s if self.step_s else None


def life(folder: Path) -> Life:
    starts = [r for r in rundir.attempts(folder) if r.get("event") == "start" and "step" in r]
    record = rundir.last_record(folder / rundir.METRICS) or {}
    step, of, moved = (float(record.get(key) or 0) for key in ("step", "of", "time"))
    begun = starts[-1] if starts else {}
    resumed = int(begun.get("step") or 0)
    fresh = moved > float(begun.get("time", 0)) and step > resumed
    return Life(
        attempts=len({r.get("attempt") for r in starts}),
        resumed=resumed,
        step=int(step),
        of=int(of),
        step_s=(moved - float(begun["time"])) / (step - resumed) if fresh and begun else 0.0,
        metrics={k: v for k, v in record.items() if "/" in k and isinstance(v, (int, float))},
        moved=moved,
    )


def described(seen: Seen) -> Iterator[dict[str, object]]:
    """For ``--json``; these keys stay."""
    age = None if seen.glance.time is None else round(time.time() - seen.glance.time, 1)
    for each in seen.runs:
        info = {key: each.info.get(key) for key in ("identity", "group", "name", "worker", "stage", "seed")}
        lived = life(each.folder)
        cause = failure(each, seen.output_dir) if each.state == "failed" else None
        yield {
            **info,
            "state": each.state,
            "step": lived.step,
            "of": lived.of,
            "attempts": lived.attempts,
            "resumed_at": lived.resumed if lived.attempts > 1 else None,
            "left_s": lived.left_s if each.state == "running" else None,
            "metrics": dict(lived.metrics),
            "why": cause and cause.kind,
            "said": cause and cause.said,
            "queue_age_s": age,
            "dir": str(each.folder),
        }


def failure(found: Found, output_dir: Path) -> why.Cause | None:
    """As the supervisor wrote it down, else as the logs say."""
    ends = [r for r in rundir.attempts(found.folder)[-1:] if r.get("event") == "end"]
    if ends and ends[0].get("mark"):
        return why.Cause(str(ends[0]["why"]), str(ends[0]["mark"]), str(ends[0].get("said", "")))
    return why.of_run(found.folder, output_dir)


# -- showing ----------------------------------------------------------------------------------------------------------


def show_all(out: Console, seen: Seen) -> None:
    out.print(f"{show.plain(show.short(seen.output_dir))}: {show.runs(len(seen.runs))}{_age(seen.glance)}")
    stages: dict[tuple[str, ...], list[Found]] = {}
    for each in seen.runs:
        stages.setdefault((str(each.info.get("stage", "")), str(each.info["worker"])), []).append(each)
    rows = {key: Counter(f.state for f in found) for key, found in stages.items()}
    lives = {f.folder: life(f.folder) for f in seen.of("running")[:SOME]}
    latest = {key: _latest(found, lives) for key, found in stages.items()}
    out.print(show.counts(["stage", "worker"], rows, STATES, latest), soft_wrap=False)
    for line in [*_running(seen, lives), *_resumed(seen), *_waits(seen), *_failed(seen)]:
        out.print(line, overflow="ellipsis", no_wrap=True, soft_wrap=False)
    if (left := _left(seen, lives)) is not None:
        at = time.strftime("%a %H:%M", time.localtime(time.time() + left))
        out.print(f"about {show.span(left)} left (until {at}), if as many go on running")
    for line in _next(seen):
        out.print(f"next: {line}")


def _age(glance: Glance) -> str:
    if glance.time is None:
        return ""
    return f"; the queue as of {show.span(max(0.0, time.time() - glance.time))} ago (--fresh asks now)"


def _latest(found: Sequence[Found], lives: Mapping[Path, Life]) -> str:
    """The first metric of what has finished, else of what runs, as a mean."""
    done = [f for f in found if f.state == "finished"]
    values: list[Mapping[str, Any]] = []
    for each in done[:SOME]:
        with contextlib.suppress(rundir.RunDirError):
            values.append(rundir.read_json(each.folder / rundir.DONE).get("metrics") or {})
    values = values or [lives[f.folder].metrics for f in found if f.folder in lives]
    name = next((k for each in values for k, v in each.items() if isinstance(v, (int, float))), None)
    if name is None:
        return ""
    numbers = [v for each in values if isinstance(v := each.get(name), (int, float))]
    spread = f" ± {statistics.stdev(numbers):.2g}" if len(numbers) > 1 else ""
    return show.plain(f"{name} {statistics.fmean(numbers):.4g}{spread} (n={len(numbers)})")


def _name(found: Found) -> str:
    return show.plain(f"{found.info.get('name')} {found.identity[:8]} seed={found.info['seed']}")


def _line(state: str, text: str) -> Text:
    return Text(f"{state:8}", style=show.COLOURS[state]).append(f" {show.plain(text)}", style="default")


def _running(seen: Seen, lives: Mapping[Path, Life]) -> Iterator[Text | str]:
    running = seen.of("running")
    for each in running[:LINES]:
        lived = lives[each.folder]
        again = f"  attempt {lived.attempts}, from step {lived.resumed}" if lived.attempts > 1 else ""
        left = f"  {show.span(lived.left_s)} left" if lived.left_s is not None else ""
        yield _line("running", f"{_name(each)}  {show.progress(each.folder)}{left}{again}")
    if len(running) > LINES:
        yield f"         and {len(running) - LINES} more: python launcher.py status :running --json"


def _resumed(seen: Seen) -> Iterator[str]:
    """Of what is not over: who was put back into the queue, and where they went on."""
    steps = []
    for each in seen.of("running", "queued", "stopped")[: 4 * SOME]:
        lived = life(each.folder)
        if lived.attempts > 1 or (lived.attempts and each.state != "running"):
            steps.append(lived.step if each.state != "running" else lived.resumed)
    if steps:
        shown = ", ".join(map(str, sorted(steps)[:LINES])) + (", ..." if len(steps) > LINES else "")
        yield f"requeued {len(steps)}, to go on from step {shown}"


def _waits(seen: Seen) -> Iterator[Text | str]:
    canaries = [f for f in seen.runs if str(f.info.get("stage", "")).endswith(canary.SUFFIX)]
    waiting = [f for f in seen.of("queued", "waiting", "blocked") if f.info.get("canary")]
    states = Counter(f.state for f in canaries if f.state != "finished")
    if waiting and states:
        word = ", ".join(f"{n} {state}" for state, n in states.items())
        yield f"canary   {word}; {show.runs(len(waiting))} wait for it"
    for reason, runs in _held(seen):
        text = f"{show.runs(len(runs))} of {reason['stage']}: the first {len(reason['runs'])} ended alike"
        yield _line("held", f"{text}: {reason['said']}")
    blocked = [f for f in seen.of("blocked") if not f.info.get("canary")]
    if blocked:
        needs = {p for f in blocked for p in f.info.get("parents", ())}
        yield _line("blocked", f"{show.runs(len(blocked))} need {show.runs(len(needs))} that did not finish")


def _held(seen: Seen) -> Iterator[tuple[Mapping[str, Any], list[Found]]]:
    held = seen.of("held")
    for key, reason in seen.held.items():
        if runs := [f for f in held if (f.info.get("submission"), f.info.get("stage")) == key]:
            yield reason, runs


def _failed(seen: Seen) -> Iterator[Text | str]:
    """A line a cause."""
    failed = seen.of("failed")
    groups: dict[str, list[Found]] = {}
    causes: dict[str, why.Cause] = {}
    for each in failed[: 4 * SOME]:
        cause = failure(each, seen.output_dir) or why.Cause(why.UNKNOWN, "", "it left no word")
        causes[cause.mark] = cause
        groups.setdefault(cause.mark, []).append(each)
    for mark, runs in sorted(groups.items(), key=lambda item: -len(item[1]))[:CAUSES]:
        which = _name(runs[0]) if len(runs) == 1 else show.runs(len(runs))
        yield _line("failed", f"{which}: {causes[mark].kind}: {causes[mark].said}")
    if len(groups) > CAUSES:
        yield f"         and {len(groups) - CAUSES} more causes: python launcher.py why"


def _left(seen: Seen, lives: Mapping[Path, Life]) -> float | None:
    """Seconds, if as many go on running: what is left of them, and of those that wait as much as such runs took."""
    running = seen.of("running")
    total = 0.0
    for stage in {str(f.info.get("stage")) for f in seen.of("running", "queued")}:
        mine = [f for f in seen.runs if f.info.get("stage") == stage]
        lefts = [s for f in mine if f.folder in lives and (s := lives[f.folder].left_s) is not None]
        whole = _whole(mine, lives)
        queued = sum(f.state == "queued" for f in mine)
        under_way = sum(f.state == "running" for f in mine)
        if (under_way and not lefts and not whole) or (queued and not whole):
            return None
        total += under_way * (statistics.fmean(lefts) if lefts else whole / 2) + queued * whole
    return total / len(running) if running else None


def _whole(found: Sequence[Found], lives: Mapping[Path, Life]) -> float:
    """Seconds that one of these runs takes; 0 where nothing can be said yet."""
    took = []
    for each in [f for f in found if f.state == "finished"][:SOME]:
        ends = [r for r in rundir.attempts(each.folder) if r.get("event") == "end"]
        took.append(sum(float(r.get("seconds", 0)) for r in ends))
    took = took or [lived.of * lived.step_s for f in found if (lived := lives.get(f.folder)) and lived.step_s]
    return statistics.fmean(took) if took else 0.0


def _next(seen: Seen) -> Iterator[str]:
    """What a person may want to say now."""
    if seen.of("failed"):
        yield "python launcher.py why"
    for reason, runs in _held(seen):
        sweep = show.plain(str(runs[0].info.get("submission")))
        stage = f" ({show.plain(reason['stage'])})" if len(seen.held) > 1 else ""
        yield f"{sweep}{stage}: mend it and say the launch again, or python launcher.py retry {sweep}:held"
        yield f"or give it up: python launcher.py cancel {sweep}:held"
    if not seen.of("failed") and (state := next((s for s in ("stopped", "cancelled") if seen.of(s)), None)):
        yield f"python launcher.py retry :{state}"
