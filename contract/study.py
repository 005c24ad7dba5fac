"""Studies: a table as a file. ``configs/study/NAME.yaml`` read into dataclasses, and unfolded into runs.

::

    title: Latent MIM on the embedded digits
    seeds: [0, 1, 2]
    overrides: {data: digits}            # for every stage
    stages:
      pretrain: {worker: main_lmim}      # repeat: false: once, whatever the seeds of the stages after it
      knn: {worker: main_knn, after: pretrain}
      probe: {worker: main_linprobe, after: pretrain, overrides: {epochs: 30}}
    rows:                                # keys are addressed to a stage: STAGE.key
      Latent MIM: {}
      random encoder: {pretrain.epochs: 0}
    columns:
      1-NN: {stage: knn, metric: knn/loo1}
      linear probe: {stage: probe, metric: linprobe/top1, better: higher, digits: 2}
    reported:                            # what a paper printed, in the table's own units, never without its source
      - {row: Latent MIM, column: 1-NN, value: 50.1, source: "the paper's abstract"}
    layout:
      digits: 1
      interval: ci95                     # Student's t of the mean; std; iqm: interquartile mean, bootstrap interval
      percent: true                      # metrics are fractions, cells are per cent; a column may say otherwise
      groups: {Baselines: [random encoder]}   # rows under a heading; the others stand above them
      bold: table                        # the best row of the table, or of its group; none: no row
      overall: [1-NN, linear probe]      # one more column: the interquartile mean over these

Group choices (``data``, ``recipe``) and plain keys are written alike. A column may carry ``overrides`` of its stage.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from contract.settings import build
from contract.settings.checks import SettingsError

NO_MORE: Mapping[str, Sequence[int]] = {}


@dataclass(kw_only=True)
class Stage:
    worker: str
    after: str | None = None  # the stage whose run it evaluates
    repeat: bool = True  # false: one run, of the first seed, serves all seeds of what comes after
    overrides: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class Column:
    stage: str
    metric: str
    overrides: dict[str, Any] = field(default_factory=dict)
    better: Literal["higher", "lower"] = "higher"
    digits: int | None = None  # null: as the layout has it; so with percent
    percent: bool | None = None


@dataclass(kw_only=True)
class Reported:
    """A figure that a paper printed; never without its source."""

    row: str
    column: str
    value: float
    source: str


@dataclass(kw_only=True)
class Layout:
    digits: int = 1
    interval: Literal["ci95", "std", "iqm"] = "ci95"
    percent: bool = True  # metrics are fractions, cells are per cent
    groups: dict[str, list[str]] = field(default_factory=dict)
    bold: Literal["table", "group", "none"] = "table"
    overall: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not 0 <= self.digits <= 10:
            raise SettingsError(f"layout.digits={self.digits}: must lie in [0, 10]")


@dataclass(kw_only=True)
class Study:
    title: str
    stages: dict[str, Stage]
    columns: dict[str, Column]
    rows: dict[str, dict[str, Any]]
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    overrides: dict[str, Any] = field(default_factory=dict)
    reported: list[Reported] = field(default_factory=list)
    layout: Layout = field(default_factory=Layout)

    def __post_init__(self) -> None:
        for what in ("stages", "rows", "columns"):
            if not getattr(self, what):
                raise SettingsError(f"{what}: empty; a table needs at least one")
        for name in self.stages:
            self._check_order(name)
        self._check_repeats()
        for name, column in self.columns.items():
            if column.stage not in self.stages:
                raise SettingsError(f"columns.{name}.stage={column.stage}: no such stage; valid: {_list(self.stages)}")
            for other, each in self.columns.items():
                if other == name:
                    break
                if (each.stage, each.metric, each.overrides) == (column.stage, column.metric, column.overrides):
                    raise SettingsError(f"columns.{name}: the same as column {other!r}: {column.metric}")
        for row, overrides in self.rows.items():
            for key in overrides:
                if key.partition(".")[0] not in self.stages or not key.partition(".")[2]:
                    raise SettingsError(
                        f"rows.{row}.{key}: address a stage, as in STAGE.key; stages: {_list(self.stages)}"
                    )
        self._check_reported()
        self._check_layout()
        if len(set(self.seeds)) != len(self.seeds) or not self.seeds:
            raise SettingsError(f"seeds={self.seeds}: expected different seeds, at least one")

    def _check_repeats(self) -> None:
        for name, stage in self.stages.items():
            if stage.repeat:
                continue
            if stage.after is not None and self.stages[stage.after].repeat:
                raise SettingsError(f"stages.{name}.repeat=false: {stage.after}, before it, is repeated")
            for column, each in self.columns.items():
                if each.stage == name:
                    raise SettingsError(f"columns.{column}: stage {name} has repeat=false, and one run is no mean")

    def _check_order(self, name: str) -> None:
        way = [name]
        while (after := self.stages[way[-1]].after) is not None:
            if after not in self.stages:
                raise SettingsError(f"stages.{way[-1]}.after={after}: no such stage; valid: {_list(self.stages)}")
            if after in way:
                raise SettingsError(f"stages.{way[-1]}.after={after}: a cycle: {' -> '.join([*way, after])}")
            way.append(after)

    def _check_reported(self) -> None:
        seen = set()
        for i, each in enumerate(self.reported):
            if not each.source.strip():
                raise SettingsError(f"reported[{i}].source: empty; say where {each.value:g} is printed")
            if each.row not in self.rows:
                raise SettingsError(f"reported[{i}].row={each.row}: is not a row; valid: {_list(self.rows)}")
            if each.column not in self.columns:
                raise SettingsError(
                    f"reported[{i}].column={each.column}: is not a column; valid: {_list(self.columns)}"
                )
            if (each.row, each.column) in seen:
                raise SettingsError(f"reported[{i}]: {each.row} | {each.column} has a reported figure already")
            seen.add((each.row, each.column))

    def _check_layout(self) -> None:
        grouped: dict[str, str] = {}
        for group, rows in self.layout.groups.items():
            for row in rows:
                if row not in self.rows:
                    raise SettingsError(f"layout.groups.{group}: {row!r} is not a row; valid: {_list(self.rows)}")
                if row in grouped:
                    raise SettingsError(f"layout.groups.{group}: {row!r} stands in {grouped[row]!r} already")
                grouped[row] = group
        for name in self.layout.overall:
            if name not in self.columns:
                raise SettingsError(f"layout.overall: {name!r} is not a column; valid: {_list(self.columns)}")
            if self.columns[name].better == "lower":
                raise SettingsError(f"layout.overall: lower is better in {name!r}; columns are pooled as they are")

    def seeds_of(self, row: str, more: Mapping[str, Sequence[int]]) -> list[int]:
        return [*self.seeds, *(seed for seed in more.get(row, ()) if seed not in self.seeds)]

    def steps(self, more: Mapping[str, Sequence[int]] = NO_MORE) -> Iterator[Step]:
        """Every stage that every cell needs, parents before children; equal ones (same key) appear once. ``more``:
        rows that have seeds beyond those of the study."""
        seen = set()
        for row in self.rows:
            for column in self.columns.values():
                for seed in self.seeds_of(row, more):
                    for step in self._chain(row, column, seed):
                        if step.key not in seen:
                            seen.add(step.key)
                            yield step

    def cell(self, row: str, column: str, more: Mapping[str, Sequence[int]] = NO_MORE) -> list[Step]:
        """The runs, one a seed, whose metric makes this cell."""
        return [self._chain(row, self.columns[column], seed)[-1] for seed in self.seeds_of(row, more)]

    def _chain(self, row: str, column: Column, seed: int) -> list[Step]:
        names = [column.stage]
        while (after := self.stages[names[0]].after) is not None:
            names.insert(0, after)
        chain: list[Step] = []
        for name in names:
            stage = self.stages[name]
            overrides = {**self.overrides, **stage.overrides}
            overrides |= {k.partition(".")[2]: v for k, v in self.rows[row].items() if k.partition(".")[0] == name}
            if name == column.stage:
                overrides |= column.overrides
            step = Step(
                stage=name,
                worker=stage.worker,
                seed=seed if stage.repeat else self.seeds[0],
                overrides=overrides,
                parent=chain[-1] if chain else None,
            )
            chain.append(step)
        return chain


@dataclass(frozen=True, kw_only=True)
class Step:
    """One run to be, before it is composed."""

    stage: str
    worker: str
    seed: int
    overrides: Mapping[str, Any]
    parent: Step | None

    @property
    def key(self) -> str:
        """Equal for equal steps."""
        return repr((self.worker, self.seed, sorted(self.overrides.items()), self.parent and self.parent.key))


RULE = re.compile(r"\s*(ci95|std|iqm|p)\s*<\s*([0-9.]+(?:e-?[0-9]+)?)\s*")


def rule(text: str) -> tuple[str, float]:
    """``ci95<0.5``: when a comparison is settled. Raises SettingsError."""
    match = RULE.fullmatch(text)
    with contextlib.suppress(ValueError):
        if match and (bound := float(match[2])) > 0:
            return match[1], bound
    raise SettingsError(f"--until {text}: expected ci95<NUMBER, std<NUMBER, iqm<NUMBER or p<NUMBER")


def read(values: Mapping[str, Any]) -> Study:
    """Plain data -> a checked study. Raises SettingsError, naming the key."""
    return build(Study, values)


def _list(names: Any) -> str:
    return ", ".join(names) or "(none)"
