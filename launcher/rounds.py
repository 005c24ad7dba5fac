"""Seeds beyond those of a study, for the rows whose comparison was open: ``OUTPUT_DIR/studies/NAME.seeds``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from contract import rundir
from contract.study import Study

More = Mapping[str, Sequence[int]]


def _path(output_dir: Path, name: str) -> Path:
    return output_dir / "studies" / f"{name}.seeds"


def read(output_dir: Path, name: str, study: Study) -> More:
    """By row. Rows that the study does not have any more are passed over. Raises RunDirError for a damaged file."""
    path = _path(output_dir, name)
    if not path.exists():
        return {}
    said = rundir.read_json(path).get("rows")
    if not isinstance(said, dict) or not all(isinstance(s, list) and _seeds(s) for s in said.values()):
        raise rundir.RunDirError(f"{path}: expected {{'rows': {{ROW: [SEED, ...]}}}}; delete it to have none")
    return {row: seeds for row, seeds in said.items() if row in study.rows}


def _seeds(values: Sequence[object]) -> bool:
    return all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in values)


def add(output_dir: Path, name: str, study: Study, rows: Sequence[str], most: int) -> list[tuple[str, int]]:
    """One more seed for each of these rows that has fewer than ``most``; the same numbers in every row, so that
    comparisons stay paired. Gives what was added."""
    now = {row: list(seeds) for row, seeds in read(output_dir, name, study).items()}
    added = []
    for row in rows:
        seeds = study.seeds_of(row, now)
        if len(seeds) < most:
            seed = next(n for n in range(len(seeds) + 1) if n not in seeds)
            now.setdefault(row, []).append(seed)
            added.append((row, seed))
    if added:
        path = _path(output_dir, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        rundir.write_json(path, {"rows": now})
    return added
