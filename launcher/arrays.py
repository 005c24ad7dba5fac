"""Runs of equal resources as job arrays, for any scheduler: which element does which run, and what follows what."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import contract.settings
from contract.settings.env import Env
from launcher import NotQueued
from launcher.plan import Run
from launcher.rundirs import Submission


@dataclass(frozen=True)
class Array:
    name: str  # tells it from all other jobs
    env: Env
    after: str | None  # the array whose elements these follow: its name here, or its id in the queue
    gate: tuple[str, ...] = ()  # arrays, named likewise, that must end well before any of these starts
    runs: dict[int, list[Run]] = field(default_factory=dict)  # by the element's number; ``pack`` of them at a time

    @property
    def first(self) -> Run:
        return next(iter(self.runs.values()))[0]

    @property
    def count(self) -> int:
        return sum(map(len, self.runs.values()))

    @property
    def pack(self) -> int:
        """How many runs an element does side by side."""
        return min(self.env.pack, max(map(len, self.runs.values())))

    def told(self) -> dict[str, Any]:
        """What its jobs, and whoever asks for them later, find in the file of this array."""
        runs = {
            str(number): [{"identity": r.identity, "dir": f"{r.settings.worker}/{r.identity}"} for r in runs]
            for number, runs in self.runs.items()
        }
        return {"name": self.name, "stage": self.first.stage, "pack": self.pack, "runs": runs}


def of(submission: Submission, *, longest: int, room: int | None = None, start: int = 0) -> list[Array]:
    """Parents before children. Elements are numbered from ``start``; a child has its parent's number, since schedulers
    link equal numbers. No array has more than ``longest`` elements.

    An element does ``env.pack`` runs, side by side. Where the site takes no more than ``room`` elements in all, it does
    several times as many, one after another. Raises NotQueued where even that does not fit.
    """
    width = longest
    while True:
        made = _fold(submission, longest, width, start)
        elements = sum(len(array.runs) for array in made)
        if room is None or elements <= room:
            return made
        if width == 1 or room < 1:
            raise NotQueued(
                f"the site takes {max(room, 0)} more jobs of yours, and this needs at least {len(made)}; "
                f"wait for some to end (python launcher.py status), then say it again"
            )
        width = max(1, min(width, elements) * room // elements)


def _fold(submission: Submission, longest: int, width: int, start: int) -> list[Array]:
    slug = re.sub(r"[^\w.-]+", "-", submission.name, flags=re.ASCII).strip("-.")[:40] or "launch"
    name = f"{slug}-{hashlib.blake2b(str(submission.folder).encode(), digest_size=5).hexdigest()}"
    places: dict[str, tuple[str, int]] = {}  # of every run: its array, its number there
    for identity, at in submission.queue.items():
        if at.element is not None:
            places[identity] = (at.array, at.element)
    made: dict[tuple[object, ...], Array] = {}
    taken: dict[tuple[object, ...], int] = {}
    for run in submission.runs:
        parent = next((places[p] for p in run.parents if p in places), None)
        after = parent and parent[0]
        gate: tuple[str, ...] = ()
        if parent is None and run.identity not in submission.canary:
            gate = tuple(dict.fromkeys(places[i][0] for i in submission.canary if i in places))
        key = (run.stage, json.dumps(contract.settings.plain(run.settings.env)), after)
        if parent is None:
            position = taken[key] = taken.get(key, -1) + 1
            slot = position // run.settings.env.pack
            again, number = (0, slot % width) if width < longest else divmod(slot, longest)
            number += start
        else:
            number = parent[1]
            again = next(a for a, array in _numbered(made, key) if _fits(array, number, run))
        array = made.setdefault((*key, again), Array(f"{name}.{len(made)}", run.settings.env, after, gate))
        array.runs.setdefault(number, []).append(run)
        places[run.identity] = (array.name, number)
    return list(made.values())


def _numbered(made: Mapping[tuple[object, ...], Array], key: tuple[object, ...]) -> Iterator[tuple[int, Array | None]]:
    """The arrays that go by this key, and one that is yet to be made."""
    again = 0
    while array := made.get((*key, again)):
        yield again, array
        again += 1
    yield again, None


def _fits(array: Array | None, number: int, run: Run) -> bool:
    """An element follows one of the parent's, so it may do one child of each of that element's runs."""
    there = array.runs.get(number, []) if array else []
    return not any(set(each.parents) & set(run.parents) for each in there)


def cap(array: Array, made: Sequence[Array]) -> int | None:
    """How many elements of this array may run at once: its share of ``env.max_parallel``, which is for a stage."""
    if array.env.max_parallel is None:
        return None
    beside = [len(a.runs) for a in made if a.first.stage == array.first.stage]
    return max(1, array.env.max_parallel * len(array.runs) // sum(beside))


def ranges(numbers: Sequence[int]) -> str:
    """0-2,5 for 0, 1, 2 and 5."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    return ",".join("-".join(map(str, part)) for part in parts)


def by_array(elements: Iterable[Sequence[str]]) -> list[tuple[str, str]]:
    """(array, number) pairs -> (array, 0-2,5): one call for many."""
    found: dict[str, list[int]] = {}
    for array, number in elements:
        found.setdefault(array, []).append(int(number))
    return [(array, ranges(sorted(numbers))) for array, numbers in found.items()]
