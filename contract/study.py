"""Studies: a table as a file. ``configs/study/NAME.yaml`` read into dataclasses, and unfolded into runs.

::

    title: Latent MIM on the embedded digits
    seeds: [0, 1, 2]
    overrides: {data: digits}            # for every stage
    stages:                              # in the order in which they run
      pretrain: {worker: main_lmim}
      knn: {worker: main_knn, after: pretrain}
      probe: {worker: main_linprobe, after: pretrain, overrides: {epochs: 30}}
    rows:                                # keys are addressed to a stage: STAGE.key
      Latent MIM: {}
      random encoder: {pretrain.epochs: 0}
    columns:
      1-NN: {stage: knn, metric: knn/loo1}
      linear probe: {stage: probe, metric: linprobe/top1}
    reported: []                         # {row, column, value, source}
    layout: {digits: 1, interval: ci95}

Group choices (``data``, ``recipe``) and plain keys are written alike. A column may carry ``overrides`` of its stage.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from contract.settings import build
from contract.settings.checks import SettingsError


@dataclass(kw_only=True)
class Stage:
    worker: str
    after: str | None = None  # the stage whose run it evaluates
    overrides: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class Column:
    stage: str
    metric: str
    overrides: dict[str, Any] = field(default_factory=dict)
    better: Literal["higher", "lower"] = "higher"


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
    interval: Literal["ci95", "std"] = "ci95"
    percent: bool = True  # metrics are fractions, cells are per cent


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
        earlier: list[str] = []
        for name, stage in self.stages.items():
            if stage.after is not None and stage.after not in earlier:
                raise SettingsError(f"stages.{name}.after={stage.after}: not an earlier stage; valid: {_list(earlier)}")
            earlier.append(name)
        for name, column in self.columns.items():
            if column.stage not in self.stages:
                raise SettingsError(f"columns.{name}.stage={column.stage}: no such stage; valid: {_list(self.stages)}")
        for row, overrides in self.rows.items():
            for key in overrides:
                if key.partition(".")[0] not in self.stages:
                    raise SettingsError(
                        f"rows.{row}.{key}: address a stage, as in STAGE.key; stages: {_list(self.stages)}"
                    )
        for each in self.reported:
            if each.row not in self.rows:
                raise SettingsError(f"reported: row {each.row!r} is not a row; valid: {_list(self.rows)}")
            if each.column not in self.columns:
                raise SettingsError(f"reported: column {each.column!r} is not a column; valid: {_list(self.columns)}")
        if len(set(self.seeds)) != len(self.seeds) or not self.seeds:
            raise SettingsError(f"seeds={self.seeds}: expected different seeds, at least one")

    def steps(self) -> Iterator[Step]:
        """Every stage that every cell needs, parents before children; equal ones (same key) appear once."""
        seen = set()
        for row in self.rows:
            for column in self.columns.values():
                for seed in self.seeds:
                    for step in self._chain(row, column, seed):
                        if step.key not in seen:
                            seen.add(step.key)
                            yield step

    def cell(self, row: str, column: str) -> list[Step]:
        """The runs, one a seed, whose metric makes this cell."""
        return [self._chain(row, self.columns[column], seed)[-1] for seed in self.seeds]

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
                seed=seed,
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


def read(values: Mapping[str, Any]) -> Study:
    """Plain data -> a checked study. Raises SettingsError, naming the key."""
    return build(Study, values)


def _list(names: Any) -> str:
    return ", ".join(names) or "(none)"
