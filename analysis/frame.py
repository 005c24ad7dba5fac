"""Run directories as tidy DataFrames, cached as Parquet and refreshed run by run.

::

    runs(output_dir)      one row per run: identity, group, name, worker, stage, seed, state, code, commit, parents, ...
    results(output_dir)   one row per finished run and metric: the same columns, then metric, value, steps, time
    curves(output_dir)    one row per point of metrics.jsonl: identity, metric, step, time, value

A run is read again when the size or the time of one of its files changed. What cannot be read is left out with a line
that names the file; the cache is never trusted more than the files and can be deleted at any time.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from analysis import runs as rd
from analysis.runs import Tell, to_stderr
from contract import rundir

CACHE = ".cache"
VERSION = 2  # of the cached tables; another one is rebuilt

TEXT = ("identity", "group", "name", "worker", "stage", "code", "commit", "study", "imported")
RESULTS = pa.schema(
    [("key", pa.string())]
    + [(name, pa.string()) for name in TEXT]
    + [("seed", pa.int64()), ("submitted", pa.float64()), ("parents", pa.list_(pa.string())), ("finished", pa.bool_())]
    + [("metric", pa.string()), ("value", pa.float64()), ("steps", pa.int64()), ("time", pa.float64())]
)
CURVES = pa.schema(
    [(name, pa.string()) for name in ("key", "identity", "metric")]
    + [("step", pa.int64()), ("time", pa.float64()), ("value", pa.float64())]
)

Signature = list[list[int]]
Columns = dict[str, list[Any]]


def runs(output_dir: Path | str, tell: Tell = to_stderr) -> pd.DataFrame:
    """One row per run, with its state as the files say it."""
    found = finals(Path(output_dir), tell).drop_duplicates("key")
    frame: pd.DataFrame = found.drop(columns=["key", "metric", "value", "steps"]).reset_index(drop=True)
    return frame


def results(output_dir: Path | str, tell: Tell = to_stderr) -> pd.DataFrame:
    """One row per finished run and final metric."""
    found = finals(Path(output_dir), tell)
    frame: pd.DataFrame = found[found["metric"].notna()].drop(columns="key").reset_index(drop=True)
    return frame


def curves(output_dir: Path | str, identities: Sequence[str] | None = None, tell: Tell = to_stderr) -> pd.DataFrame:
    """One row per logged value of the runs asked for (all by default)."""
    table = _cached(Path(output_dir), "curves", CURVES, (rundir.METRICS,), _read_curves, tell)
    if identities is not None:
        table = table.filter(pc.is_in(table["identity"], pa.array(list(identities), pa.string())))
    frame: pd.DataFrame = table.drop_columns(["key"]).to_pandas()
    return frame


def finals(output_dir: Path, tell: Tell = to_stderr) -> pd.DataFrame:
    """``results`` and, with no metric, a row for each run that has none: all that a table needs."""
    table = _cached(output_dir, "results", RESULTS, (rundir.DONE,), _read_results, tell)
    frame: pd.DataFrame = table.drop_columns(["finished"]).to_pandas()
    frame["state"] = "finished"
    open_ones = ~table["finished"].to_pandas()
    if open_ones.any():
        states = {key: rundir.state(output_dir / key) for key in frame.loc[open_ones, "key"].unique()}
        frame.loc[open_ones, "state"] = frame.loc[open_ones, "key"].map(states)
    return frame


# -- reading one run --------------------------------------------------------------------------------------------------


def _read_results(folder: Path, tell: Tell) -> tuple[Columns, bool]:
    run, final = rd.read_run(folder), rd.read_final(folder)
    rows: list[tuple[str | None, float | None]] = [*(final.metrics if final else {}).items()] or [(None, None)]
    once = {name: getattr(run, name) for name in (*TEXT, "seed", "submitted")}
    once |= {"key": run.key, "parents": list(run.parents), "finished": final is not None}
    once |= {"steps": final.steps if final else None, "time": final.time if final else None}
    columns: Columns = {name: [value] * len(rows) for name, value in once.items()}
    columns["metric"], columns["value"] = [key for key, _ in rows], [value for _, value in rows]
    return columns, True


def _read_curves(folder: Path, tell: Tell) -> tuple[Columns, bool]:
    run = rd.read_run(folder)
    points, problems = rd.curves(folder)
    for problem in problems:
        tell(problem)
    columns: Columns = {"key": [run.key] * len(points), "identity": [run.identity] * len(points)}
    columns["metric"], columns["step"] = [p.key for p in points], [p.step for p in points]
    columns["time"], columns["value"] = [p.time for p in points], [p.value for p in points]
    return columns, not problems


# -- the cache --------------------------------------------------------------------------------------------------------


def _cached(
    output_dir: Path,
    name: str,
    schema: pa.Schema,
    files: Sequence[str],
    read: Callable[[Path, Tell], tuple[Columns, bool]],
    tell: Tell,
) -> pa.Table:
    """The table of all runs: rows of unchanged ones from the cache, the others from their files."""
    path = output_dir / CACHE / f"{name}.parquet"
    table, known = _load(path, schema, tell)
    signatures = _signatures(output_dir, (rundir.RUN, *files))
    unchanged = {key for key, signature in signatures.items() if known.get(key) == signature}
    if len(unchanged) == len(signatures) == len(known):
        return table
    columns: Columns = {column: [] for column in schema.names}
    kept = {key: signatures[key] for key in unchanged}
    for key in sorted(signatures.keys() - unchanged):
        try:
            rows, sound = read(output_dir / key, tell)
        except (rundir.RunDirError, OSError) as error:
            tell(f"{error}; the run is left out")
            continue
        for column, values in rows.items():
            columns[column].extend(values)
        if sound:  # else it is read, and told about, every time
            kept[key] = signatures[key]
    old = table.filter(pc.is_in(table["key"], pa.array(sorted(unchanged), pa.string())))
    table = pa.concat_tables([old, pa.table(columns, schema=schema)]).sort_by("key").combine_chunks()
    if kept != known:
        _store(path, table.filter(pc.is_in(table["key"], pa.array(sorted(kept), pa.string()))), kept)
    return table


def _signatures(output_dir: Path, files: Sequence[str]) -> dict[str, Signature]:
    """Size and time of the files of every run, by its key; the first file makes a folder a run. For 10,000 runs, plain
    text and one look at each file are five times as fast as paths."""
    found: dict[str, Signature] = {}
    for worker in _entries(str(output_dir)):
        for folder in _entries(worker.path) if worker.is_dir() else ():
            each = [_signature(f"{folder.path}/{name}") for name in files]
            if each[0]:
                found[f"{worker.name}/{folder.name}"] = each
    return found


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError:
        return []


def _signature(path: str) -> list[int]:
    try:
        stat = os.stat(path)  # noqa: PTH116
    except OSError:
        return []
    return [stat.st_size, stat.st_mtime_ns]


def _load(path: Path, schema: pa.Schema, tell: Tell) -> tuple[pa.Table, dict[str, Signature]]:
    """The cached table and the signatures of its runs; empty where there is none or where it is damaged."""
    empty = schema.empty_table()
    if not path.exists():
        return empty, {}
    try:
        table = pq.read_table(path, page_checksum_verification=True)
        header = json.loads(table.schema.metadata[b"sightline"])
        table = table.replace_schema_metadata(None)
        if header["version"] != VERSION or table.schema != schema:
            return empty, {}
        return table, header["runs"]
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        tell(f"{path}: damaged ({str(error).splitlines()[0]}); rebuilt")
        return empty, {}


def _store(path: Path, table: pa.Table, known: Mapping[str, Signature]) -> None:
    header = json.dumps({"version": VERSION, "runs": known})
    data = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({b"sightline": header}), data, write_page_checksum=True)
    with contextlib.suppress(OSError):  # somebody else's runs can be read, too
        path.parent.mkdir(exist_ok=True)
        rundir.write_atomic(path, data.getvalue())
