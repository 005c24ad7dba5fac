"""The logs of some runs, line by line as they come, each with the run that said it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from contract import rundir
from contract.settings.checks import SettingsError
from launcher import job_logs, show
from launcher.rundirs import Found

MOST = 20  # runs side by side; more are no reading
POLL_S = 0.5
ASK_S, ASK_SOON_S = 30.0, 5.0  # what is queued; the latter where nothing runs
QUIET_S = 3.0  # between the end of one run and the start of the next
COLOURS = (36, 33, 32, 35, 34, 31)


@dataclass
class _Reader:
    """One run's files: whole lines only, as one of them may be half written."""

    run: Found
    output_dir: Path
    job: bool
    offsets: dict[Path, int] = field(default_factory=dict)

    def files(self) -> Iterable[Path]:
        return job_logs.of_run(self.run.folder, self.output_dir) if self.job else [self.run.folder / rundir.LOG]

    def skip(self, lines: int) -> None:
        """All but the last ``lines`` of each file."""
        for path in self.files():
            if path.is_file():
                data = path.read_bytes()
                kept = data.splitlines(keepends=True)[-lines:] if lines else []
                self.offsets[path] = len(data) - sum(map(len, kept))

    def read(self, rest: bool) -> bytes:
        """What is new; with ``rest``, the last line too, though it may have no end."""
        new = b""
        for path in self.files():
            try:
                with path.open("rb") as file:
                    file.seek(self.offsets.get(path, 0))
                    data = file.read()
            except OSError:
                continue
            end = len(data) if rest else data.rfind(b"\n") + 1
            self.offsets[path] = self.offsets.get(path, 0) + end
            new += data[:end]
        return new


def follow(
    found: Sequence[Found],
    output_dir: Path,
    queued: Callable[[], set[str]],
    *,
    on: bool = False,
    tail: int | None = None,
    job: bool = False,
    colour: bool = False,
) -> int:
    """``on``: until all of them have ended, those too that are still to start; ``queued`` says which wait in a queue.
    Raises SettingsError for more runs than one can read."""
    if len(found) > MOST:
        raise SettingsError(f"logs: {len(found)} runs match, more than {MOST}; narrow down by :running, 0-9 or seed=0")
    readers = [_Reader(each, output_dir, job) for each in found]
    if tail is not None:
        for each in readers:
            each.skip(max(0, tail))
    waiting, asked, quiet = queued() if on else set[str](), time.monotonic(), 0.0
    while True:
        states = {each.identity: rundir.state(each.folder) for each in found}  # before the last read: no line is missed
        if on and time.monotonic() - asked > (ASK_S if "running" in states.values() else ASK_SOON_S):
            waiting, asked = queued(), time.monotonic()
        busy = any(s == "running" or (i in waiting and s != "finished") for i, s in states.items())
        pending = len(found) > 1 and "waiting" in states.values() and "finished" in states.values()
        quiet = 0.0 if busy else quiet + POLL_S
        over = not on or (not busy and (not pending or quiet > QUIET_S))
        for number, each in enumerate(readers):
            _write(each.read(over), _prefix(each.run, number, colour) if len(readers) > 1 else b"")
        sys.stdout.flush()
        if over:
            break
        time.sleep(POLL_S)
    if not any(each.offsets for each in readers):
        hint = "" if job else "; python launcher.py logs ... --job shows what the scheduler wrote"
        print(f"no log yet{hint}", file=sys.stderr)
    return 0


def _prefix(run: Found, number: int, colour: bool) -> bytes:
    text = f"{run.identity[:8]} seed={run.info['seed']} |"
    return (f"\x1b[{COLOURS[number % len(COLOURS)]}m{text}\x1b[0m " if colour else f"{text} ").encode()


def _write(data: bytes, prefix: bytes) -> None:
    if not prefix:  # one run: as it stands there
        sys.stdout.buffer.write(data)
        return
    for line in data.decode(errors="replace").splitlines():
        sys.stdout.buffer.write(prefix + show.plain(line.expandtabs()).encode() + b"\n")
