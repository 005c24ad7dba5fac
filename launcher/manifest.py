"""What a submission writes down beside the run directories, and the file that tells a job which runs are its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from contract import rundir

SUBMISSIONS = "submissions"  # below the output folder, one folder a launch
SUBMITTED = "submitted.json"  # in such a folder: array's name -> its number in the queue


def elements(manifest: Mapping[str, Any]) -> dict[str, list[dict[str, str]]]:
    """The runs, {"identity", "dir"}, of every element. Older submissions have one run an element, and no list."""
    return {number: runs if isinstance(runs, list) else [runs] for number, runs in manifest["runs"].items()}


def folders(path: Path, number: str) -> list[Path]:
    """The run directories of one element. Raises RunDirError."""
    try:
        mine = elements(rundir.read_json(path))[number]
    except KeyError:
        raise rundir.RunDirError(f"{path}: has no run for element {number}") from None
    return [path.resolve().parents[2] / run["dir"] for run in mine]


def pack(path: Path) -> int:
    """How many runs of an element are done side by side."""
    return int(rundir.read_json(path).get("pack", 1))
