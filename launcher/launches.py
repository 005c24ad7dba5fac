"""From the words of a command, or the file of a study, to a plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import contract.settings
from contract import study
from contract.settings import Stepping
from contract.settings.checks import SettingsError
from launcher import CONFIGS, rounds, study_file, sweep
from launcher.identity import ENCODERS, Input, find_encoder, takes_encoder
from launcher.plan import Plan, Run, absolute, build, located

SHARED = (
    "seed",
    "data",
    "env",
    "data_path",
    "output_dir",
    "resume",
    "smoke",
)  # what reaches the later stages of a pipeline


# -- a launch ---------------------------------------------------------------------------------------------------------


def of_launch(points: Sequence[sweep.Said], config_name: str = "config") -> Plan:
    runs: dict[Path, Run] = {}
    for said in points:
        for run in _pipeline(said, config_name):
            runs.setdefault(run.folder, run)
    return _plan(next(iter(runs.values())).name, runs.values())


def _plan(name: str, runs: Iterable[Run], **more: Any) -> Plan:
    runs = tuple(runs)
    folders = {r.settings.output_dir for r in runs}
    if len(folders) > 1:
        raise SettingsError(f"output_dir={','.join(sorted(folders))}: one launch writes to one folder")
    return Plan(name=name, output_dir=Path(folders.pop()), runs=runs, **more)


def _pipeline(said: sweep.Said, config_name: str) -> Iterator[Run]:
    """The run that was asked for, then those of ``then``, which evaluate its encoder."""
    first: sweep.Said = {}
    addressed: dict[str, sweep.Said] = {}
    for key, value in said.items():
        stage, dot, rest = key.partition(".")
        if dot and stage in contract.settings.workers():
            addressed.setdefault(stage, {})[rest] = value
        else:
            first[key] = value
    worker = first["worker"] if "worker" in first else sweep.compose(first, config_name).get("worker")
    first |= addressed.pop(str(worker), {})
    values = sweep.compose(first, config_name)
    parent = _run(values, first)
    yield parent
    for worker in parent.settings.then:
        if worker not in evaluations():
            raise SettingsError(contract.settings.unknown("then", worker, evaluations()))
        mine = addressed.pop(worker, {})
        shared = {key: values[key] for key in SHARED if key in values}
        yield _run(sweep.compose({"worker": worker, **mine}, shared=shared), mine, parent=parent)
    for worker, keys in addressed.items():
        raise SettingsError(f"{worker}.{next(iter(keys))}: {worker} is no stage of this launch; add then=[{worker}]")


def evaluations() -> list[str]:
    """The workers that read an encoder: what ``then`` takes."""
    return [w for w in contract.settings.workers() if takes_encoder(w)]


def _run(values: Mapping[str, Any], said: Iterable[str], *, stage: str | None = None, parent: Run | None = None) -> Run:
    worker = values.get("worker")
    if worker in evaluations():
        if parent is not None:
            values = {**values, "encoder": str(parent.folder)}
        elif "encoder" not in values:
            raise SettingsError(f"encoder: missing; expected {ENCODERS}")
    settings = contract.settings.read(values)
    settings.output_dir = absolute(settings.output_dir)  # runs are started elsewhere
    if settings.data_path is not None:
        settings.data_path = absolute(settings.data_path)
    if settings.data.cache is not None:
        settings.data.cache = absolute(settings.data.cache)
    settings.env = located(settings.env)
    explicit = frozenset(said)
    if isinstance(settings, Stepping):
        settings.resolve_batch(settings.env.processes, explicit)
    source: Input | None = None
    if parent is not None:
        source = Input(
            path=str(parent.folder), identity=parent.identity, group=parent.group, parents=(parent.identity,)
        )
    elif worker in evaluations():
        source = find_encoder(getattr(settings, "encoder"), Path(settings.output_dir))  # noqa: B009  # not all have one
        setattr(settings, "encoder", source.path)  # noqa: B010
    return build(settings, source, stage or settings.worker.removeprefix("main_"), explicit)


# -- a study ----------------------------------------------------------------------------------------------------------


def of_study(name: str, points: Sequence[sweep.Said] = ({},)) -> Plan:
    """``points``: keys said beside the name, for all stages or addressed as STAGE.key; only ``seed`` may be swept."""
    declared = _with(load_study(name), points)
    made: dict[str, Run] = {}
    _make(name, declared.steps(), made)
    more: rounds.More = {}
    if not any("seed" in point for point in points):  # beyond the study's own, where fill --until asked for them
        more = rounds.read(Path(next(iter(made.values())).settings.output_dir), name, declared)
        _make(name, declared.steps(more), made)
    cells = {
        (row, column): tuple(made[step.key].identity for step in declared.cell(row, column, more))
        for row in declared.rows
        for column in declared.columns
    }
    _check_rows(name, declared, cells)
    runs = {r.identity: r for r in made.values()}
    return _plan(name, runs.values(), study=declared, cells=cells)


def _make(name: str, steps: Iterable[study.Step], made: dict[str, Run]) -> None:
    for step in steps:
        if step.key in made:
            continue
        parent = made[step.parent.key] if step.parent else None
        values = {"worker": step.worker, **step.overrides, "seed": step.seed}
        try:
            made[step.key] = _run(sweep.compose(values), step.overrides, stage=step.stage, parent=parent)
        except SettingsError as error:
            lines = str(error).splitlines()
            raise SettingsError("\n".join(f"study {name}, stage {step.stage}: {line}" for line in lines)) from None


def _check_rows(name: str, declared: study.Study, cells: Mapping[tuple[str, str], tuple[str, ...]]) -> None:
    """Two rows of the same runs are one row twice: a key that is no science, or a slip of the hand."""
    seen: dict[tuple[tuple[str, ...], ...], str] = {}
    for row in declared.rows:
        runs = tuple(cells[row, column] for column in declared.columns)
        if runs in seen:
            at = CONFIGS / "study" / f"{name}.yaml"
            raise SettingsError(f"{at}: rows {seen[runs]!r} and {row!r} are the same runs ({runs[0][0]}, ...)")
        seen[runs] = row


def _with(declared: study.Study, points: Sequence[sweep.Said]) -> study.Study:
    fixed = {k: v for k, v in points[0].items() if k != "seed"}
    if any({k: v for k, v in p.items() if k != "seed"} != fixed for p in points):
        raise SettingsError("a study takes one value per key beside its name; only seed may be swept")
    stages = {}
    for stage, each in declared.stages.items():
        others = declared.stages.keys() - {stage}
        mine = {k.removeprefix(f"{stage}."): v for k, v in fixed.items() if k.partition(".")[0] not in others}
        stages[stage] = dataclasses.replace(each, overrides={**each.overrides, **mine})
    seeds = list(dict.fromkeys(p["seed"] for p in points if "seed" in p)) or declared.seeds
    return dataclasses.replace(declared, stages=stages, seeds=seeds)


def studies() -> list[str]:
    return sorted(p.stem for p in (CONFIGS / "study").glob("*.yaml"))


def load_study(name: str) -> study.Study:
    """Raises SettingsError: an unknown name with the choices, a wrong key with the file."""
    if name not in studies():  # which also keeps names such as ../x out
        raise SettingsError(contract.settings.unknown("study", name, studies()))
    return study_file.read(CONFIGS / "study" / f"{name}.yaml")
